"""The pictures of probes, in the style of the reports'."""

from matplotlib.lines import Line2D

from nanometa.common.statistics import DECIDES, wilson
from nanometa.reports.drawing import COLOURS, GREY, LIGHT, MARKERS, legend, png, wrapped
from nanometa.reports.paper import TABLE_2, TABLE_2_N
from nanometa.reports.table_sections import has_learned


def run_title(lines: list[dict]) -> str:
    """Which run this is of, for the top of a picture, and whether it has learned what it is asked."""
    first = lines[0]
    doubt = (
        ""
        if all(map(has_learned, lines))
        else "\nNOT LEARNED: in some cells its answers are no better than chance or a shortcut"
    )
    return wrapped(f"{first['arm']}; {first['run']}, step {first['step']}, seed {first['seed']}", 100) + doubt


def text_count(lines: list[dict]) -> str:
    """n, and whether it decides anything."""
    n = sorted({line["n"] for line in lines})
    many = f"n = {n[0]} to {n[-1]}" if len(n) > 1 else f"n = {n[0]}"
    return f"{many} texts{' (too few to decide)' if n[-1] < DECIDES else ''}"


def positions_picture(lines: list[dict]) -> bytes:
    """Lines of probe.py positions, of one checkpoint, as a PNG."""
    return png(_positions, lines)


def _positions(figure, lines: list[dict]) -> None:
    """A panel a task and length: exact answers by condition, placements side by side; below, the paper's Table 2."""
    lengths, placements, names = (
        list(dict.fromkeys(line[name] for line in lines)) for name in ("length", "placement", "condition")
    )
    tasks = list(dict.fromkeys(map(_task, lines)))
    heights = [0.6 + len(tasks) * (0.75 + 0.22 * len(names) * max(1, 0.6 * len(placements))), 2.7]
    figure.set_size_inches(max(6.4, 1.9 + 2.5 * len(lengths)), sum(heights))
    ours, paper = figure.subfigures(2, 1, height_ratios=heights)
    panels = ours.subplots(len(tasks), len(lengths), squeeze=False, sharex=True, sharey=True)
    for task, row in zip(tasks, panels, strict=True):
        for length, axes in zip(lengths, row, strict=True):
            of = [line for line in lines if (_task(line), line["length"]) == (task, length)]
            if of:
                _by_condition(axes, of, placements, names)
                axes.set_title(f"{task}, {length} positions", fontsize=9.5)
            else:
                axes.set_axis_off()
    for axes in panels[-1]:
        axes.set_xlabel("exact answers, %")
    read = f"{text_count(lines)}, 95 % intervals; line: full, dotted: chance"
    ours.suptitle(f"{run_title(lines)}\n{read}", fontsize=9)
    if len(placements) > 1:
        handles = [Line2D([], [], **_look(i), linestyle="", label=name) for i, name in enumerate(placements)]
        ours.legend(handles=handles, loc="outside lower center", ncols=len(placements), title="placement")
    _paper(paper)


def _task(line: dict) -> str:
    question = "" if line["question"] == "index" else f", {line['question']}"
    return f"{line['task'].replace('_', ' ')} ({line['level']}{question})"


def positions_panel(lines: list[dict]) -> bytes:
    """Lines of one run, task and length as a small PNG: exact answers by condition, placements side by side."""
    return png(_panel, lines)


def table_2() -> bytes:
    """The paper's Table 2 as a small PNG."""
    return png(_table_2)


def _panel(figure, lines: list[dict]) -> None:
    placements, names = (list(dict.fromkeys(line[name] for line in lines)) for name in ("placement", "condition"))
    figure.set_figheight(0.9 + 0.22 * len(names) * max(1.4, 0.6 * len(placements)))
    axes, first = figure.subplots(), lines[0]
    _by_condition(axes, lines, placements, names)
    axes.set_yticks(
        range(len(names)), [name.replace("_", " ").replace("no position ", "no position\n") for name in names]
    )
    axes.set_title(f"{first['task'].replace('_', ' ')}, {first['length']} positions")
    axes.set_xlabel(f"exact answers, %\nlevel {first['level']}, n = {first['n']}, 95 % intervals")
    handles = [Line2D([], [], **_look(i), linestyle="", label=name) for i, name in enumerate(placements)]
    full = Line2D([], [], color=GREY, linewidth=0.8, label="full")
    legend(figure, [*handles, full, Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label="chance")])


def _table_2(figure) -> None:
    figure.set_figheight(0.9 + 0.44 * len(TABLE_2))
    _paper(figure)
    figure.axes[0].set_yticks(range(len(TABLE_2)), [wrapped(name, 22) for name in TABLE_2])
    figure.axes[0].set_title(f"the paper's Table 2,\nabout {TABLE_2_N} texts each")
    figure.axes[0].set_xlabel(f"accuracy, %\n95 % if n = {TABLE_2_N}")


def _look(number: int) -> dict:
    return {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 5}


def _by_condition(axes, lines: list[dict], placements: list[str], names: list[str]) -> None:
    axes.axvline(100 * lines[0]["chance"], color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    for line in lines:
        number = placements.index(line["placement"])
        y = names.index(line["condition"]) + 0.2 * (number - (len(placements) - 1) / 2)
        look = _look(number)
        axes.hlines(y, *(100 * end for end in line["interval"]), color=look["color"], linewidth=1.6)
        axes.plot(100 * line["exact"], y, **look)
        if line["condition"] == "full":
            axes.axvline(100 * line["exact"], color=look["color"], linewidth=0.8, alpha=0.6, zorder=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    _percent(axes)


def _percent(axes) -> None:
    axes.set_xlim(-4, 104)
    axes.set_xticks(range(0, 101, 20))


def _paper(figure) -> None:
    figure.set_facecolor(LIGHT)
    axes = figure.subplots()
    for y, shares in enumerate(TABLE_2.values()):
        for share, dodge, filled in zip(shares, (-0.14, 0.14), (True, False), strict=True):
            low, high = wilson(round(share / 100 * TABLE_2_N), TABLE_2_N)
            axes.hlines(y + dodge, 100 * low, 100 * high, color="#999999", linewidth=1.2)
            axes.plot(share, y + dodge, "o", color="black", markersize=4.5, fillstyle="full" if filled else "none")
    axes.set_yticks(range(len(TABLE_2)), TABLE_2)
    axes.set_ylim(len(TABLE_2) - 0.5, -0.5)
    _percent(axes)
    axes.set_title(f"paper, about {TABLE_2_N} texts a cell: Table 2, list pointer", fontsize=9.5)
    axes.set_xlabel(f"accuracy, %; bars: 95 % if n = {TABLE_2_N}")
    names = (("full", "full"), ("none", "no position at meta-tokens"))
    handles = [Line2D([], [], color="black", marker="o", markersize=4.5, linestyle="", fillstyle=style, label=label)
               for style, label in names]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
