"""The pictures of probe.py rate_distortion: one of all that a file holds, and small ones for a page."""

from matplotlib.lines import Line2D

from nanometa.reports.drawing import COLOURS, GREY, MARKERS, legend, png, wrapped
from nanometa.reports.position_pictures import run_title, text_count

LOOKS = {name: {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4.5}
         for i, name in enumerate(("meta", "last", "question", "random", "mean", "delimiter"))}  # fmt: skip
LINEAR = 8.0  # nats of rate on a linear scale, before the logarithmic one
SCALE = f"(linear to {LINEAR:g}, then logarithmic)"


def rate_picture(lines: list[dict]) -> bytes:
    """Lines of probe.py rate_distortion, of one checkpoint and the same settings of probes, as a PNG."""
    return png(_rates, [line for line in lines if line["kind"] == "curve"])


def _rates(figure, lines: list[dict]) -> None:
    """A row for each cell and target, a column for each layer: distortion by rate, a curve for each state."""
    rows = list(dict.fromkeys(_row(line) for line in lines))
    layers = list(dict.fromkeys(line["layer"] for line in lines))
    figure.set_size_inches(max(7.2, 0.8 + 4.2 * len(layers)), 1.5 + 3.5 * len(rows))
    panels = figure.subplots(len(rows), len(layers), squeeze=False, sharex=True)
    for row, of in zip(rows, panels, strict=True):
        for layer, axes in zip(layers, of, strict=True):
            shown = [line for line in lines if _row(line) == row and line["layer"] == layer]
            if not shown:  # cells of several calls need not have the same layers
                axes.set_axis_off()
                continue
            _panel(axes, shown)
            task, level, placement, length, target = (str(part).replace("_", " ") for part in row)
            name = f"{target} of {task} ({level}), {placement}, {length} positions, layer {layer}"
            axes.set_title(f"{wrapped(name, 75 if len(layers) == 1 else 50)}\n{_levels(shown)}", fontsize=9.5)
        of[0].set_ylabel("distortion D, nats:\ncross-entropy of the target")
    for axes in panels[-1]:
        axes.set_xlabel(f"rate R, nats: at most what the code tells\n{SCALE}")
    sizes = f"trained on {_spread(lines, 'train_texts')}; probe seeds: {_spread(lines, 'probe_seeds')}; bars: 95 %"
    figure.suptitle(f"{run_title(lines)}\n{text_count(lines)}, {sizes}", fontsize=9)
    figure.legend(handles=_handles(lines), loc="outside lower center", ncols=2 if len(layers) == 1 else 3)


def rate_panel(lines: list[dict]) -> bytes:
    """Curves of one run, cell, target and layer as a small PNG: one for each state."""
    return png(_rate_panel, lines)


def _rate_panel(figure, lines: list[dict]) -> None:
    axes, first = figure.subplots(), lines[0]
    _panel(axes, lines)
    task, level, placement, length, target = (str(part).replace("_", " ") for part in _row(first))
    name = f"{target} of {task} ({level}), {placement}, {length} positions"
    title = wrapped(f"{name}, layer {first['layer']}")
    axes.set_title(f"{title}\n{_levels(lines)}")
    n = f"{text_count(lines)}, trained on {first['train_texts']}; probe seeds: {first['probe_seeds']}; bars: 95 %"
    axes.set(xlabel=f"rate R, nats {SCALE}\n{wrapped(n)}", ylabel="distortion D, nats")
    legend(figure, _handles(lines))


def _handles(lines: list[dict]) -> list[Line2D]:
    handles = []
    for name in LOOKS:
        if found := [line["found"] for line in lines if line["state"] == name]:
            label = name if any(found) else f"{name}: nothing found"
            handles.append(Line2D([], [], **LOOKS[name], linewidth=1.4, label=label))
    for label, style in STYLES.items():
        if label != "floor" or any(line["floor"] > 0 for line in lines):
            handles.append(Line2D([], [], label=label, **style))
    if any(line["violations"] for line in lines):
        handles.append(Line2D([], [], **VIOLATION, label="below the converse"))
    return handles


