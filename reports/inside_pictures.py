"""The pictures of the probes that look inside, attention, residual and patching: one of all lines of a checkpoint, and
small ones, of a cell or so, for a page."""

import numpy as np
from matplotlib import colormaps
from matplotlib.lines import Line2D

from nanometa.reports.drawing import COLOURS, GREY, LIGHT, MARKERS, legend, png, wrapped
from nanometa.reports.paper import FIGURE_2
from nanometa.reports.position_pictures import run_title, text_count
from nanometa.reports.theorem import theorem_curves

LOOKS = {"causal": "o", "second": "D"}  # of attentions


def attention_picture(lines: list[dict]) -> bytes:
    """Lines of probe.py attention, of one checkpoint, as a PNG."""
    return png(_attention, lines)


def cell_of(line: dict) -> tuple:
    return tuple(line[name] for name in ("task", "placement", "length", "level", "question"))


def name_of(cell: tuple, lines: list[dict]) -> str:
    """A cell, its level and question where lines have several, and what marks in it where that is no meta-token."""
    task, placement, length, *rest = cell
    several = [len({cell_of(line)[i] for line in lines}) > 1 for i in (3, 4)]
    told_too = "".join(f", {value}" for value, differs in zip(rest, several, strict=True) if differs)
    mark = next(line["mark"] for line in lines if cell_of(line) == cell)
    shown = "" if mark == "meta-token" else f"\n({mark})"
    return f"{task.replace('_', ' ')}, {placement}, {length}{told_too}{shown}"


def _attention(figure, lines: list[dict]) -> None:
    """A row a cell: boost and drop of every head, weight on the marks, and how often the theorem applies. Below,
    whether the mark's own boost explains the drop, and, small, where the theorem is true."""
    cells = list(dict.fromkeys(map(cell_of, lines)))
    heights = [2.0 + max(2.0, len(cells) * (0.45 + 0.1 * _layers(lines))), 2.5]
    figure.set_size_inches(11, sum(heights))
    ours, below = figure.subfigures(2, 1, height_ratios=heights)
    panels = ours.subplots(1, 4, sharey=True, width_ratios=(1.5, 1.5, 1, 1))
    colour = _layer_colours(_layers(lines))
    for axes, name, label in zip(
        panels, ("boost", "drop", "on_marks", "applies"),
        ("boost of the largest logit", "drop of entropy, nats", "weight on marks, %", "theorem applies,\n% of queries"),
        strict=True,
    ):  # fmt: skip
        _heads(axes, lines, cells, name, colour)
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(cells)), [name_of(cell, lines) for cell in cells])
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    ours.legend(handles=_head_handles(lines, colour), loc="outside lower center", ncols=5)
    marks = " and ".join(dict.fromkeys(line["mark"] for line in lines))
    read = f"{marks} as trained, against an embedding of zeros; queries behind the last one; {text_count(lines)}"
    ours.suptitle(f"{run_title(lines)}\n{read}", fontsize=9)
    why, theory = below.subfigures(1, 2, width_ratios=(1.7, 1))
    _explained(why.subplots(), lines, colour)
    theory.set_facecolor(LIGHT)
    axes = theory.subplots()
    _theorem(axes)
    axes.set_title("theory: entropy falls if a likely key is\nboosted, and rises at first if another is", fontsize=8.5)
    axes.legend(loc="upper right", fontsize=8)


def attention_panel(lines: list[dict]) -> bytes:
    """Lines of one run, task and length as a small PNG: boost and drop of every head by placement, and whether the
    boost of the mark explains the drop."""
    return png(_attention_panel, lines)


def _attention_panel(figure, lines: list[dict]) -> None:
    cells = list(dict.fromkeys(map(cell_of, lines)))
    height = 0.55 + 0.42 * len(cells)
    figure.set_figheight(2 * height + 2.9)
    boost, drop, why = figure.subplots(3, 1, height_ratios=[height, height, 2.4])
    colour = _layer_colours(_layers(lines))
    for axes, name, label in ((boost, "boost", "boost of the largest logit"), (drop, "drop", "drop of entropy, nats")):
        _heads(axes, lines, cells, name, colour)
        axes.set_xlabel(label)
        axes.set_yticks(range(len(cells)), [placement for _, placement, *_ in cells])
        axes.set_ylim(len(cells) - 0.5, -0.5)
    _explained(why, lines, colour)
    why.set_title("is it the boost of the mark?\nOn the line: yes; a dot a head")
    why.set_xlabel(f"drop if only the mark's own logit\nchanged, nats\n{text_count(lines)}")
    task, _, length, level, _ = cells[0]
    figure.suptitle(f"{task.replace('_', ' ')}, {level}, {length} positions", fontsize=10)
    legend(figure, _head_handles(lines, colour))


