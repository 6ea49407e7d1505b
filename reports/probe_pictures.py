"""Draws the panels of probe.py positions, attention, patching and residual: small pictures, one for each cell."""

import numpy as np

from nanometa.reports.drawing import COLOURS, GREY, interval_line, key, legend, look, percent_axis, text_count, wrapped
from nanometa.reports.paper import FIGURE_2

ATTENTION_MARKERS = {"causal": "o", "second": "D"}
MEANS = {"causal": "-", "second": (0, (5, 2))}
SITE_NAMES = {
    "mark": "the mark that ends the span", "marks": "all marks", "after": "the token after the mark",
    "ordinary": "an ordinary token", "answer": "the answer in the text", "asked": "the token that predicts the answer",
    "kv_causal": "keys and values of all marks, causal attention",
    "kv_second": "keys and values of all marks, second attention",
    "kv_both": "keys and values of all marks, both attentions",
}  # fmt: skip
PLACE_NAMES = {
    "mark": "the mark", "word": 'the word "mark" in its place', "ordinary": "an ordinary token elsewhere",
}  # fmt: skip

PAPER_STATES = {
    "meta": "the last meta-token", "delimiter": 'the last word "mark"', "last": "the last ordinary token",
    "features": "random features",
}  # fmt: skip


# ----------------------------------------------------------------------------- positions


def draw_positions(figure, lines: list[dict]) -> None:
    placements, names = (list(dict.fromkeys(line[name] for line in lines)) for name in ("placement", "condition"))
    figure.set_figheight(0.9 + 0.22 * len(names) * max(1.4, 0.6 * len(placements)))
    axes, first = figure.subplots(), lines[0]
    looks = [look(i) for i in range(len(placements))]
    axes.axvline(100 * first["chance"], color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    for line in lines:
        number = placements.index(line["placement"])
        y, style = names.index(line["condition"]) + 0.2 * (number - (len(placements) - 1) / 2), looks[number]
        axes.hlines(y, *(100 * end for end in line["interval"]), color=style["color"], linewidth=1.6)
        axes.plot(100 * line["exact"], y, **style)
        if line["condition"] == "full":
            axes.axvline(100 * line["exact"], color=style["color"], linewidth=0.8, alpha=0.6, zorder=1)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-4, 104)
    axes.set_xticks(range(0, 101, 20))
    axes.set_title(f"{first['task'].replace('_', ' ')}, {first['length']} positions")
    axes.set_xlabel(f"exact answers, %\nlevel {first['level']}, 95 % intervals\n{text_count(lines)}")
    legend(figure, [
        *(key(name, linestyle="", **style) for name, style in zip(placements, looks, strict=True)),
        key("full", linewidth=0.8), key("chance", linestyle=":", linewidth=1.2),
    ])  # fmt: skip


# ----------------------------------------------------------------------------- attention


def draw_attention(figure, lines: list[dict]) -> None:
    """Draws boost and drop of every head by layer, and the means of all heads as horizontal lines."""
    figure.set_figheight(5.2)
    placements = list(dict.fromkeys(line["placement"] for line in lines))
    attentions = [name for name in ATTENTION_MARKERS if any(line["attention"] == name for line in lines)]
    panels, layers, first = figure.subplots(2, 1, sharex=True), _layers(lines), lines[0]
    for axes, name in zip(panels, ("boost", "drop"), strict=True):
        axes.axhline(FIGURE_2[name], color="black", linestyle=":", linewidth=1.2, zorder=1)
        for line in lines:
            number = placements.index(line["placement"])
            color, marker = COLOURS[number], ATTENTION_MARKERS[line["attention"]]
            if line["layer"] is None:
                axes.axhline(line[name], color=color, linestyle=MEANS[line["attention"]], linewidth=1.2, zorder=1)
                axes.axhspan(*line[f"{name}_interval"], color=color, alpha=0.15, linewidth=0, zorder=0)
                continue
            x = line["layer"] + 0.6 * ((number + 0.5) / len(placements) - 0.5)
            filled = "full" if line[f"{name}_verdict"].startswith("holds") else "none"
            axes.plot(x, line[name], marker=marker, markersize=4.5, color=color, fillstyle=filled)
            if name == "drop" and "predicted" in line:
                axes.plot(x, line["predicted"], "_", color=color, markersize=8)
    panels[0].set(ylabel="boost of the\nlargest logit")
    panels[1].set(ylabel="drop of entropy,\nnats", xlabel=f"layer; {text_count(lines)}")
    panels[1].set_xticks(_some(layers))
    panels[1].set_xlim(-0.5, layers - 0.5)
    figure.suptitle(f"{first['task'].replace('_', ' ')}, {first['level']}, {first['length']} positions")
    legend(figure, [
        *(key(name, color=color, linewidth=5) for name, color in zip(placements, COLOURS, strict=False)),
        *(key(f"{name} attention: a head, mean", marker=ATTENTION_MARKERS[name], markersize=5, linestyle=MEANS[name])
          for name in attentions),
        key("hollow: not shown to be above 0", marker="o", linestyle="", fillstyle="none"),
        key("drop if only the mark's own logit changed", marker="_", markersize=8, linestyle=""),
        key("the paper's mean", color="black", linestyle=":", linewidth=1.2),
    ])  # fmt: skip


def _layers(lines: list[dict]) -> int:
    return 1 + max(line["layer"] or 0 for line in lines)


