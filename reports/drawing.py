"""Holds the style and helpers of all pictures, and draws the pictures of the tasks as small panels that fit a phone."""

import re
import textwrap
from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nanometa.common.statistics import DECIDES
from nanometa.reports.compare import Difference
from nanometa.reports.lines import Arm, Panel, has_learned, impossible, share_interval, summary
from nanometa.reports.paper import FIGURE_1, LENGTH

# colors that the color-blind can tell apart (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX*"
DASHES = (
    "-",
    (0, (5, 2)),
    (0, (3, 1.5, 1, 1.5)),
    (0, (7, 1.5, 1, 1.5, 1, 1.5)),
)  # dotted lines are reserved for chance
GREY, LIGHT = "#555555", "#E8E8E8"
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, "axes.grid": True,
    "grid.color": LIGHT, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
WIDTH, DPI = 3.6, 180  # width in inches: the 360 pixels of a phone, on which 10 points are 14 pixels


def png(draw, *args, width: float = WIDTH) -> bytes:
    """Returns as PNG what draw(figure, *args) draws on a figure of this width in inches. Equal arguments give equal
    bytes."""
    with matplotlib.rc_context(STYLE):
        figure, out = Figure(figsize=(width, 3.0), dpi=DPI, layout="constrained"), BytesIO()
        draw(figure, *args)
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def tiled(heading: str, pictures: list[bytes], columns: int = 3) -> bytes:
    """Returns PNGs of the same width side by side, row by row below a heading, as one PNG."""
    columns = min(columns, len(pictures))
    images = [_pixels(png(_draw_heading, wrapped(heading, 50 * columns), width=columns * WIDTH))]
    tiles = [_pixels(picture) for picture in pictures]
    for row in (tiles[i : i + columns] for i in range(0, len(tiles), columns)):
        height = max(len(tile) for tile in row)
        images.append(np.concatenate([_padded(tile, height, tile.shape[1]) for tile in row], axis=1))
    width, out = max(image.shape[1] for image in images), BytesIO()
    rows = [_padded(image, len(image), width) for image in images]
    imsave(out, np.concatenate(rows), format="png", metadata={"Software": None})
    return out.getvalue()


def _draw_heading(figure: Figure, text: str) -> None:
    figure.set_figheight(0.2 + 0.18 * (1 + text.count("\n")))
    figure.suptitle(text, fontsize=10)


def _pixels(picture: bytes) -> np.ndarray:
    return imread(BytesIO(picture))[..., :3]


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the image with white below and to the right of it."""
    return np.pad(image, ((0, height - len(image)), (0, width - image.shape[1]), (0, 0)), constant_values=1.0)


def run_title(lines: list[dict]) -> str:
    """Names the run of the lines, and warns if it has not learned the task."""
    first = lines[0]
    weak = (
        ""
        if all(map(has_learned, lines))
        else ("; NOT LEARNED: in some cells its answers are no better than chance or a shortcut")
    )
    return f"{first['arm']}; {first['run']}, step {first['step']}, seed {first['seed']}{weak}"


def text_count(lines: list[dict]) -> str:
    """Returns the number of texts behind the lines, and whether it is too small to decide anything."""
    n = sorted({line["n"] for line in lines})
    many = f"n = {n[0]} to {n[-1]}" if len(n) > 1 else f"n = {n[0]}"
    return f"{many} texts{' (too few to decide)' if n[-1] < DECIDES else ''}"


def key(label: str, **look) -> Line2D:
    """Returns an entry for a legend, in grey unless `look` has a color."""
    return Line2D([], [], label=label, **{"color": GREY, **look})


def styles(arms: list[Arm]) -> dict[tuple, dict]:
    """Returns the look that each arm has in every picture, by its name: color and marker depend on the label, dashes on
    the train length."""
    labels = list(dict.fromkeys(arm.label for arm in arms))
    lengths = sorted({arm.training.length for arm in arms}, reverse=True)  # the longest is solid
    return {
        arm.name: {
            **look(labels.index(arm.label)),
            "linestyle": DASHES[lengths.index(arm.training.length) % len(DASHES)],
        }
        for arm in arms
    }


def look(number: int) -> dict:
    """Returns the color and marker of the series with this number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5}


