"""Draws the figure of a study: the endpoint of every run by length, and the paired differences with their margins."""

import textwrap

import numpy as np
from matplotlib.figure import Figure

from nanometa.reports.drawing import COLOURS, GREY, LIGHT, png

CAPTION = """Left: a small dot is a run, its mean share of exact answers over tasks and placements; lines join the means
of an arm. Arms are shifted sideways. Right: a grey dot is the difference of two runs of one seed, the diamond their
mean, the bar its 95 % interval. Grey band: margin within which arms are equal. Dashed: what the gate must exceed."""


def study_picture(curves: dict[str, dict[int, dict[int, float]]], rows: list[dict], title: str) -> bytes:
    """Returns the figure as PNG.

    curves: share of exact answers by name of the arm, length and seed.
    rows: for each comparison its name, differences by seed, mean, low, high, margin, the effect that it must exceed
    ("above", 0 = none) and its verdict, all in points."""
    return png(_draw, curves, rows, title, width=11)


def _draw(figure: Figure, curves: dict, rows: list[dict], title: str) -> None:
    figure.set_figheight(max(4.2, 0.62 * len(rows) + 2.2))
    figure.suptitle(title)
    figure.supxlabel(textwrap.fill(" ".join(CAPTION.split()), 150), fontsize=8, color=GREY)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_curves(left, {arm: curve for arm, curve in curves.items() if any(curve.values())})
    _draw_differences(right, rows)


def _draw_curves(axes, curves: dict) -> None:
    """Draws a dot for every run, and a line through the means of each arm."""
    lengths = sorted({length for curve in curves.values() for length in curve})
    for number, (arm, curve) in enumerate(curves.items()):
        color, shift = (*COLOURS, GREY)[number % (len(COLOURS) + 1)], (number - (len(curves) - 1) / 2) * 0.05
        means, runs = [], max(map(len, curve.values()))
        for place, length in enumerate(lengths):
            values = 100 * np.array(list(curve.get(length, {}).values()))
            axes.plot(np.full(len(values), place + shift), values, "o", color=color, markersize=3, alpha=0.45, mew=0)
            means.append(values.mean() if len(values) else np.nan)
        label = f"{arm}, {runs} run{'s' * (runs != 1)}"
        axes.plot(np.arange(len(lengths)) + shift, means, "-", color=color, linewidth=1.4, label=label)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_xlabel("positions of the text (the first length was trained)")
    axes.set_ylabel("exact answers, %")
    axes.set_ylim(-2, 102)
    if curves:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2, fontsize=8)


def _draw_differences(axes, rows: list[dict]) -> None:
    """Draws a dot for the difference of every pair, the interval of the mean, and the margin as a grey band."""
    for place, row in enumerate(rows):
        y = len(rows) - 1 - place
        if row["above"]:
            axes.plot([row["above"]] * 2, [y - 0.34, y + 0.34], "--", color="black", linewidth=1.2)
        else:
            axes.fill_betweenx([y - 0.34, y + 0.34], -row["margin"], row["margin"], color=LIGHT, linewidth=0)
        spread = np.linspace(-0.2, 0.2, len(row["differences"])) if row["differences"] else []
        axes.plot(row["differences"], y + np.array(spread), "o", color=GREY, markersize=3, alpha=0.6, mew=0)
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [y, y], "-", color=COLOURS[0], linewidth=2.5)
            axes.plot([row["mean"]], [y], "D", color=COLOURS[0], markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{textwrap.fill(row['name'], 46)}\n{row['verdict']}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference, points")