def _some(layers: int) -> list[int]:
    """Returns the layers to name on an axis or in a legend: all, or five of many."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, 5))})


# ----------------------------------------------------------------------------- patching and residual, by layer

# field, scale, title, and the style of each baseline
PATCHING = (
    ("kept", 100, "its own answer, %", {"kept_unpatched": "--"}),
    ("donor", 100, "the donor's\nanswer, %", {"donor_unpatched": "--"}),
)
RESIDUAL = (
    ("cosine_centred", 1, "cosine,\ncentred", {"floor_centred": "--"}),
    ("decoded", 100, "named by a linear\nclassifier, %", {"majority": "--", "shuffled": ":"}),
)


def draw_patching(figure, lines: list[dict]) -> None:
    figure.set_figheight(2.9)
    baselines = [key("nothing replaced", linestyle="--", linewidth=1.2)]
    _draw_by_layer(figure, lines, [("", lines)], PATCHING, "site", SITE_NAMES, baselines)


def draw_residual(figure, lines: list[dict]) -> None:
    distances = sorted({line["distance"] for line in lines})
    rows = [(f"{distance} back", [line for line in lines if line["distance"] == distance]) for distance in distances]
    figure.set_figheight(1.1 + 1.25 * len(rows))
    baselines = [key("floors: the token of another text; the most frequent token", linestyle="--", linewidth=1.2),
                 key("floor: shuffled labels", linestyle=":", linewidth=1.2)]  # fmt: skip
    _draw_by_layer(figure, lines, rows, RESIDUAL, "place", PLACE_NAMES, baselines)


def _draw_by_layer(figure, lines: list[dict], rows, panels, field: str, names: dict[str, str], baselines: list) -> None:
    """Draws figures by layer with their intervals: a column for each of `panels`, a row for each of `rows` (label and
    lines), and a series for each of `names` that occurs in `field`."""
    grid = figure.subplots(len(rows), len(panels), sharex=True, sharey="col", squeeze=False)
    present = [name for name in names if any(line[field] == name for line in lines)]
    end = _layers(lines)  # a line about all layers at once is drawn after the last layer
    looks = {name: look(list(names).index(name)) for name in present}  # the same in every picture
    for (label, of), row in zip(rows, grid, strict=True):
        row[0].set_ylabel(label)
        for axes, (value, scale, _, floors) in zip(row, panels, strict=True):
            for i, name in enumerate(present):
                shown, color = [line for line in of if line[field] == name], looks[name]["color"]
                layers = [end if line["layer"] is None else line["layer"] for line in shown]
                x = [layer + 0.08 * (i - (len(present) - 1) / 2) for layer in layers]
                ends = [(line[value], *line[f"{value}_interval"]) for line in shown]
                interval_line(axes, x, ends, {**looks[name], "linewidth": 1.2}, scale)
                for floor, style in floors.items():
                    axes.plot(layers, [scale * line[floor] for line in shown], style, color=color, linewidth=1.2)
            if scale == 100:
                percent_axis(axes)
    for axes, (_, _, title, _) in zip(grid[0], panels, strict=True):
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel("layer")
        at_once = any(line["layer"] is None for line in lines)
        axes.set_xticks([*_some(end), *[end] * at_once], [*map(str, _some(end)), *["all"] * at_once])
    first, mark = lines[0], "" if lines[0]["mark"] == "meta-token" else f" ({lines[0]['mark']})"
    place = f"{first['task'].replace('_', ' ')}, {first['placement']}, {first['length']}"
    cell = wrapped(f"{place}, {first['level']}, {first['question']}{mark}")
    figure.suptitle(f"{cell}\n{wrapped(f'{text_count(lines)}, 95 % intervals')}")
    legend(figure, [*(key(names[name], **looks[name]) for name in present), *baselines])


# ----------------------------------------------------------------------------- the paper's bottleneck, repeated


def draw_paper_bottleneck(figure, lines: list[dict]) -> None:
    """Draws distortion by rate, filled on test texts and hollow on training texts, with intervals over repetitions."""
    axes, first = figure.subplots(), lines[0]
    present = [name for name in PAPER_STATES if any(line["state"] == name for line in lines)]
    looks = {name: look(list(PAPER_STATES).index(name)) for name in present}
    axes.axhline(first["uniform"], color="black", linestyle=":", linewidth=1.2, zorder=1)
    for name in present:
        of, style = (
            sorted((line for line in lines if line["state"] == name), key=lambda line: line["beta"]),
            looks[name],
        )
        ends = [(line["distortion"], *line["distortion_interval"]) for line in of]
        interval_line(axes, [line["rate"] for line in of], ends, style, 1)
        rates, nats = ([line[f"train_{what}"] for line in of] for what in ("rate", "distortion"))
        axes.plot(rates, nats, **{**style, "fillstyle": "none", "linestyle": "--", "linewidth": 1.0})
    axes.set_xscale("symlog", linthresh=20)
    last = max(max(line["rate"], line["train_rate"]) for line in lines)
    ticks = [tick for tick in (0, 5, 10, 20, *(50 * 2**k for k in range(12))) if tick <= 1.1 * max(last, 5)]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set(xlabel="rate R, nats (linear to 20, then logarithmic)", ylabel="distortion D, nats")
    place = f"{first['task'].replace('_', ' ')}, {first['placement']}, {first['length']}, {first['level']}"
    sizes = f"{first['repeats']} repetitions on {first['train_texts']} texts; {text_count(lines)}"
    figure.suptitle(f"{wrapped(place)}\n{wrapped(sizes.removesuffix(' (too few to decide)'))}")
    legend(figure, [
        *(key(PAPER_STATES[name], **looks[name]) for name in present),
        key("on training texts", fillstyle="none", marker="o", linestyle="--"),
        key("guessing: ln V", color="black", linestyle=":", linewidth=1.2),
    ])  # fmt: skip
