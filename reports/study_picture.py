"""Draws the figure of a study: the endpoint of every run by length, and the paired differences with their margins."""

import numpy as np
from matplotlib.figure import Figure

from nanometa.reports.drawing import COLOURS, GREY, png


def study_picture(curves: dict[str, dict[int, dict[int, float]]], rows: list[dict], title: str) -> bytes:
    """Returns the figure as PNG.

    curves: share of exact answers by name of the arm, length and seed.
    rows: for each comparison its name, differences by seed, mean, low, high, margin and verdict, all in points."""
    return png(_draw, curves, rows, title, width=10.5)


def _draw(figure: Figure, curves: dict, rows: list[dict], title: str) -> None:
    figure.set_figheight(max(3.4, 0.5 * len(rows) + 1.6))
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_curves(left, curves)
    _draw_differences(right, rows)


def _draw_curves(axes, curves: dict) -> None:
    """Draws a dot for every run, and a line through the means of each arm."""
    lengths = sorted({length for curve in curves.values() for length in curve})
    for number, (arm, curve) in enumerate(curves.items()):
        color, shift = COLOURS[number % len(COLOURS)], (number - (len(curves) - 1) / 2) * 0.09
        means = []
        for place, length in enumerate(lengths):
            values = 100 * np.array(list(curve.get(length, {}).values()))
            axes.plot(np.full(len(values), place + shift), values, "o", color=color, markersize=3, alpha=0.45, mew=0)
            means.append(values.mean() if len(values) else np.nan)
        axes.plot(np.arange(len(lengths)) + shift, means, "-", color=color, linewidth=1.4, label=arm)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_xlabel("positions of the text (the first length was trained)")
    axes.set_ylabel("exact answers, %")
    axes.set_ylim(-2, 102)
    axes.legend(loc="lower left", fontsize=8)


def _draw_differences(axes, rows: list[dict]) -> None:
    """Draws a dot for the difference of every pair, the interval of the mean, and the margin as a grey band."""
    for place, row in enumerate(rows):
        y = len(rows) - 1 - place
        axes.fill_betweenx([y - 0.32, y + 0.32], -row["margin"], row["margin"], color="#DDDDDD", linewidth=0)
        spread = np.linspace(-0.2, 0.2, len(row["differences"])) if row["differences"] else []
        axes.plot(row["differences"], y + np.array(spread), "o", color=GREY, markersize=3, alpha=0.5, mew=0)
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [y, y], "-", color=COLOURS[0], linewidth=2.5)
            axes.plot([row["mean"]], [y], "D", color=COLOURS[0], markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['name']}\n{row['verdict']}" for row in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("difference by pair of seeds, points; band: margin; bar: 95 % interval of the mean")
