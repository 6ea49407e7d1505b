"""Draws the figure of bench.py: bars of rates with their quartiles, and lines by window length."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "none": "tab:blue",
    "meta": "tab:purple",
    "meta, one plan": "plum",
    "nanogpt": "tab:gray",
    "hf": "tab:orange",
    "dense": "tab:red",
}


def draw(results: dict[str, list[dict]], path: Path, machine: str = "") -> None:
    panels = []
    if "training" in results:
        panels += [lambda ax: bars(ax, results["training"], ("shape", "dtype", "mode"), "positions/s", "training")]
        eager = [row for row in results["training"] if "peak GB" in row]
        panels += [lambda ax: bars(ax, eager, ("shape", "dtype"), "peak GB", "memory of training")] if eager else []
    if "layer" in results:
        panels += [lambda ax: bars(ax, results["layer"], ("T", "dtype"), "ms", "a meta-attention layer")]
    if "lengths" in results:
        panels += [lambda ax: lines(ax, results["lengths"], "s a step", "s at the matmul peak")]
        panels += [lambda ax: lines(ax, results["lengths"], "peak GB")]
    if "decoding" in results:
        panels += [lambda ax: bars(ax, results["decoding"], ("batch", "dtype"), "content tokens/s", "decoding")]
    if "preparing" in results:
        timed = [row for row in results["preparing"] if "MB/s" in row]
        panels += [lambda ax: bars(ax, timed, ("corpus",), "MB/s", "preparing")]
    if not panels:  # a profile has no picture, only a table
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(8 * columns, 4.2 * rows), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        panel(ax)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.suptitle(machine, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(ax, rows: list[dict], keys: tuple[str, ...], value: str, title: str) -> None:
    """Draws groups of bars relative to the first contestant of each group, labeled with the absolute numbers. A line
    spans the quartiles if the row has them."""
    groups = list(dict.fromkeys(tuple(str(row[key]) for key in keys) for row in rows))
    contestants = list(dict.fromkeys(row["who"] for row in rows))
    first = {}
    for row in rows:
        first.setdefault(tuple(str(row[key]) for key in keys), row[value])
    width = 0.8 / len(contestants)
    for i, who in enumerate(contestants):
        mine = [(tuple(str(row[key]) for key in keys), row) for row in rows if row["who"] == who]
        x, heights = [groups.index(group) + i * width for group, _ in mine], [r[value] / first[g] for g, r in mine]
        ax.bar(x, heights, width, label=who, color=COLOURS.get(who))
        for place, top, (group, row) in zip(x, heights, mine, strict=True):
            if "quartiles" in row and value not in ("peak GB", "MB/s"):
                ends = [float(part.replace(",", "")) / first[group] for part in row["quartiles"].split("..")]
                ax.plot([place, place], ends, color="black", linewidth=0.8)
                top = max(top, *ends)
            label = f"{row[value]:,.3g}" if row[value] < 1000 else f"{row[value]:,.0f}"
            ax.annotate(label, (place, top), (0, 3), textcoords="offset points", fontsize=6, rotation=90, ha="center")
    ax.set_xticks([n + 0.4 - width / 2 for n in range(len(groups))], ["\n".join(group) for group in groups], fontsize=7)
    ax.set_title(f"{title} ({', '.join(keys)})", fontsize=9)
    ax.set_ylabel(f"{value}, {contestants[0]} = 1")
    ax.margins(y=0.25)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7)


def lines(ax, rows: list[dict], value: str, arithmetic: str = "") -> None:
    for (who, share), colour in zip(
        dict.fromkeys((row["who"], row["markers"]) for row in rows),
        ("tab:blue", "tab:purple", "indigo", "tab:red"),
        strict=False,
    ):
        mine = [row for row in rows if (row["who"], row["markers"]) == (who, share)]
        x, label = [row["T"] for row in mine], who if who == "none" else f"{who}, {share:.0%}"
        ax.plot(x, [row[value] for row in mine], "o-", color=colour, label=label)
        if arithmetic and arithmetic in mine[0] and share in (0.0, 0.1) and who != "dense":
            ax.plot(x, [row[arithmetic] for row in mine], ":", color=colour, label=f"{label}: {arithmetic[2:]}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("positions of a window (8192 in a step)")
    ax.set_ylabel(value)
    ax.legend(fontsize=7)
