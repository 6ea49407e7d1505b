"""The loss by position in documents, from lines of eval.py perplexity --documents."""

import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.lines import Line2D

from config import UserError
from reports.drawing import COLOURS, GREY, MARKERS

# a scaling has the same colour in every picture, whatever its factor
COLOUR = dict(zip(("yarn", "pi", "ntk", "pi dynamic", "none", "yarn dynamic", "ntk dynamic"), COLOURS, strict=True))


class Curve(NamedTuple):
    """A run, read in one way, in windows of one length: means over its draws."""

    label: str
    scaling: str
    trained: bool  # with this scaling, or only read with it
    window: int  # of the training before any extension
    rows: np.ndarray  # (N, 4): middle of a bucket, nats a token, ends of the interval over documents (nan: no interval)


def read(paths: list[Path]) -> tuple[list[Curve], str]:
    """The curves of files of JSON lines, as they come, and what text they are of. Of repeated lines the last counts.

    Raises UserError for what is no such file, and for lines of several texts, which cannot be compared."""
    found: dict[tuple, dict[int, dict]] = {}
    for path in paths:
        try:
            for line in map(json.loads, path.read_text().splitlines()):
                if "documents" in line and "by_position" in line:
                    key = (line[name] for name in ("arm", "weights_sha256", "length", "markers", "bucket"))
                    found.setdefault(tuple(key), {})[line["draw"]] = line
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} has no readable lines ({type(error).__name__}: {error}): give files that eval.py perplexity "
                f"wrote."
            ) from error
    lines = [list(draws.values()) for draws in found.values()]
    if not lines:
        raise UserError(f"{paths[0]} has no lines of documents: make some, eval.py perplexity --documents.")
    if len({line["content_sha256"] for draws in lines for line in draws}) > 1:
        raise UserError(
            f"the lines of {', '.join(map(str, paths))} are of several texts: measure all with the same longest length "
            f"and documents, into a new file, --output=FILE.jsonl."
        )
    first = lines[0][0]
    text = f"{first['tokens']:,} tokens, {first['pieces']} pieces of {first['documents']} documents"
    labels = _labels([draws[0] for draws in lines])
    return [_curve(label, draws) for label, draws in zip(labels, lines, strict=True)], text


def _curve(label: str, draws: list[dict]) -> Curve:
    first, at = draws[0], {}
    for start, _, *figures in (row for line in draws for row in line["by_position"]):
        at.setdefault(start + first["bucket"] / 2, []).append(figures)
    rows = [[middle, *np.array(figures, dtype=float).mean(axis=0)] for middle, figures in sorted(at.items())]
    trained = first["scaling"] == first["trained_scaling"]
    return Curve(label, first["scaling"], trained, first["original_block_size"], np.array(rows))


def _labels(lines: list[dict]) -> list[str]:
    """The arm, and as much as tells a line from others of the same arm."""
    labels = [line["arm"] for line in lines]
    for detail in ("windows of {length}", "markers {markers}", "{run}", "step {step}", "weights {weights_sha256:.8}"):
        details = [detail.format_map(line) for line in lines]
        several = Counter(label for label, _ in set(zip(labels, details, strict=True)))
        labels = [f"{label}, {text}" if several[label] > 1 else label
                  for label, text in zip(labels, details, strict=True)]  # fmt: skip
    return labels


def loss_by_position(figure, curves: list[Curve], text: str) -> None:
    """Colour by scaling; solid if trained with it, dashed if read with it; the second curve of a look gets a marker."""
    rows = -(-(len(curves) + 1) // 2)
    figure.set_size_inches(7.5, 4.2 + 0.19 * rows)
    axes, seen, handles = figure.subplots(), Counter(), []
    for curve in curves:
        x, nats, low, high = curve.rows.T
        look = (curve.scaling if curve.scaling.endswith("dynamic") else curve.scaling.split()[0], curve.trained)
        style = {"color": COLOUR[look[0]], "linestyle": "-" if curve.trained else (0, (4, 1.5)), "linewidth": 1.4}
        if seen[look]:
            style |= {"marker": MARKERS[(seen[look] - 1) % len(MARKERS)], "markersize": 4, "markevery": 0.06}
        seen[look] += 1
        axes.fill_between(x, low, high, color=style["color"], alpha=0.1, linewidth=0)
        handles += axes.plot(x, nats, label=textwrap.shorten(curve.label, 56, placeholder=" .."), **style)
    windows = sorted({curve.window for curve in curves})
    for window in windows:
        axes.axvline(window, color=GREY, linestyle=":", linewidth=1.2)
    name = f"window of training, {' and '.join(map(str, windows))}"
    handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label=name))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set(xlabel=f"position in a piece of a document\n{text}", ylabel="nats a token")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=2.6, columnspacing=1.2)