STYLES = {
    "ln K, guessing": {"color": GREY, "linestyle": "-", "linewidth": 0.8},
    "H(Y), and the converse H − R": {"color": "black", "linestyle": "-", "linewidth": 1.2},
    "constant, frequencies": {"color": GREY, "linestyle": (0, (5, 2)), "linewidth": 1.0},
    "shuffled labels": {"color": GREY, "linestyle": (0, (1, 1.2)), "linewidth": 1.4},
    "no bottleneck (no bound)": {"color": GREY, "linestyle": (0, (3, 1.5, 1, 1.5)), "linewidth": 1.0},
    "floor": {"color": "#999999", "linestyle": (0, (8, 3)), "linewidth": 1.0},
}
VIOLATION = {"marker": "x", "color": "red", "markersize": 9, "markeredgewidth": 2, "linestyle": ""}


def _levels(lines: list[dict]) -> str:
    """The heights of a panel's baselines in words: they often lie too near to one another to be told apart."""
    if len({line["entropy"] for line in lines}) > 1:
        return "ln K, H(Y), constant: each state's own"
    one = lines[0]
    return f"ln K {one['uniform']:.2f}, H(Y) {one['entropy']:.2f}, constant {one['cross_entropy']:.2f}"


def _row(line: dict) -> tuple:
    return line["task"], line["level"], line["placement"], line["length"], line["target"]


def _spread(lines: list[dict], name: str) -> str:
    values = {line[name] for line in lines}
    return f"{min(values)}" if len(values) == 1 else f"{min(values)} to {max(values)}"


def _panel(axes, lines: list[dict]) -> None:
    """Baselines that are those of all states are drawn once, others in the colour of their state."""
    last = max(max(LINEAR, *(point["rate_interval"][1] for point in line["points"])) for line in lines)
    one = len({line["entropy"] for line in lines}) == 1
    for number, line in enumerate(lines):
        look, points = LOOKS[line["state"]], line["points"]
        if number == 0 or not one:
            own = {} if one else {"color": look["color"]}
            H = line["entropy"]
            axes.axhline(line["uniform"], **STYLES["ln K, guessing"] | own, zorder=1)
            axes.axhline(line["cross_entropy"], **STYLES["constant, frequencies"] | own, zorder=1)
            axes.plot([0, H, last], [H, 0, 0], **STYLES["H(Y), and the converse H − R"] | own, zorder=1)
            if line["floor"] > 0:
                axes.axhline(line["floor"], **STYLES["floor"] | own, zorder=1)
        for name, kind in (("shuffled", "shuffled labels"), ("ceiling", "no bottleneck (no bound)")):
            axes.axhline(line[name]["distortion"], **STYLES[kind] | {"color": look["color"]}, alpha=0.7, zorder=1)
        R, D = [point["rate"] for point in points], [point["distortion"] for point in points]
        axes.plot(R, D, linewidth=1.4, **look, zorder=3)
        axes.vlines(R, *zip(*(point["distortion_interval"] for point in points), strict=True), color=look["color"])
        axes.hlines(D, *zip(*(point["rate_interval"] for point in points), strict=True), color=look["color"])
        for point in points:
            if point["violates_converse"]:
                axes.plot(point["rate"], point["distortion"], **VIOLATION, zorder=4)
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=2.0)
    ticks = [0, 2, 4, 6, 8, *(2**k for k in range(4, 16))]
    axes.set_xlim(-0.15, last * 1.1)
    axes.set_xticks([tick for tick in ticks if tick <= last * 1.1], [str(tick) for tick in ticks if tick <= last * 1.1])
    axes.minorticks_off()
    axes.set_ylim(bottom=-0.03 * max(line["uniform"] for line in lines))
