"""Draws the loss curves of runs from their metrics.jsonl.

python plot.py                                   # the newest run -> out/<run>/loss.png
python plot.py out/tiny_meta out/tiny_gpt2 --output=compare.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from cli import run_cli
from config import UserError


def read_run(folder: Path) -> tuple[dict, dict[str, list[dict]]]:
    """A run's config.json and its metrics by kind. Raises UserError if it has none."""
    try:
        facts = json.loads((folder / "config.json").read_text())
        text = (folder / "metrics.jsonl").read_text()
        # a line that is being written, or that a kill cut short, has no end
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no readable metrics ({error}): give folders of runs, such as out/NAME."
        ) from error
    metrics: dict[str, list[dict]] = {"train": [], "val": [], "final": [], "guard": []}
    for line in lines:
        if line.get("loss", 0) is not None:  # a loss that was not finite
            metrics[line["kind"]].append(line)
    if not metrics["val"]:
        raise UserError(f"{folder} has no evaluation yet: wait for the run's first.")
    return facts, metrics


def smooth(values: list[float], share: float = 0.05) -> np.ndarray:
    """Mean over a centred window of `share` of the points, so that the curve behind the noise can be seen."""
    width = int(len(values) * share) | 1  # odd: it has a middle
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def plot(folders: list[Path], output: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, folder in enumerate(folders):
        facts, metrics = read_run(folder)
        color = f"C{number}"
        tokens, losses = ([line[key] for line in metrics["train"]] for key in ("content_tokens", "loss"))
        left.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
        left.plot(tokens, smooth(losses) if losses else [], color=color, label=folder.name)
        tokens, bits = ([line[key] for line in metrics["val"]] for key in ("content_tokens", "bits_per_byte"))
        final = metrics["final"][-1]["bits_per_byte"] if metrics["final"] else None
        label = folder.name + (f", whole split at the end: {final:.3f}" if final else "")
        right.plot(tokens, bits, color=color, marker="o", markersize=3, label=label)
    packed = facts["data"]["val_text_compressed"]
    for name, key in (("gzip -9", "gzip_9_bits_per_byte"), ("xz", "xz_bits_per_byte")):
        right.axhline(packed[key], color="grey", linestyle="--", linewidth=0.8)
        right.text(
            1, packed[key], f"{name} ", va="bottom", ha="right", color="grey", transform=right.get_yaxis_transform()
        )
    left.set(xlabel="content tokens", ylabel="nats per content token", title="training loss")
    right.set(xlabel="content tokens", ylabel="bits per byte", title="validation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(output, dpi=150)
    except ValueError as error:
        raise UserError(f"{output} cannot be drawn ({error}): take a name that ends in .png.") from error


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs; by default the one that logged last")
    parser.add_argument("--output", type=Path, help="the PNG; by default loss.png in the first run's folder")
    args = parser.parse_args(argv)
    runs = args.runs or sorted(Path("out").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)[-1:]
    if not runs:
        raise UserError("there is no run in out/: train one first, python train.py config/tiny_meta.py.")
    folders = [path.parent if path.name == "metrics.jsonl" else path for path in runs]
    output = args.output or folders[0] / "loss.png"
    plot(folders, output)
    print(output)


if __name__ == "__main__":
    run_cli(main)