def theorem_picture() -> bytes:
    """What the paper's theorem says, as a small PNG."""
    return png(_theorem_picture)


def _theorem_picture(figure) -> None:
    figure.set_facecolor(LIGHT)
    axes = figure.subplots()
    _theorem(axes)
    axes.set_title("what the paper's theorem says:\ndH/dt = −p (ln p + H)")
    legend(figure, axes.get_legend_handles_labels()[0], columns=1)


def _layers(lines: list[dict]) -> int:
    return 1 + max(line["layer"] or 0 for line in lines)


def _head_handles(lines: list[dict], colour) -> list[Line2D]:
    hollow = Line2D(
        [], [], color=GREY, marker="o", linestyle="", fillstyle="none", label="hollow: not shown to be above 0"
    )
    return [
        *(Line2D([], [], color=colour(i), marker="s", linestyle="", label=f"layer {i}") for i in _some(_layers(lines))),
        *(Line2D([], [], color=GREY, marker=LOOKS[which], linestyle="", markersize=5,
                 label=f"a head of {which} attention")
          for which in dict.fromkeys(line["attention"] for line in lines)),
        hollow,
        Line2D([], [], color="black", marker="|", markersize=11, markeredgewidth=2, linestyle="",
               label="mean of all heads, 95 %"),
        Line2D([], [], color="black", linestyle=":", linewidth=1.2, label="the paper's mean"),
    ]  # fmt: skip


def _layer_colours(layers: int):
    return lambda layer: colormaps["viridis"](0.92 * layer / max(1, layers - 1))


def _some(layers: int) -> list[int]:
    """Layers for a legend: all, or five of many."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, 5))})


def _heads(axes, lines: list[dict], cells: list[tuple], name: str, colour) -> None:
    scale = 1 if name in FIGURE_2 else 100
    if name in FIGURE_2:
        axes.axvline(0, color=GREY, linewidth=1, zorder=1)
        axes.axvline(FIGURE_2[name], color="black", linestyle=":", linewidth=1.2, zorder=1)
    attentions = [which for which in LOOKS if any(line["attention"] == which for line in lines)]
    layers, room = _layers(lines), 0.76 / len(attentions)  # of a row: its attentions, and in each the layers
    for line in lines:
        if name not in line:
            continue
        y = cells.index(cell_of(line)) - 0.38 + room * (attentions.index(line["attention"]) + 0.5)
        x = scale * line[name]
        if line["layer"] is None:
            axes.hlines(y, *(scale * end for end in line[f"{name}_interval"]), color="black", linewidth=1.6, zorder=4)
            axes.plot(x, y, "|", color="black", markersize=13, markeredgewidth=2, zorder=5)
            continue
        y += 0.8 * room * ((line["layer"] + 0.5) / layers - 0.5)
        filled = name not in FIGURE_2 or line[f"{name}_verdict"].startswith("holds")
        axes.plot(x, y, marker=LOOKS[line["attention"]], color=colour(line["layer"]), markersize=4.5, alpha=0.85,
                  fillstyle="full" if filled else "none")  # fmt: skip


def _theorem(axes) -> None:
    for (name, (t, H, _, slope)), colour in zip(theorem_curves().items(), COLOURS, strict=False):
        sign = f"ln\xa0p\xa0{'>' if slope[0] < 0 else '<'}\xa0−H"
        axes.plot(t, H, color=colour, label=f"a key that is {name} without it: {sign}")
        turn = int(H.argmax())
        if turn:
            axes.plot(t[turn], H[turn], "v", color=colour, markersize=7)
            axes.annotate("ln p = −H", (t[turn], H[turn]), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="boost t of one key's logit, of 64 keys", ylabel="entropy H, nats", ylim=(0, 1.6))


def _explained(axes, lines: list[dict], colour) -> None:
    shown = [line for line in lines if line["layer"] is not None and "predicted" in line]
    for line in shown:
        axes.plot(line["predicted"], line["drop"], marker=LOOKS[line["attention"]], color=colour(line["layer"]),
                  markersize=4.5, alpha=0.85)  # fmt: skip
    ends = [0.0, *(line[name] for line in shown for name in ("predicted", "drop"))]
    low, high = min(ends) - 0.1, max(ends) + 0.1
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, zorder=1)
    axes.set(xlabel="drop if only the mark's own logit changed, nats", ylabel="drop measured, nats",
             title="is it the boost of the mark? On the line: yes; a dot a head")  # fmt: skip


def patching_picture(lines: list[dict]) -> bytes:
    """Lines of probe.py patching, of one checkpoint, as a PNG."""
    return png(_patching, lines)


SITE_NAMES = {
    "mark": "the mark that ends the span", "marks": "all marks", "after": "the token behind the mark",
    "ordinary": "an ordinary token", "answer": "the answer in the text", "asked": "the token that predicts the answer",
}  # fmt: skip


def _patching(figure, lines: list[dict]) -> None:
    """A column a cell; above the share of texts that keep their answer, below of those that take the donor's."""
    cells = list(dict.fromkeys(map(cell_of, lines)))
    figure.set_size_inches(max(7.6, 1.2 + 3.6 * len(cells)), 6.6)
    panels = figure.subplots(2, len(cells), sharex=True, sharey=True, squeeze=False)
    for cell, column in zip(cells, panels.T, strict=True):
        of = [line for line in lines if cell_of(line) == cell]
        _by_site(column, of)
        column[0].set_title(name_of(cell, lines).replace("\n", " "), fontsize=9.5)
        column[1].set_xlabel("layer that the replaced state enters")
    panels[0, 0].set_ylabel("its own answer, % of texts")
    panels[1, 0].set_ylabel("the donor's answer, % of texts")
    read = f"what a text answers when its state at one place is another text's; {text_count(lines)}, 95 % intervals"
    figure.suptitle(f"{run_title(lines)}\n{wrapped(read, 100)}", fontsize=9)
    legend(figure, _site_handles(lines), columns=3)


