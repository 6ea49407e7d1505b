"""Draws the panel of probe.py rate_distortion: distortion by rate, one curve for each state."""

from nanometa.reports.drawing import GREY, interval_line, key, legend, look, text_count, wrapped

LOOKS = {name: look(i) for i, name in enumerate(("meta", "last", "question", "random", "mean", "delimiter"))}
LINEAR = 8.0  # nats of rate that are drawn on a linear scale, before the logarithmic one
STYLES = {
    "H(Y), and the converse H − R": {"color": "black", "linestyle": "-", "linewidth": 1.2},
    "shuffled labels": {"color": GREY, "linestyle": (0, (1, 1.2)), "linewidth": 1.4},
    "no bottleneck (no bound)": {"color": GREY, "linestyle": (0, (3, 1.5, 1, 1.5)), "linewidth": 1.0},
}
VIOLATION = {"marker": "x", "color": "red", "markersize": 9, "markeredgewidth": 2, "linestyle": ""}


def draw_rates(figure, lines: list[dict]) -> None:
    """Draws the curves. Baselines have the color of their state unless all states share them."""
    axes, first = figure.subplots(), lines[0]
    last = max(max(LINEAR, *(point["rate_interval"][1] for point in line["points"])) for line in lines)
    shared = len({line["entropy"] for line in lines}) == 1
    for line in lines:
        style, points, H = LOOKS[line["state"]], line["points"], line["entropy"]
        color = {"color": style["color"]}
        if line is first or not shared:
            own = {} if shared else color
            axes.plot([0, H, last], [H, 0, 0], **STYLES["H(Y), and the converse H − R"] | own, zorder=1)
        for name, kind in (("shuffled", "shuffled labels"), ("ceiling", "no bottleneck (no bound)")):
            axes.axhline(line[name]["distortion"], **STYLES[kind] | color, alpha=0.7, zorder=1)
        R, D = [point["rate"] for point in points], [point["distortion"] for point in points]
        interval_line(axes, R, [(point["distortion"], *point["distortion_interval"]) for point in points], style, 1)
        axes.hlines(D, *zip(*(point["rate_interval"] for point in points), strict=True), **color)
        below = [(point["rate"], point["distortion"]) for point in points if point["violates_converse"]]
        axes.plot(*zip(*below, strict=True) if below else ((), ()), **VIOLATION, zorder=4)
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=2.0)
    axes.set_xlim(-0.15, last * 1.1)
    ticks = [tick for tick in (0, 2, 4, 6, 8, *(2**k for k in range(4, 16))) if tick <= last * 1.1]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_ylim(bottom=-0.03 * max(line["uniform"] for line in lines))
    task, level, placement, target = (
        first[name].replace("_", " ") for name in ("task", "level", "placement", "target")
    )
    where = f"{target} of {task} ({level}), {placement}, {first['length']} positions, layer {first['layer']}"
    # the baselines often lie too close to one another to be read off the axis
    levels = f"ln K {first['uniform']:.2f}, H(Y) {first['entropy']:.2f}, constant {first['cross_entropy']:.2f}"
    axes.set_title(f"{wrapped(where)}\n{levels if shared else 'ln K, H(Y), constant: each state has its own'}")
    sizes = f"trained on {first['train_texts']}; probe seeds: {first['probe_seeds']}; bars: 95 %"
    scale = f"rate R, nats (linear to {LINEAR:g}, then logarithmic)"
    axes.set(xlabel=f"{scale}\n{wrapped(f'{text_count(lines)}, {sizes}')}", ylabel="distortion D, nats")
    found = {line["state"]: line["found"] for line in lines}
    curves = [key(name if found[name] else f"{name}: nothing found", **LOOKS[name], linestyle="-")
              for name in LOOKS if name in found]  # fmt: skip
    violated = any(line["violations"] for line in lines)
    baselines = [key(label, **style) for label, style in STYLES.items()]
    legend(figure, curves + baselines + [key("below the converse", **VIOLATION)] * violated)
