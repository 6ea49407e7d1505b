"""Draws the loss by depth in documents, from lines of eval.py perplexity --documents."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from nanometa.common.errors import UserError
from nanometa.common.statistics import clustered_ratio
from nanometa.reports.drawing import COLOURS, GREY, MARKERS, legend, png, wrapped
from nanometa.reports.lines import check_facts
from nanometa.reports.markup import table
from nanometa.reports.page import Section

# a scaling has the same colour in every picture, whatever its factor
COLOUR = dict(zip(("yarn", "pi", "ntk", "pi dynamic", "none", "yarn dynamic", "ntk dynamic"), COLOURS, strict=True))


class Curve(NamedTuple):
    """The loss by depth of one run, read in one way, in windows of one length."""

    label: str
    method: str  # scaling method, a key of COLOUR
    trained: bool  # whether the run was trained with this scaling, or only read with it
    length: int  # positions of a window
    window: int  # content tokens in a training window before any extension
    depth: np.ndarray  # (N,) centers of the buckets
    nats: np.ndarray  # (G, N) per token of every document, averaged over the draws of markers


def read(files: list[Path]) -> tuple[list[Curve], np.ndarray, str]:
    """Returns curves() of the JSON lines in the files. Raises UserError if a file cannot be read, or if the lines are
    about several texts, which cannot be compared."""
    names = ", ".join(map(str, files))
    try:
        lines = [line for path in files for line in map(json.loads, path.read_text().splitlines())]
        lines = [line for line in lines if "document_nats" in line]
        texts = {text_of(line) for line in lines}
        if len(texts) == 1:
            return curves(lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{names} cannot be read ({type(error).__name__}: {error}): give files that eval.py perplexity wrote."
        ) from error
    if not texts:
        raise UserError(f"{names} have no line about documents: measure some with eval.py perplexity --documents.")
    raise UserError(
        f"{names} have lines about {len(texts)} texts or buckets, but only the same tokens can be compared: measure "
        f"all with the same dataset, longest length and --bucket, into a new file, --output=FILE.jsonl."
    )


def text_of(line: dict) -> tuple[str, int]:
    """Returns a key that is equal for lines that score the same tokens in the same buckets."""
    return line["content_sha256"], line["bucket"]


def curves(lines: list[dict]) -> tuple[list[Curve], np.ndarray, str]:
    """Returns the curves of lines about one text, the number of pieces of every document (G,), and a description of the
    text. If lines repeat, the last one counts. Raises ValueError, KeyError or TypeError for damaged lines."""
    found: dict[tuple, dict[int, dict]] = {}
    for line in lines:
        key = tuple(line[name] for name in ("arm", "weights_sha256", "length", "markers"))
        found.setdefault(key, {})[line["draw"]] = line
    cells = [list(draws.values()) for draws in found.values()]
    first, labels = cells[0][0], _labels([draws[0] for draws in cells])
    text = f"{first['tokens']:,} tokens, {first['pieces']} pieces of {first['documents']} documents"
    made = [_curve(label, draws) for label, draws in zip(labels, cells, strict=True)]
    return made, np.array(first["document_pieces"]), text


def _curve(label: str, draws: list[dict]) -> Curve:
    first, nats = draws[0], np.mean([line["document_nats"] for line in draws], axis=0)
    method = first["scaling"] if first["scaling"].endswith("dynamic") else first["scaling"].partition(" ")[0]
    if method not in COLOUR or nats.shape[0] != len(first["document_pieces"]):
        raise ValueError(f"{label} is of scaling {first['scaling']!r}, {nats.shape[0]} documents")
    depth = (np.arange(nats.shape[1]) + 0.5) * first["bucket"]
    trained = first["scaling"] == first["trained_scaling"]
    return Curve(label, method, trained, first["length"], first["original_content"], depth, nats)


def _labels(lines: list[dict]) -> list[str]:
    """Returns a label of each line: its arm, with the details that distinguish it from other lines of the same arm."""
    labels = [line["arm"] for line in lines]
    for detail in ("windows of {length}", "markers {markers}", "{run}", "step {step}", "weights {weights_sha256:.8}"):
        details = [detail.format_map(line) for line in lines]
        several = Counter(label for label, _ in set(zip(labels, details, strict=True)))
        labels = [f"{label}, {text}" if several[label] > 1 else label
                  for label, text in zip(labels, details, strict=True)]  # fmt: skip
    return labels


def loss_by_depth(figure, curves: list[Curve], pieces: np.ndarray, text: str) -> None:
    """Draws all curves, and below them their differences from the first one. Documents vary much less in these
    differences than in their loss.

    The color shows the scaling, and is lighter for shorter windows. A solid line is of a run trained with this scaling,
    a dashed line of a run only read with it. A second curve of the same look has markers. The depth axis is linear
    because most of it lies beyond the window."""
    first, panels = curves[0], 2 if len(curves) > 1 else 1
    figure.set_figheight(0.7 + 2.7 * panels)
    level, *below = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    seen, handles = Counter(), []
    lengths = sorted({curve.length for curve in curves}, reverse=True)
    step = 0.6 / max(1, len(lengths) - 1)
    for curve in curves:
        colour = lighter(COLOUR[curve.method], step * lengths.index(curve.length))
        style = {"color": colour, "linestyle": "-" if curve.trained else (0, (4, 1.5)), "linewidth": 1.4}
        if again := seen[curve.method, curve.trained, curve.length]:
            style |= {"marker": MARKERS[(again - 1) % len(MARKERS)], "markersize": 4, "markevery": 0.06}
        seen[curve.method, curve.trained, curve.length] += 1
        handles.append(Line2D([], [], label=curve.label, **style))
        _draw(level, curve.depth, curve.nats, pieces, style, band=curve is first)
        if below:
            _draw(below[0], curve.depth, curve.nats - first.nats, pieces, style, band=curve is not first)
    windows = sorted({curve.window for curve in curves})
    for axes in (level, *below):
        for window in windows:
            axes.axvline(window, color=GREY, linestyle=":", linewidth=1.2)
    name = f"training window, {' and '.join(map(str, windows))} content tokens"
    handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label=name))
    narrow = figure.get_figwidth() < 6
    level.set_ylabel("nats a token")
    level.set_title("loss; band: 95 % of the first")
    if below:
        below[0].set_ylabel("more nats per token")
        below[0].set_title(wrapped(f"loss above that of: {first.label}; bands: 95 %", 40 if narrow else 90))
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5 if narrow else 10)
    before = "content tokens that precede in the document, or in its piece"
    axes.set_xlabel(wrapped(before, 40 if narrow else 90) + "\n" + wrapped(text, 40 if narrow else 90))
    legend(figure, handles)


def lighter(colour: str, share: float) -> tuple[float, float, float]:
    """Returns a color mixed with this share of white."""
    return tuple(1 - (1 - part) * (1 - share) for part in to_rgb(colour))


def _draw(axes, depth: np.ndarray, nats: np.ndarray, pieces: np.ndarray, style: dict, band: bool) -> None:
    """Draws nats (G, N) as a mean over the pieces of documents (G,), and if `band` its 95 % interval over documents."""
    if band and len(pieces) > 1:
        low, high = np.array([clustered_ratio(pieces * column, pieces) for column in nats.T]).T
        axes.fill_between(depth, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(depth, pieces @ nats / pieces.sum(), **style)


# ----------------------------------------------------------------------------- the section of a report

FIELDS = {
    "length": (int,), "markers": (str,), "draw": (int,), "loss": (float,), "bits_per_byte": (float,),
    "perplexity": (float,), "tokens": (int,), "dataset": (str,), "content_sha256": (str,),
}  # fmt: skip
OF_DOCUMENTS = {
    "document_nats": (list,), "document_pieces": (list,), "documents": (int,), "pieces": (int,), "bucket": (int,),
    "original_content": (int,), "scaling": (str,), "trained_scaling": (str,),
}  # fmt: skip


def section() -> Section:
    return Section("perplexity", _check, _key, body)


def _check(line: dict) -> None:
    documents = "document_nats" in line
    check_facts(line, FIELDS | OF_DOCUMENTS if documents else FIELDS if "impossible" not in line else {})
    if documents:
        curves([line])


def _key(line: dict) -> tuple:
    names = ("run", "weights_sha256", "arm", "content_sha256", "length", "stride", "markers", "draw", "bucket")
    return tuple(line.get(name) for name in names)


def body(page, lines: list[dict]) -> str:
    """Returns a picture for each text of documents, and a table with the loss of every condition."""
    texts: dict[tuple, list[dict]] = {}
    for line in lines:
        if "document_nats" in line:
            texts.setdefault(text_of(line), []).append(line)
    figures = []
    for number, of in enumerate(texts.values(), 1):
        what = "loss by depth in documents; the means are in the table below"
        figures.append(page.picture(f"depth_{number}.png", what, png(loss_by_depth, *curves(of)), of))
    cells: dict[tuple, list[dict]] = {}
    for line in lines:
        if "impossible" not in line:
            cells.setdefault((*_key(line)[:7], "document_nats" in line), []).append(line)
    groups: dict[str, list[list]] = {}
    for of in cells.values():
        first = of[0]
        pieces = f", {first['pieces']} pieces of {first['documents']} documents" if "document_nats" in first else ""
        name = f"{first['dataset']}, {first['tokens']:,} content tokens{pieces} ({first['content_sha256'][:8]})"
        losses, bits = ([line[key] for line in of] for key in ("loss", "bits_per_byte"))
        spread = f"{min(losses):.4f} .. {max(losses):.4f}" if len(of) > 1 else "–"
        groups.setdefault(name, []).append(
            [first["arm"], first["run"], first["length"], first["markers"], f"{np.mean(losses):.4f}", spread,
             f"{np.exp(np.mean(losses)):.2f}", f"{np.mean(bits):.4f}", len(of), first["seed"],
             page.links([line["command"] for line in of])]
        )  # fmt: skip
    head = ["arm", "run", "window", "markers", "nats a token", "over draws", "perplexity", "bits per byte", "draws",
            "seed", "command"]  # fmt: skip
    return f"""<h2 id="lengths">Longer windows: validation text</h2>
<p>The loss in windows of several lengths, read as trained or with another scale of the positions. Where documents were
cut into pieces of the longest window, all conditions score the same tokens, and the picture shows their loss by depth,
the number of tokens that precede in the document. Documents differ more in their loss than conditions do, so compare
the differences in the lower half. Bands are 95 % over documents. Rows below one heading are about the same text.</p>
<div>{"".join(figures)}</div>
{table(head, groups, (0, 1, 3, 10))}"""
