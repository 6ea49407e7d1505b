"""Draws the results of benches/gpu.py."""

import matplotlib

matplotlib.use("Agg")
import re
from pathlib import Path

import matplotlib.pyplot as plt

NAMES = {"none": "plain GPT-2", "meta": "meta-tokens, 10 %", "nanogpt": "nanoGPT", "hf": "Hugging Face"}
COLORS = {"none": "#4477aa", "meta": "#228833", "nanogpt": "#bbbbbb", "hf": "#999999"}


def draw(facts: dict, results: list[dict], path: Path) -> None:
    """Draws training speed, decoding speed and the kernels of a step, as far as they were measured."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    value = {(line["stage"], line["what"]): line["value"] for line in results}

    training, decoding, kernels = axes
    arms = [arm for arm in NAMES if ("training", f"{arm}: training") in value]
    bars = training.bar(
        [NAMES[arm] for arm in arms], [value["training", f"{arm}: training"] / 1e3 for arm in arms],
        color=[COLORS[arm] for arm in arms],
    )  # fmt: skip
    mfu = [value.get(("training", f"{arm}: share of the peak FLOP/s (MFU)")) for arm in arms]
    training.bar_label(
        bars, [f"{bar.get_height():,.0f}" + (f"\nMFU {m:.0%}" if m else "") for bar, m in zip(bars, mfu, strict=True)]
    )
    training.margins(y=0.2)
    training.set(title="Training at 124M, compiled, bf16", ylabel="thousand positions per second (higher is better)")

    writers = [
        who
        for who in NAMES
        if any(key == "decoding" and re.fullmatch(rf"batch \d+, {who}", what) for key, what in value)
    ]
    batches = sorted({int(what.split()[1].rstrip(",")) for key, what in value if key == "decoding"})
    for number, who in enumerate(writers):
        places = [place + 0.8 * (number + 0.5) / len(writers) - 0.4 for place in range(len(batches))]
        heights = [value.get(("decoding", f"batch {batch}, {who}"), 0) for batch in batches]
        bars = decoding.bar(places, heights, 0.8 / len(writers), label=NAMES[who], color=COLORS[who])
        decoding.bar_label(bars, [f"{height:,.0f}" for height in heights], fontsize=7)
    decoding.set(title="Decoding at 124M, bf16", ylabel="content tokens per second (higher is better)", yscale="log")
    decoding.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    if writers:
        decoding.legend(frameon=False)

    top = [line for line in results if line["what"].startswith("kernel: ")][:10][::-1]
    kernels.barh(
        [line["what"].removeprefix("kernel: ")[:42] for line in top], [line["value"] for line in top], color="#4477aa"
    )
    kernels.tick_params(axis="y", labelsize=7)
    kernels.set(title="A compiled step, meta-tokens: longest kernels", xlabel="ms a step")

    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    commit = f", commit {facts['commit'][:8]}" if facts["commit"] else ""
    figure.suptitle(f"nanoMeta on {facts['device']}, torch {facts['torch']}{commit}", fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)
