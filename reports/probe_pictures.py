"""Draws the panels of probe.py positions, attention, patching and residual: small pictures, one for each cell."""

import numpy as np
from matplotlib import colormaps
from matplotlib.lines import Line2D

from nanometa.reports.drawing import COLOURS, GREY, interval_line, key, legend, look, percent_axis, text_count, wrapped
from nanometa.reports.paper import FIGURE_2

ATTENTION_MARKERS = {"causal": "o", "second": "D"}
SITE_NAMES = {
    "mark": "the mark that ends the span", "marks": "all marks", "after": "the token behind the mark",
    "ordinary": "an ordinary token", "answer": "the answer in the text", "asked": "the token that predicts the answer",
}  # fmt: skip
PLACE_NAMES = {
    "mark": "the mark", "word": 'the word "mark" in its place', "ordinary": "an ordinary token elsewhere",
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
    labels = [name.replace("_", " ").replace("no position ", "no position\n") for name in names]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
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
    placements = list(dict.fromkeys(line["placement"] for line in lines))
    height = 0.55 + 0.42 * len(placements)
    figure.set_figheight(2 * height + 2.9)
    boost, drop, explained = figure.subplots(3, 1, height_ratios=[height, height, 2.4])
    layers = _layers(lines)
    for axes, name, label in ((boost, "boost", "boost of the largest logit"), (drop, "drop", "drop of entropy, nats")):
        _draw_heads(axes, lines, placements, name)
        axes.set_xlabel(label)
        axes.set_yticks(range(len(placements)), placements)
        axes.set_ylim(len(placements) - 0.5, -0.5)
    shown = [line for line in lines if line["layer"] is not None and "predicted" in line]
    for line in shown:
        explained.plot(line["predicted"], line["drop"], marker=ATTENTION_MARKERS[line["attention"]], markersize=4.5,
                       color=_layer_colour(line["layer"], layers), alpha=0.85)  # fmt: skip
    ends = [0.0, *(line[name] for line in shown for name in ("predicted", "drop"))]
    low, high = min(ends) - 0.1, max(ends) + 0.1
    explained.plot([low, high], [low, high], color=GREY, linewidth=1, zorder=1)
    explained.set(xlabel=f"drop if only the mark's own logit\nchanged, nats\n{text_count(lines)}",
                  ylabel="drop measured, nats",
                  title="is it the boost of the mark?\nOn the line: yes; one dot per head")  # fmt: skip
    first = lines[0]
    figure.suptitle(f"{first['task'].replace('_', ' ')}, {first['level']}, {first['length']} positions")
    legend(figure, [
        *(key(f"layer {i}", color=_layer_colour(i, layers), marker="s", linestyle="") for i in _some(layers)),
        *(key(f"a head of {name} attention", marker=marker, linestyle="", markersize=5)
          for name, marker in ATTENTION_MARKERS.items() if any(line["attention"] == name for line in lines)),
        key("hollow: not shown to be above 0", marker="o", linestyle="", fillstyle="none"),
        key("mean of all heads, 95 %", color="black", marker="|", markersize=11, markeredgewidth=2, linestyle=""),
        key("the paper's mean", color="black", linestyle=":", linewidth=1.2),
    ])  # fmt: skip


def _draw_heads(axes, lines: list[dict], placements: list[str], name: str) -> None:
    axes.axvline(0, color=GREY, linewidth=1, zorder=1)
    axes.axvline(FIGURE_2[name], color="black", linestyle=":", linewidth=1.2, zorder=1)
    attentions = [each for each in ATTENTION_MARKERS if any(line["attention"] == each for line in lines)]
    layers, room = _layers(lines), 0.76 / len(attentions)  # a row holds its attentions, each of them its layers
    for line in lines:
        y = placements.index(line["placement"]) - 0.38 + room * (attentions.index(line["attention"]) + 0.5)
        if line["layer"] is None:
            axes.hlines(y, *line[f"{name}_interval"], color="black", linewidth=1.6, zorder=4)
            axes.plot(line[name], y, "|", color="black", markersize=13, markeredgewidth=2, zorder=5)
            continue
        y += 0.8 * room * ((line["layer"] + 0.5) / layers - 0.5)
        filled = "full" if line[f"{name}_verdict"].startswith("holds") else "none"
        axes.plot(line[name], y, marker=ATTENTION_MARKERS[line["attention"]], markersize=4.5, alpha=0.85,
                  color=_layer_colour(line["layer"], layers), fillstyle=filled)  # fmt: skip


def _layers(lines: list[dict]) -> int:
    return 1 + max(line["layer"] or 0 for line in lines)


def _layer_colour(layer: int, layers: int):
    return colormaps["viridis"](0.92 * layer / max(1, layers - 1))


def _some(layers: int) -> list[int]:
    """Returns the layers to name on an axis or in a legend: all, or five of many."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, 5))})


# ----------------------------------------------------------------------------- patching and residual, by layer


def draw_patching(figure, lines: list[dict]) -> None:
    figure.set_figheight(4.4)
    kept, donor = panels = figure.subplots(2, 1, sharex=True)
    for axes, share in zip(panels, ("kept", "donor"), strict=True):
        axes.axhline(100 * lines[0][f"{share}_unpatched"], color=GREY, linestyle="--", linewidth=1, zorder=1)
        for number, series, dodge in _series(lines, "site", SITE_NAMES, 0.06):
            _draw_by_layer(axes, series, share, 100, number, dodge)
        percent_axis(axes)
    donor.set_xticks(_some(_layers(lines)))
    donor.set_xlim(-0.5, _layers(lines) - 0.5)
    kept.set(title=_cell_title(lines), ylabel="its own answer, %")
    note = wrapped(f"{text_count(lines)}, 95 % intervals")
    donor.set(xlabel=f"layer that the replaced state enters\n{note}", ylabel="the donor's answer, %")
    legend(figure, [*_series_keys(lines, "site", SITE_NAMES), key("nothing replaced", linestyle="--", linewidth=1)])


def draw_residual(figure, lines: list[dict]) -> None:
    distances = sorted({line["distance"] for line in lines})
    figure.set_figheight(1.1 + 1.25 * len(distances))
    panels = figure.subplots(len(distances), 2, sharex=True, sharey="col", squeeze=False)
    for distance, (cosine, decoded) in zip(distances, panels, strict=True):
        shown = [line for line in lines if line["distance"] == distance]
        cosine.axhline(0, color=GREY, linewidth=1, zorder=1)
        for number, series, dodge in _series(shown, "place", PLACE_NAMES, 0.1):
            _draw_by_layer(cosine, series, "cosine_centred", 1, number, dodge)
            _draw_by_layer(decoded, series, "decoded", 100, number, dodge)
            for axes, floor, scale, style in (
                (cosine, "floor_centred", 1, "--"), (decoded, "majority", 100, "--"), (decoded, "shuffled", 100, ":")
            ):  # fmt: skip
                axes.plot([line["layer"] for line in series], [scale * line[floor] for line in series],
                          color=COLOURS[number], linestyle=style, linewidth=1.2, zorder=1)  # fmt: skip
        percent_axis(decoded)
        decoded.set_xticks(_some(_layers(lines)))
        cosine.set_ylabel(f"{distance} back")
    panels[0, 0].set_title("cosine,\ncentred")
    panels[0, 1].set_title("named by a linear\nclassifier, %")
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    figure.suptitle(f"{_cell_title(lines)}\n{wrapped(f'{text_count(lines)}, 95 % intervals')}")
    legend(figure, [
        *_series_keys(lines, "place", PLACE_NAMES),
        key("floors: another text's; commonest token", linestyle="--", linewidth=1.2),
        key("floor: shuffled labels", linestyle=":", linewidth=1.2),
    ], columns=1)  # fmt: skip


def _cell_title(lines: list[dict]) -> str:
    """Returns the title of a panel: its cell, and its mark if that is not a meta-token."""
    first = lines[0]
    mark = "" if first["mark"] == "meta-token" else f" ({first['mark']})"
    place = f"{first['task'].replace('_', ' ')}, {first['placement']}, {first['length']}"
    return wrapped(f"{place}, {first['level']}, {first['question']}{mark}")


def _series(lines: list[dict], field: str, names: dict[str, str], step: float) -> list[tuple[int, list[dict], float]]:
    """Returns one series for each of `names` that occurs in `field`: its number (which sets its color), its lines, and
    its horizontal shift, which keeps the series of a layer apart."""
    present = [name for name in names if any(line[field] == name for line in lines)]
    return [
        (list(names).index(name), [line for line in lines if line[field] == name], step * (i - (len(present) - 1) / 2))
        for i, name in enumerate(present)
    ]


def _series_keys(lines: list[dict], field: str, names: dict[str, str]) -> list[Line2D]:
    return [key(list(names.values())[number], **look(number)) for number, _, _ in _series(lines, field, names, 0)]


def _draw_by_layer(axes, lines: list[dict], name: str, scale: float, number: int, dodge: float) -> None:
    """Draws a figure by layer with its interval."""
    ends = [(line[name], *line[f"{name}_interval"]) for line in lines]
    interval_line(axes, [line["layer"] + dodge for line in lines], ends, {**look(number), "linewidth": 1.2}, scale)
