"""The figure of bench.py: bars of rates with their quartiles, lines by length."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"none": "tab:blue", "plain": "tab:blue", "meta": "tab:purple", "nanogpt": "tab:gray", "nanoGPT": "tab:gray",
           "hf": "tab:orange", "Hugging Face": "tab:orange", "dense": "tab:red"}  # fmt: skip


def draw(results: dict[str, list[dict]], path: Path) -> None:
    panels = []
    if "training" in results:
        panels += [lambda ax: bars(ax, results["training"], ("shape", "dtype", "mode"), "positions/s", log=True)]
        eager = [row for row in results["training"] if "peak GB" in row]
        panels += [lambda ax: bars(ax, eager, ("shape", "dtype"), "peak GB")] if eager else []
    if "layer" in results:
        panels += [lambda ax: bars(ax, results["layer"], ("T", "dtype"), "ms", log=True)]
    if "lengths" in results:
        panels += [lambda ax: lines(ax, results["lengths"], "s a step", "s at the matmul peak")]
        panels += [lambda ax: lines(ax, results["lengths"], "peak GB")]
    if "decoding" in results:
        panels += [lambda ax: bars(ax, results["decoding"], ("batch", "dtype"), "content tokens/s", log=True)]
    if "preparing" in results:
        panels += [lambda ax: bars(ax, results["preparing"], ("corpus",), "MB/s")]
    columns = min(2, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(7 * columns, 4 * -(-len(panels) // columns)), squeeze=False
    )
    for ax, panel in zip(axes.flat, panels, strict=False):
        panel(ax)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(ax, rows: list[dict], keys: tuple[str, ...], value: str, log: bool = False) -> None:
    groups = list(dict.fromkeys(tuple(str(row[key]) for key in keys) for row in rows))
    contestants = list(dict.fromkeys(row["who"] for row in rows))
    width = 0.8 / len(contestants)
    for i, who in enumerate(contestants):
        mine = [row for row in rows if row["who"] == who and value in row]
        x = [groups.index(tuple(str(row[key]) for key in keys)) + i * width for row in mine]
        drawn = ax.bar(x, [row[value] for row in mine], width, label=who, color=COLOURS.get(who))
        ax.bar_label(drawn, fmt="{:,.3g}", fontsize=6, rotation=90 if len(groups) > 4 else 0, padding=2)
    ax.set_xticks([n + 0.4 - width / 2 for n in range(len(groups))], ["\n".join(group) for group in groups], fontsize=7)
    ax.set_ylabel(value)
    if log:
        ax.set_yscale("log")
    ax.margins(y=0.2)
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