def patching_panel(lines: list[dict]) -> bytes:
    """Lines of one run and cell as a small PNG: what is answered, by layer and place of the state that is replaced."""
    return png(_patching_panel, lines)


def _patching_panel(figure, lines: list[dict]) -> None:
    figure.set_figheight(4.4)
    panels = figure.subplots(2, 1, sharex=True)
    _by_site(panels, lines)
    panels[0].set(title=_title(lines), ylabel="its own answer, %")
    panels[1].set(
        xlabel=f"layer that the replaced state enters\n{wrapped(f'{text_count(lines)}, 95 % intervals')}",
        ylabel="the donor's answer, %",
    )
    legend(figure, _site_handles(lines))


def _title(lines: list[dict]) -> str:
    """Of a small picture of one cell."""
    return wrapped(f"{name_of(cell_of(lines[0]), lines)}, {lines[0]['level']}".replace("\n", " "))


def _site_handles(lines: list[dict]) -> list[Line2D]:
    there = {line["site"] for line in lines}
    handles = [
        Line2D([], [], color=COLOURS[i], marker=MARKERS[i], label=name)
        for i, (site, name) in enumerate(SITE_NAMES.items())
        if site in there
    ]
    return [*handles, Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="nothing replaced")]


def _by_site(column, lines: list[dict]) -> None:
    """Two axes of one cell: texts that keep their answer, and that take the donor's."""
    for axes, share in zip(column, ("kept", "donor"), strict=True):
        axes.axhline(100 * lines[0][f"{share}_unpatched"], color=GREY, linestyle="--", linewidth=1, zorder=1)
        for number, (of, dodge) in _each(lines, "site", SITE_NAMES, 0.06).items():
            _curve(axes, of, share, 100, number, dodge)
        axes.set_ylim(-4, 104)
    column[1].set_xticks(_some(_layers(lines)))
    column[1].set_xlim(-0.5, _layers(lines) - 0.5)


def _each(lines: list[dict], field: str, names: dict[str, str], step: float) -> dict[int, tuple[list[dict], float]]:
    """The lines of each of `names` that there is: its number, by which it has its colour, and by how much it is set
    aside, so that all stand around their layer."""
    there = [name for name in names if any(line[field] == name for line in lines)]
    return {
        list(names).index(name): ([line for line in lines if line[field] == name], step * (i - (len(there) - 1) / 2))
        for i, name in enumerate(there)
    }


def residual_picture(lines: list[dict]) -> bytes:
    """Lines of probe.py residual, of one checkpoint, as a PNG."""
    return png(_residual, lines)


