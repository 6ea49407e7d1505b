"""Draws the figure of a study: the figure of every run, and the paired differences with their margins."""

import functools
import textwrap
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from nanometa.reports.drawing import COLOURS, DASHES, GREY, LIGHT, png

DOTS = {
    "curves": "Left: a small dot is a run, its mean share of exact answers over tasks and placements; lines join the "
    "means of an arm. Arms are shifted sideways.",
    "levels": "Left: a small dot is a run, the diamond the mean of its arm.",
}
DIFFERENCES = """Right: a grey dot is the difference of two runs of one seed, the diamond their mean, the bar its 95 %
interval. Grey band: margin within which arms are equal. Dashed: what the gate must exceed."""


def study_picture(curves: dict[str, dict[int, dict[int, float]]], rows: list[dict], title: str) -> bytes:
    """Returns the figure of a study with an endpoint by length as PNG.

    curves: share of exact answers by name of the arm, length and seed.
    rows: for each comparison its name, differences by seed, mean, low, high, margin, the effect that it must exceed
    ("above", 0 = none) and its verdict, all in points."""
    known = {arm: curve for arm, curve in curves.items() if any(curve.values())}
    return png(_draw, functools.partial(_draw_curves, curves=known), rows, "points", "curves", title, width=11)


def levels_picture(levels: dict[str, list[float]], rows: list[dict], unit: str, title: str) -> bytes:
    """Returns the figure of a study of one figure as PNG. levels: its values by name of the arm. rows, unit: as in
    study_picture."""
    return png(_draw, functools.partial(_draw_levels, levels=levels, unit=unit), rows, unit, "levels", title, width=11)


def curves_picture(panels: list[tuple[str, str, str, dict]], title: str) -> bytes:
    """Returns curves side by side as PNG. panels: name, name of the horizontal axis, unit, and the values by name of
    the arm, place on the horizontal axis and seed."""
    return png(_draw_panels, panels, title, width=5.5 * len(panels))


def _draw_panels(figure: Figure, panels: list, title: str) -> None:
    most = max(len(values) for *_, values in panels)
    figure.set_figheight(3.6 + 0.2 * most)
    figure.suptitle(title)
    figure.supxlabel("A small dot is a run; lines join the means of an arm.", fontsize=8, color=GREY)
    for axes, (name, x, unit, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (arm, curve) in enumerate(values.items()):
            color, places = (*COLOURS, GREY)[number % (len(COLOURS) + 1)], sorted(curve)
            for at in places:
                runs = list(curve[at].values())
                axes.plot([at] * len(runs), runs, "o", color=color, markersize=3, alpha=0.45, mew=0)
            means = [np.mean(list(curve[at].values())) for at in places]
            style = {"linestyle": DASHES[number // len(COLOURS) % len(DASHES)], "marker": "D", "markersize": 3.5}
            axes.plot(places, means, color=color, linewidth=1.4, label=arm, **style)
        axes.set(xlabel=x, ylabel=unit)
        axes.set_title(textwrap.fill(name, 60), fontsize=9)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8)


def _draw(figure: Figure, draw_left: Callable, rows: list[dict], unit: str, kind: str, title: str) -> None:
    figure.set_figheight(max(4.2, 0.62 * len(rows) + 2.2))
    figure.suptitle(title)
    caption = f"{DOTS[kind]} {' '.join(DIFFERENCES.split())}"
    if not any(row["above"] for row in rows):
        caption = caption.removesuffix(" Dashed: what the gate must exceed.")
    figure.supxlabel(textwrap.fill(caption, 150), fontsize=8, color=GREY)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    draw_left(left)
    _draw_differences(right, rows, unit)


def _draw_levels(axes, levels: dict[str, list[float]], unit: str) -> None:
    """Draws a dot for every run, and a diamond for the mean of each arm."""
    for place, values in enumerate(reversed(levels.values())):
        spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, place + spread, "o", color=GREY, markersize=3, alpha=0.6, mew=0)
        axes.plot([np.mean(values)], [place], "D", color=COLOURS[0], markersize=5)
    axes.set_yticks(range(len(levels)), list(reversed(levels)), fontsize=8)
    axes.set_ylim(-0.6, len(levels) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)


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


def _draw_differences(axes, rows: list[dict], unit: str) -> None:
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
    axes.set_xlabel(f"difference, {unit}")