def wrapped(text: str, width: int = 40) -> str:
    """Returns the text in lines that fit a small picture. Brackets that fit in one line are not broken."""
    whole = re.sub(r"\([^()]*\)", lambda of: of[0].replace(" ", "\xa0") if len(of[0]) <= width else of[0], text)
    return textwrap.fill(whole, width, break_long_words=True).replace("\xa0", " ")


def title(panel: Panel) -> str:
    """Returns the unique title of a panel. It contains `question` only for list recall, because in other tasks this
    setting only changes the seed."""
    question = f", question {panel.question}" if panel.task == "list_recall" or panel.question != "index" else ""
    return f"{panel.task.replace('_', ' ')}: {panel.placement} ({panel.level}{question})"


def accuracy(figure: Figure, arms: list[Arm], panel: Panel, footer: str) -> None:
    """Draws exact answers by evaluation length."""
    axes, mine = figure.subplots(), [arm for arm in arms if any(at == panel for at, _ in arm.lines)]
    barred = _by_length(axes, styles(arms), mine, panel)
    _percent(axes, barred)
    axes.set(title=wrapped(title(panel)), xlabel=f"positions of a text\n{footer}", ylabel="exact answers, %")
    legend(figure, _accuracy_handles(mine, styles(arms), barred))


def overview(figure: Figure, arms: list[Arm], panels: list[Panel], footer: str) -> None:
    """Draws small versions of all panels of `accuracy`, with a row for each task and a column for each placement."""
    rows = list(dict.fromkeys(panel._replace(placement="") for panel in panels))
    columns = list(dict.fromkeys(panel.placement for panel in panels))
    figure.set_size_inches(1 + 2.1 * len(columns), 0.9 + 1.75 * len(rows))
    grid, looks = figure.subplots(len(rows), len(columns), sharey=True, squeeze=False), styles(arms)
    barred = False
    for row, line in zip(rows, grid, strict=True):
        for placement, axes in zip(columns, line, strict=True):
            panel = row._replace(placement=placement)
            mine = [arm for arm in arms if any(at == panel for at, _ in arm.lines)]
            axes.set_title(placement if row == rows[0] else "")
            if mine:
                barred |= _by_length(axes, looks, mine, panel)
            else:
                axes.set_axis_off()
        question = f", {row.question}" if row.task == "list_recall" or row.question != "index" else ""
        line[0].set_ylabel(f"{row.task.replace('_', ' ')}\n{row.level}{question}")
    for axes in grid[-1]:
        axes.set_xlabel("positions of a text")
    _percent(grid[0, 0], barred)
    figure.suptitle(f"exact answers, %: {footer}", fontsize=10)
    legend(figure, _accuracy_handles(arms, looks, barred), columns=4)


