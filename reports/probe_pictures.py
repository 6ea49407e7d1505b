"""Draws the panels of probe.py positions, attention, patching and residual: small pictures, one for each cell."""

import numpy as np
from matplotlib.lines import Line2D

from nanometa.reports.drawing import COLOURS, GREY, interval_line, key, legend, look, percent_axis, text_count, wrapped
from nanometa.reports.paper import FIGURE_2

ATTENTION_MARKERS = {"causal": "o", "second": "D"}
MEANS = {"causal": "-", "second": (0, (5, 2))}
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
