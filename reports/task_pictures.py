"""Draws the accuracy on a task by evaluation length: one picture for each task, with a panel for each placement."""

from matplotlib.figure import Figure

from nanometa.reports import drawing
from nanometa.reports.drawing import DASHES, GREY, LIGHT, arm_looks, key, wrapped
from nanometa.reports.lines import Arm, Panel, impossible, share_interval, summary

IMPOSSIBLE = -9  # y of crosses in the strip below 0


def accuracy(figure: Figure, arms: list[Arm], panels: list[Panel], footer: str) -> None:
    """Draws exact answers by evaluation length. panels: the placements of one task, level and question."""
    looks, mine = styles(arms), [arm for arm in arms if any(at in panels for at, _ in arm.lines)]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure.set_figheight(0.9 + 1.7 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    cells = [of for arm in mine for (at, _), of in arm.lines.items() if at in panels]
    barred = any(map(impossible, cells))
    for axes, panel in zip(grid.flat, panels, strict=False):
        _panel(axes, [arm for arm in mine if any(at == panel for at, _ in arm.lines)], looks, panel)
        axes.set_title(panel.placement if len(panels) > 1 else "")
        drawing.percent_axis(axes, -15 if barred else -4)
        if barred:
            axes.axhspan(-15, -4, color=LIGHT, zorder=0)
    drawing.length_axis(
        grid[0, 0], {length for arm in mine for at, length in arm.lines if at in panels}, most=6 // columns
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("positions of a text")
    for axes in grid[:, 0]:
        axes.set_ylabel("exact answers, %")
    name = title(panels[0] if len(panels) == 1 else panels[0]._replace(placement="all placements"))
    figure.suptitle(f"{wrapped(name)}\n{wrapped(footer)}")
    dashes = {arm.training.length: looks[arm.name]["linestyle"] for arm in mine}
    drawing.legend(figure, [
        *(key(label, **look, linestyle="-") for label, look in arm_looks([arm.label for arm in arms]).items()
          if any(arm.label == label for arm in mine)),
        *(key(f"train length {length}", linestyle=dashes[length], linewidth=1.4) for length in sorted(dashes)),
        key("best shortcut", linewidth=0.8, marker="_"), key("chance", linestyle=":", linewidth=1.2),
        *([key("impossible", marker="x", linestyle="")] * barred),
    ])  # fmt: skip


def styles(arms: list[Arm]) -> dict[tuple, dict]:
    """Returns the look that each arm has in every picture, by its name: color and marker depend on the label, dashes on
    the train length."""
    looks = arm_looks([arm.label for arm in arms])
    lengths = sorted({arm.training.length for arm in arms}, reverse=True)  # the longest is solid
    dashes = {length: DASHES[i % len(DASHES)] for i, length in enumerate(lengths)}
    return {arm.name: {**looks[arm.label], "linestyle": dashes[arm.training.length]} for arm in arms}


def title(panel: Panel) -> str:
    """Returns the unique title of a panel. It contains `question` only for list recall, because in other tasks this
    setting only changes the seed."""
    question = f", question {panel.question}" if panel.task == "list_recall" or panel.question != "index" else ""
    return f"{panel.task.replace('_', ' ')}: {panel.placement} ({panel.level}{question})"


def _panel(axes, arms: list[Arm], looks: dict, panel: Panel) -> None:
    """Draws the arms' points, chance and the best shortcut. Crosses in the strip below 0 are impossible cells."""
    for number, arm in enumerate(arms):
        cells = {length: of for (at, length), of in sorted(arm.lines.items()) if at == panel}
        dodge, look = 2 ** (0.035 * (number - (len(arms) - 1) / 2)), looks[arm.name]
        possible = {length: of for length, of in cells.items() if not impossible(of)}
        drawing.interval_line(
            axes, [length * dodge for length in possible], list(map(summary, possible.values())), look
        )
        for length, of in possible.items():
            if len(of) > 1:
                shares = [100 * line["exact"] for line in of.values()]
                axes.plot([length * dodge] * len(of), shares, ".", color=look["color"], markersize=3, alpha=0.7)
        barred = [length * dodge for length in cells if length not in possible]
        axes.plot(barred, [IMPOSSIBLE] * len(barred), "x", color=look["color"], markersize=6, markeredgewidth=1.6)
    lines = [line for arm in arms for (at, _), of in arm.lines.items() if at == panel and not impossible(of)
             for line in of.values()]  # fmt: skip
    # the best shortcut of each length, from the line with the most texts
    most = {line["length"]: line for line in sorted(lines, key=lambda line: (line["length"], line["n"]))}
    best = {length: max(line["floors"].values()) for length, line in most.items()}
    ends = [(share, *share_interval(share, most[length]["n"])) for length, share in best.items()]
    drawing.interval_line(axes, list(best), ends, {"color": GREY, "linewidth": 0.8, "marker": "_", "zorder": 1})
    chance = max((line["chance"] for line in lines), default=0.0)
    axes.axhline(100 * chance, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
