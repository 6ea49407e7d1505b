"""The loss by depth in documents, from lines of eval.py perplexity --documents."""

import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.lines import Line2D

from config import UserError
from reports.drawing import COLOURS, GREY, MARKERS
from stats import clustered_ratio

# a scaling has the same colour in every picture, whatever its factor
COLOUR = dict(zip(("yarn", "pi", "ntk", "pi dynamic", "none", "yarn dynamic", "ntk dynamic"), COLOURS, strict=True))


class Curve(NamedTuple):
    """A run, read in one way, in windows of one length."""

    label: str
    method: str  # of scaling, as COLOUR has it
    trained: bool  # with this scaling, or only read with it
    window: int  # content tokens in a window of the training before any extension
    depth: np.ndarray  # (N,) middles of the buckets
    nats: np.ndarray  # (G, N) a token, of every document: means over the draws of markers


def read(files: list[Path]) -> tuple[list[Curve], np.ndarray, str]:
    """The curves of files of JSON lines in their order, the pieces of every document (G,), and what text it is, for a
    person. Of repeated lines the last counts.

    Raises UserError for what is no such file, and for lines of several texts, which cannot be compared."""
    names = ", ".join(map(str, files))
    try:
        lines = [line for path in files for line in map(json.loads, path.read_text().splitlines())]
        found: dict[tuple, dict[int, dict]] = {}
        for line in (line for line in lines if "document_nats" in line):
            key = tuple(line[name] for name in ("arm", "weights_sha256", "length", "markers"))
            found.setdefault(key, {})[line["draw"]] = line
        cells = [list(draws.values()) for draws in found.values()]
        texts = {(line["content_sha256"], line["bucket"]) for draws in cells for line in draws}
        if len(texts) == 1:
            first, labels = cells[0][0], _labels([draws[0] for draws in cells])
            text = f"{first['tokens']:,} tokens, {first['pieces']} pieces of {first['documents']} documents"
            curves = [_curve(label, draws) for label, draws in zip(labels, cells, strict=True)]
            return curves, np.array(first["document_pieces"]), text
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{names} cannot be read ({type(error).__name__}: {error}): give files that eval.py perplexity wrote."
        ) from error
    if not texts:
        raise UserError(f"{names}: no line is of documents, make some with eval.py perplexity --documents.")
    raise UserError(
        f"{names}: lines are of {len(texts)} texts or buckets, and only the same tokens can be compared: measure all "
        f"with the same dataset, longest length and --bucket, into a new file, --output=FILE.jsonl."
    )


def _curve(label: str, draws: list[dict]) -> Curve:
    first, nats = draws[0], np.mean([line["document_nats"] for line in draws], axis=0)
    method = first["scaling"] if first["scaling"].endswith("dynamic") else first["scaling"].partition(" ")[0]
    if method not in COLOUR or nats.shape[0] != len(first["document_pieces"]):
        raise ValueError(f"{label} is of scaling {first['scaling']!r}, {nats.shape[0]} documents")
    depth = (np.arange(nats.shape[1]) + 0.5) * first["bucket"]
    return Curve(label, method, first["scaling"] == first["trained_scaling"], first["original_content"], depth, nats)


def _labels(lines: list[dict]) -> list[str]:
    """The arm, and as much as tells a line from others of the same arm."""
    labels = [line["arm"] for line in lines]
    for detail in ("windows of {length}", "markers {markers}", "{run}", "step {step}", "weights {weights_sha256:.8}"):
        details = [detail.format_map(line) for line in lines]
        several = Counter(label for label, _ in set(zip(labels, details, strict=True)))
        labels = [f"{label}, {text}" if several[label] > 1 else label
                  for label, text in zip(labels, details, strict=True)]  # fmt: skip
    return labels


def loss_by_depth(figure, curves: list[Curve], pieces: np.ndarray, text: str) -> None:
    """All curves, and below what each has above the first one: documents differ much in their loss, less in that.

    Colour by scaling; solid if trained with it, dashed if read with it; a second curve of the same look has marks."""
    first, panels = curves[0], 2 if len(curves) > 1 else 1
    figure.set_size_inches(7.5, 0.6 + 3.2 * panels + 0.19 * -(-(len(curves) + 1) // 2))
    level, *below = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    seen, handles = Counter(), []
    for curve in curves:
        style = {"color": COLOUR[curve.method], "linestyle": "-" if curve.trained else (0, (4, 1.5)), "linewidth": 1.4}
        if again := seen[curve.method, curve.trained]:
            style |= {"marker": MARKERS[(again - 1) % len(MARKERS)], "markersize": 4, "markevery": 0.06}
        seen[curve.method, curve.trained] += 1
        handles.append(Line2D([], [], label=textwrap.shorten(curve.label, 56, placeholder=" .."), **style))
        _draw(level, curve.depth, curve.nats, pieces, style, band=curve is first)
        if below:
            _draw(below[0], curve.depth, curve.nats - first.nats, pieces, style, band=curve is not first)
    windows = sorted({curve.window for curve in curves})
    for axes in (level, *below):
        for window in windows:
            axes.axvline(window, color=GREY, linestyle=":", linewidth=1.2)
    name = f"window of training, {' and '.join(map(str, windows))} content tokens"
    handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label=name))
    level.set_ylabel("nats a token")
    if below:
        below[0].set_ylabel("difference to the first, nats")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_xlabel(f"content tokens of the document, or its piece, that stand before\n{text}")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=2.6, columnspacing=1.2)


def _draw(axes, depth: np.ndarray, nats: np.ndarray, pieces: np.ndarray, style: dict, band: bool) -> None:
    """nats (G, N) as a mean over the pieces of documents (G,), and its 95 % interval over documents."""
    if band and len(pieces) > 1:
        low, high = np.array([clustered_ratio(pieces * column, pieces) for column in nats.T]).T
        axes.fill_between(depth, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(depth, pieces @ nats / pieces.sum(), **style)