PLACE_NAMES = {
    "mark": "the mark", "word": 'the word "mark" in its place', "ordinary": "an ordinary token elsewhere",
}  # fmt: skip


def _residual(figure, lines: list[dict]) -> None:
    """Two rows a cell, a column a distance: centred cosine, and what is decoded, by layer."""
    cells, distances = list(dict.fromkeys(map(cell_of, lines))), sorted({line["distance"] for line in lines})
    figure.set_size_inches(max(7.6, 1.4 + 1.75 * len(distances)), 1.5 + 4.6 * len(cells))
    panels = figure.subplots(2 * len(cells), len(distances), sharex=True, sharey="row", squeeze=False)
    for cell, above, below in zip(cells, panels[::2], panels[1::2], strict=True):
        for distance, near, named in zip(distances, above, below, strict=True):
            of = [line for line in lines if cell_of(line) == cell and line["distance"] == distance]
            if of:
                _near_and_named(near, named, of)
            else:  # another call's distances
                near.set_axis_off()
                named.set_axis_off()
            near.set_title(f"{distance} back", fontsize=9.5)
        above[0].set_ylabel(f"{name_of(cell, lines)}\n\ncosine, centred")
        below[0].set_ylabel("token named by a\nlinear classifier, %")
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    read = f"what a state has of the token d positions back; {text_count(lines)}, 95 % intervals"
    figure.suptitle(f"{run_title(lines)}\n{wrapped(read, 100)}", fontsize=9)
    legend(figure, _place_handles(lines), columns=3)


def residual_panel(lines: list[dict]) -> bytes:
    """Lines of one run and cell as a small PNG: a row a distance, cosines on the left, what is decoded on the right."""
    return png(_residual_panel, lines)


def _residual_panel(figure, lines: list[dict]) -> None:
    distances = sorted({line["distance"] for line in lines})
    figure.set_figheight(1.1 + 1.25 * len(distances))
    panels = figure.subplots(len(distances), 2, sharex=True, sharey="col", squeeze=False)
    for distance, (near, named) in zip(distances, panels, strict=True):
        _near_and_named(near, named, [line for line in lines if line["distance"] == distance])
        near.set_ylabel(f"{distance} back")
    panels[0, 0].set_title("cosine,\ncentred")
    panels[0, 1].set_title("named by a linear\nclassifier, %")
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    figure.suptitle(f"{_title(lines)}\n{wrapped(f'{text_count(lines)}, 95 % intervals')}", fontsize=10)
    legend(figure, _place_handles(lines), columns=1)


def _near_and_named(near, named, lines: list[dict]) -> None:
    """Two axes of one cell and distance: cosines, and what is decoded, by layer."""
    near.axhline(0, color=GREY, linewidth=1, zorder=1)
    for i, (of, dodge) in _each(lines, "place", PLACE_NAMES, 0.1).items():
        _curve(near, of, "cosine_centred", 1, i, dodge)
        _floor(near, of, "floor_centred", 1, i, "--")
        _curve(named, of, "decoded", 100, i, dodge)
        _floor(named, of, "majority", 100, i, "--")
        _floor(named, of, "shuffled", 100, i, ":")
    named.set_ylim(-4, 104)
    named.set_xticks(_some(_layers(lines)))


def _place_handles(lines: list[dict]) -> list[Line2D]:
    there = {line["place"] for line in lines}
    return [
        *(Line2D([], [], color=COLOURS[i], marker=MARKERS[i], markersize=4.5, label=f"state of {name}")
          for i, (place, name) in enumerate(PLACE_NAMES.items()) if place in there),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="floors: another text's; commonest token"),
        Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label="floor: shuffled labels"),
    ]  # fmt: skip


def _curve(axes, lines: list[dict], name: str, scale: float, number: int, dodge: float) -> None:
    """A figure by layer, with its interval."""
    x = [line["layer"] + dodge for line in lines]
    look = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4.5}
    axes.plot(x, [scale * line[name] for line in lines], linewidth=1.2, **look)
    for at, line in zip(x, lines, strict=True):
        axes.vlines(at, *(scale * end for end in line[f"{name}_interval"]), color=COLOURS[number], linewidth=1.4)


def _floor(axes, lines: list[dict], name: str, scale: float, number: int, style: str) -> None:
    x = [line["layer"] for line in lines]
    axes.plot(
        x, [scale * line[name] for line in lines], color=COLOURS[number], linestyle=style, linewidth=1.2, zorder=1
    )