def _by_length(axes, looks: dict, mine: list[Arm], panel: Panel) -> bool:
    """Draws the arms' points, chance and the best shortcut. Returns whether a cell is impossible."""
    barred = False
    for number, arm in enumerate(mine):
        cells = {length: of for (at, length), of in sorted(arm.lines.items()) if at == panel}
        dodge = 2 ** (0.035 * (number - (len(mine) - 1) / 2))
        barred |= _points(axes, cells, dodge, looks[arm.name])
    floors = _floors(mine, panel)
    x, best = list(floors), [100 * share for share, _ in floors.values()]
    ends = [[100 * end for end in share_interval(share, n)] for share, n in floors.values()]
    axes.plot(x, best, color=GREY, linewidth=0.8, marker="_", zorder=1)
    axes.vlines(x, [low for low, _ in ends], [high for _, high in ends], color=GREY, linewidth=1, zorder=1)
    chance = max(line["chance"] for line in _measured(mine, panel)) if floors else 0.0
    axes.axhline(100 * chance, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    _lengths(axes, {length for arm in mine for at, length in arm.lines if at == panel})
    return barred


def _accuracy_handles(arms: list[Arm], looks: dict, barred: bool) -> list[Line2D]:
    baselines = [key("best shortcut", linewidth=0.8, marker="_"), key("chance", linestyle=":", linewidth=1.2)]
    return _arm_handles(arms, looks) + _length_handles(arms, looks) + baselines + _cross(barred)


def _points(axes, cells: dict[int, dict], dodge: float, look: dict) -> bool:
    """Draws a line with intervals, and impossible cells in the strip below 0. Returns whether there was one."""
    possible = {length: summary(of) for length, of in cells.items() if not impossible(of)}
    x = [length * dodge for length in possible]
    mean, low, high = ([100 * row[i] for row in possible.values()] for i in range(3))
    axes.plot(x, mean, linewidth=1.4, **look)
    axes.vlines(x, low, high, color=look["color"], linewidth=1.4)
    for at, length in zip(x, possible, strict=True):
        if len(cells[length]) > 1:
            shares = [100 * line["exact"] for line in cells[length].values()]
            axes.plot([at] * len(shares), shares, ".", color=look["color"], markersize=3, alpha=0.7)
    barred = [length * dodge for length in cells if length not in possible]
    axes.plot(barred, [IMPOSSIBLE] * len(barred), "x", color=look["color"], markersize=6, markeredgewidth=1.6)
    return bool(barred)


IMPOSSIBLE = -9  # y of crosses in the strip below 0


def _percent(axes, barred: bool) -> None:
    axes.set_ylim(-15 if barred else -4, 104)
    axes.set_yticks(range(0, 101, 20))
    if barred:
        axes.axhspan(-15, -4, color=LIGHT, zorder=0)


def _lengths(axes, lengths: set[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(lengths) / 1.3, max(lengths) * 1.3)
    axes.set_xticks(sorted(lengths), [str(length) for length in sorted(lengths)])
    axes.minorticks_off()


def _measured(arms: list[Arm], panel: Panel) -> list[dict]:
    return [
        line for arm in arms for (at, _), of in arm.lines.items() if at == panel and not impossible(of)
        for line in of.values()
    ]  # fmt: skip


def _floors(arms: list[Arm], panel: Panel) -> dict[int, tuple[float, int]]:
    """Returns the share of the best shortcut and its number of texts for each length, from the lines with the most
    texts."""
    out: dict[int, tuple[float, int]] = {}
    for line in sorted(_measured(arms, panel), key=lambda line: (line["length"], line["n"])):
        out[line["length"]] = (max(line["floors"].values()), line["n"])
    return out


def _arm_handles(arms: list[Arm], looks: dict) -> list[Line2D]:
    first = {arm.label: looks[arm.name] for arm in reversed(arms)}
    return [key(label, **{**first[label], "linestyle": "-"}) for label in dict.fromkeys(arm.label for arm in arms)]


def _cross(barred: bool) -> list[Line2D]:
    return [key("impossible", marker="x", linestyle="")] if barred else []


def _length_handles(arms: list[Arm], looks: dict) -> list[Line2D]:
    dashes = {arm.training.length: looks[arm.name]["linestyle"] for arm in arms}
    return [key(f"train length {length}", linestyle=dashes[length], linewidth=1.4) for length in sorted(dashes)]


def legend(figure: Figure, handles: list, columns: int = 2) -> None:
    """Puts a legend below the figure, in as many columns as the labels allow, and makes the figure taller for it."""
    longest = max(len(handle.get_label()) for handle in handles)
    while columns > 1 and longest > _letters(figure, columns):
        columns -= 1
    for handle in handles:
        handle.set_label(wrapped(handle.get_label(), _letters(figure, columns)))
    rows = [handles[i : i + columns] for i in range(0, len(handles), columns)]
    lines = sum(1 + max(handle.get_label().count("\n") for handle in row) for row in rows)
    figure.set_figheight(figure.get_figheight() + 0.235 * lines)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.2)


def _letters(figure: Figure, columns: int) -> int:
    """Returns how many letters fit into one label of a legend."""
    return int(figure.get_figwidth() * 72 / columns / 5.6) - 7


def differences(figure: Figure, rows: list[Difference], panel: Panel, margin: float, footer: str) -> None:
    """Draws the differences, first minus second arm, by evaluation length, in points."""
    axes, rows = figure.subplots(), [row for row in rows if row.panel == panel and not row.refused]
    names = list(dict.fromkeys(f"{row.first.label} − {row.second.label}" for row in rows))
    trained = sorted({row.first.training.length for row in rows}, reverse=True)
    series: dict[tuple, list[Difference]] = {}
    for row in rows:
        name, seeds = f"{row.first.label} − {row.second.label}", row.seeds if len(row.seeds) == 1 else ()
        series.setdefault((name, row.first.training, seeds), []).append(row)
    axes.axhspan(-100 * margin, 100 * margin, color=LIGHT, zorder=0)
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    for number, ((name, training, _), of) in enumerate(series.items()):
        style = {**look(-1 - names.index(name)), "linestyle": DASHES[trained.index(training.length) % len(DASHES)]}
        of = sorted(of, key=lambda row: row.length)
        x = [row.length * 2 ** (0.035 * (number - (len(series) - 1) / 2)) for row in of]
        axes.plot(x, [100 * row.mean for row in of], linewidth=1.2, **style)
        axes.vlines(x, [100 * max(-1, row.low) for row in of], [100 * min(1, row.high) for row in of],
                    color=style["color"], linewidth=1.4)  # fmt: skip
    _lengths(axes, {row.length for row in rows})
    unit = "arms, over seeds" if any(len(row.seeds) > 1 for row in rows) else "single checkpoints, not arms"
    axes.set(title=wrapped(title(panel)), xlabel=f"positions of a text\n{footer}\n{unit}", ylabel="difference, points")
    arms = [key(name, **look(-1 - i)) for i, name in enumerate(names)]
    dashes = [key(f"train length {n}", linestyle=DASHES[trained.index(n) % len(DASHES)]) for n in sorted(trained)]
    band = Patch(color=LIGHT, label=f"margin, ±{100 * margin:g} points")
    legend(figure, [*arms, *dashes, band])


def beside_paper(figure: Figure, arms: list[Arm], mine: list[Arm], panel: Panel, footer: str) -> None:
    """Draws the paper's Figure 1 for a task and, on the same scale, our comparable arms. The axis is the length of the
    longest texts that a run was fine-tuned on."""
    left, right = figure.subplots(1, 2, sharey=True)
    handles = []
    for number, (model, by_length) in enumerate(FIGURE_1[panel.task].items()):
        style = {**look(number), "color": ("#999999", "#000000", "#555555", "#BBBBBB")[number]}
        left.plot(list(by_length), list(by_length.values()), linewidth=1.2, **style)
        handles.append(key(model, **style))
    looks, labels = styles(arms), list(dict.fromkeys(arm.label for arm in mine))
    barred, lengths = False, set(FIGURE_1[panel.task]["GPT-2 APE"])
    for number, label in enumerate(labels):
        of = {arm.training.length: arm for arm in mine if arm.label == label}
        cells = {length: of[length].lines[panel, LENGTH] for length in sorted(of)}
        dodge = 2 ** (0.08 * (number - (len(labels) - 1) / 2))
        barred |= _points(right, cells, dodge, {**looks[of[min(of)].name], "linestyle": "-"})
        lengths |= of.keys()
    _percent(right, barred)
    if not mine:
        right.text(0.5, 0.5, "none yet", color=GREY, ha="center", transform=right.transAxes)
    for axes, name in ((left, "the paper, n unknown"), (right, f"ours, {footer}" if mine else "ours")):
        _lengths(axes, lengths)
        axes.set_title(wrapped(name, 16))
        axes.set_xlabel("train length")
    left.set_ylabel(f"accuracy at length {LENGTH}, %")
    figure.suptitle(wrapped(title(panel)), fontsize=10)
    legend(figure, handles + _arm_handles(mine, looks) + _cross(barred))
