"""Draws the picture of benches/gpu.py: speed of training and decoding, and where the time of a step goes."""

import re
from pathlib import Path

from matplotlib.figure import Figure

from nanometa.common.files import write_atomically
from nanometa.reports.bench_picture import KNOWN
from nanometa.reports.drawing import COLOURS, png, tiled, wrapped

LABELS = {"none": "plain GPT-2", "meta": "meta-tokens", "nanogpt": "nanoGPT", "hf": "Hugging Face"}


def draw(machine: str, results: list[dict], path: Path) -> None:
    """Writes a PNG of what was measured, if anything of it can be drawn.

    results: lines of results.jsonl. machine: GPU, versions and commit, for the heading."""
    rates = {  # (title, unit) -> group -> implementation -> rate
        ("training at 124M, compiled, bf16", "thousand positions per second"): {
            "": {
                line["what"].removesuffix(": training"): line["value"] / 1e3
                for line in results
                if line["stage"] == "training" and line["what"].endswith(": training")
            }
        },
        ("decoding at 124M, bf16", "content tokens per second"): _decoding(results),
    }
    panels = [png(bars, *names, groups) for names, groups in rates.items() if any(groups.values())]
    kinds = [line for line in results if line["what"].startswith("time in ")]
    if kinds:
        panels.append(png(stacked, kinds))
    if panels:
        write_atomically(path, tiled(machine, panels))


def _decoding(results: list[dict]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for line in results:
        if line["stage"] == "decoding" and (found := re.fullmatch(r"(batch \d+), (\w+)", line["what"])):
            groups.setdefault(found[1], {})[found[2]] = line["value"]
    return groups


def bars(figure: Figure, title: str, unit: str, groups: dict[str, dict[str, float]]) -> None:
    """Draws groups of bars: one bar per implementation, with its rate above it."""
    axes = figure.subplots()
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    for number, name in enumerate(names):
        places = [place + 0.8 * number / len(names) for place in range(len(groups))]
        heights = [group.get(name, 0) for group in groups.values()]
        drawn = axes.bar(places, heights, 0.8 / len(names), color=KNOWN[name], label=LABELS[name])
        axes.bar_label(drawn, [f"{height:,.0f}" for height in heights], fontsize=8)
    axes.set_xticks([place + 0.4 - 0.4 / len(names) for place in range(len(groups))], list(groups))
    axes.set(title=title, ylabel=f"{unit}\n(higher is better)")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=2)


def stacked(figure: Figure, lines: list[dict]) -> None:
    """Draws the time of a step by kind of kernel, one column per implementation."""
    axes, tops = figure.subplots(), {}
    for line in lines:
        arm, kind = re.fullmatch(r"time in (\w+): (.*)", line["what"]).groups()
        axes.bar(
            LABELS[arm], line["value"], 0.6, bottom=tops.get(arm, 0), color=COLOURS[_order(lines, kind)], label=kind
        )
        tops[arm] = tops.get(arm, 0) + line["value"]
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.set(title="where the time of a training step goes", ylabel="ms in kernels per step")
    axes.grid(axis="x", visible=False)
    figure.legend(handles.values(), [wrapped(label, 17) for label in handles], loc="outside lower center", ncols=2)


def _order(lines: list[dict], kind: str) -> int:
    """Returns the number of a kind of kernel, which sets its color."""
    kinds = list(dict.fromkeys(line["what"].split(": ", 1)[1] for line in lines))
    return kinds.index(kind)
