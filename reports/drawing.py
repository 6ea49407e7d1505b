"""Draws what all pictures share: style, colors by arm, legends, axes and intervals. It also saves pictures as PNG."""

import itertools
import re
import textwrap
import warnings
from io import BytesIO

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image  # matplotlib depends on it

from nanometa.common.statistics import DECIDES
from nanometa.reports.lines import has_learned

# colors that the color-blind can tell apart (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
ARM_COLOURS = dict(zip(("meta", "causal2", "pause", "random", "gpt2", "widemlp", "diagonal"), COLOURS, strict=True))
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (5, 2)), (0, (3, 1.5, 1, 1.5)), (0, (7, 1.5, 1, 1.5, 1, 1.5)))  # dotted lines are baselines
GREY, LIGHT = "#555555", "#E8E8E8"
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
    "axes.grid": True, "grid.color": LIGHT, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
WIDTH, DPI = 3.6, 180  # width in inches: the 360 pixels of a phone, on which 10 points are 14 pixels


def png(draw, *args, width: float = WIDTH) -> bytes:
    """Returns as PNG what draw(figure, *args) draws on a figure of this width in inches. Equal arguments give equal
    bytes."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in the name of a run
        figure, out = Figure(figsize=(width, 3.0), dpi=DPI, layout="constrained"), BytesIO()
        draw(figure, *args)
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def tiled(heading: str, pictures: list[bytes], columns: int = 3) -> bytes:
    """Returns PNGs of the same width side by side, row by row below a heading, as one PNG."""
    tiles = [Image.open(BytesIO(picture)) for picture in pictures]
    columns = min(columns, len(tiles))
    inches = columns * tiles[0].width / DPI

    def draw_heading(figure: Figure) -> None:
        text = wrapped(heading, int(13 * inches))
        figure.set_figheight(0.2 + 0.18 * (1 + text.count("\n")))
        figure.suptitle(text)

    head, out = Image.open(BytesIO(png(draw_heading, width=inches))), BytesIO()
    rows = [[head], *(tiles[i : i + columns] for i in range(0, len(tiles), columns))]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (head.width, sum(heights)), "white")
    for row, top in zip(rows, itertools.accumulate(heights, initial=0), strict=False):
        for i, tile in enumerate(row):
            sheet.paste(tile, (i * tile.width, top))
    sheet.save(out, format="png")
    return out.getvalue()


def wrapped(text: str, width: int = 40) -> str:
    """Returns the text in lines that fit a small picture. Brackets that fit in one line are not broken."""
    whole = re.sub(r"\([^()]*\)", lambda of: of[0].replace(" ", "\xa0") if len(of[0]) <= width else of[0], text)
    return textwrap.fill(whole, width, break_long_words=True).replace("\xa0", " ")


# ----------------------------------------------------------------------------- colors and legends


def look(number: int) -> dict:
    """Returns the color and marker of the series with this number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5}


def arm_looks(labels: list[str]) -> dict[str, dict]:
    """Returns the color and marker of each label. The first label of an arm has the arm's color, which is the same in
    all pictures. Labels begin with the name of their arm."""
    looks, free = {}, [*COLOURS]
    for label in dict.fromkeys(labels):
        own = ARM_COLOURS.get(re.split(r"[ ,]", label)[0])
        looks[label] = own if own in free else None
        free = [colour for colour in free if colour != own]
    others = iter([*free, *COLOURS * len(looks)])
    return {label: look(i) | {"color": own or next(others)} for i, (label, own) in enumerate(looks.items())}


def key(label: str, **look) -> Line2D:
    """Returns an entry for a legend, in grey unless `look` has a color."""
    return Line2D([], [], label=label, **{"color": GREY, **look})


def legend(figure: Figure, handles: list, columns: int = 2) -> None:
    """Puts a legend below the figure, in as many columns as the labels allow, and makes the figure taller for it."""

    def letters() -> int:  # number of letters that fit into one label
        return int(figure.get_figwidth() * 72 / columns / 5.6) - 7

    while columns > 1 and max(len(handle.get_label()) for handle in handles) > letters():
        columns -= 1
    for handle in handles:
        handle.set_label(wrapped(handle.get_label(), letters()))
    rows = [handles[i : i + columns] for i in range(0, len(handles), columns)]
    lines = sum(1 + max(handle.get_label().count("\n") for handle in row) for row in rows)
    figure.set_figheight(figure.get_figheight() + 0.235 * lines)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.2)


# ----------------------------------------------------------------------------- axes and text


def interval_line(axes, x: list, ends: list[tuple[float, float, float]], look: dict, scale: float = 100) -> None:
    """Draws a line through points with vertical intervals. ends: mean, low and high of every point."""
    mean, low, high = ([scale * end[i] for end in ends] for i in range(3))
    axes.plot(x, mean, **{"linewidth": 1.4, **look})
    axes.vlines(x, low, high, color=look["color"], linewidth=1.4)


def percent_axis(axes, low: float = -4) -> None:
    axes.set_ylim(low, 104)
    axes.set_yticks(range(0, 101, 20))


def length_axis(axes, lengths: set[int], most: int = 6) -> None:
    """Scales the horizontal axis logarithmically and labels at most `most` of the lengths."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(lengths) / 1.3, max(lengths) * 1.3)
    shown = sorted(lengths)[:: -(-len(lengths) // most)]
    axes.set_xticks(shown, list(map(str, shown)))
    axes.minorticks_off()


def log_axis(axes, name: str = "y", at: tuple[float, ...] = (1, 2, 5)) -> None:
    """Scales an axis, x or y, logarithmically, with plain numbers at these multiples of the powers of ten."""
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=at))
    axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def run_title(lines: list[dict]) -> str:
    """Names the run of a probe's lines, and warns if it has not learned the task."""
    first, weak = lines[0], "; NOT LEARNED: in some cells its answers are no better than chance or a shortcut"
    name = f"{first['arm']}; {first['run']}, step {first['step']}, seed {first['seed']}"
    return name if all(map(has_learned, lines)) else name + weak


def text_count(lines: list[dict]) -> str:
    """Returns the number of texts that the lines are about, and whether it is too small to decide anything."""
    n = sorted({line["n"] for line in lines})
    many = f"n = {n[0]} to {n[-1]}" if len(n) > 1 else f"n = {n[0]}"
    return f"{many} texts{' (too few to decide)' if n[-1] < DECIDES else ''}"
