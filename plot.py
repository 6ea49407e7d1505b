"""Draws the loss curves of runs from their metrics.jsonl; beside them bits per byte, or of runs on tasks exact answers.
Of files that eval.py perplexity --documents wrote: the loss by depth in documents.

python plot.py                                   # the newest run -> out/<run>/loss.png
python plot.py out/tiny_meta out/tiny_gpt2 --output=compare.png
python plot.py out/tiny_meta/perplexity.jsonl    # -> out/tiny_meta/depth.png
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
from reports import depth
from reports.drawing import png


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


def tasks_of(metrics: dict[str, list[dict]]) -> list[str]:
    """The tasks that a run's evaluations ask; none of a run on text."""
    return [key.removeprefix("exact_") for key in metrics["val"][-1] if key.startswith("exact_")]


def smooth(values: list[float], share: float = 0.05) -> np.ndarray:
    """Mean over a centred window of `share` of the points, so that the curve behind the noise can be seen."""
    width = int(len(values) * share) | 1  # odd: it has a middle
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def plot(folders: list[Path], output: Path) -> None:
    runs = [(folder, *read_run(folder)) for folder in folders]
    tasks = list(dict.fromkeys(task for _, _, metrics in runs for task in tasks_of(metrics)))
    texts = [folder for folder, _, metrics in runs if not tasks_of(metrics)]
    if tasks and texts:
        raise UserError(f"{texts[0]} was trained on text and others on tasks: draw them apart.")
    # a token of a task's text may be padding: steps it is
    axis, label = ("step", "steps") if tasks else ("content_tokens", "content tokens")
    panels = [(f"exact_{task}", "share of exact answers", task.replace("_", " ")) for task in tasks] or [
        ("bits_per_byte", "bits per byte", "validation")
    ]
    rows, columns = (2, 3) if len(panels) > 2 else (1, 1 + len(panels))
    figure, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 4.2 * rows), layout="constrained", squeeze=False)
    left, *rights = axes.flat
    for number, (folder, _, metrics) in enumerate(runs):
        color = f"C{number}"
        x, losses = ([line[key] for line in metrics["train"]] for key in (axis, "loss"))
        left.plot(x, losses, color=color, alpha=0.25, linewidth=0.8)
        left.plot(x, smooth(losses) if losses else [], color=color, label=folder.name)
        for right, (key, _, _) in zip(rights, panels, strict=False):
            points = [(line[axis], line[key]) for line in metrics["val"] if key in line]
            final = metrics["final"][-1].get(key) if metrics["final"] else None
            name = folder.name + ("" if final is None else f", whole split at the end: {final:.3f}")
            if points:  # else a run on other tasks
                right.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=name)
    if not tasks:
        packed = runs[-1][1]["data"]["val_text_compressed"]
        for name, key in (("gzip -9", "gzip_9_bits_per_byte"), ("xz", "xz_bits_per_byte")):
            rights[0].axhline(packed[key], color="grey", linestyle="--", linewidth=0.8)
            rights[0].text(1, packed[key], f"{name} ", va="bottom", ha="right", color="grey",
                           transform=rights[0].get_yaxis_transform())  # fmt: skip
    left.set(xlabel=label, ylabel="nats per scored token" if tasks else "nats per content token", title="training loss")
    for right, (_, unit, title) in zip(rights, panels, strict=False):
        right.set(xlabel=label, ylabel=unit, title=title)
        if tasks:
            right.set_ylim(-0.03, 1.03)
    for spare in rights[len(panels) :]:
        spare.set_axis_off()
    for used in (left, *rights[: len(panels)]):
        used.grid(alpha=0.3)
        used.legend()
    try:
        figure.savefig(output, dpi=150)
    except ValueError as error:
        raise UserError(f"{output} cannot be drawn ({error}): take a name that ends in .png.") from error


def plot_depth(files: list[Path], output: Path) -> None:
    if output.suffix != ".png":
        raise UserError(f"{output} would not be a PNG: take a name that ends in .png.")
    output.write_bytes(png(depth.loss_by_depth, *depth.read(files)))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="*", type=Path, help="folders of runs, by default the one that logged last; or .jsonl files"
    )
    parser.add_argument("--output", type=Path, help="the PNG; by default loss.png or depth.png in the first's folder")
    args = parser.parse_args(argv)
    runs = args.runs or sorted(Path("out").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)[-1:]
    if not runs:
        raise UserError("there is no run in out/: train one first, python train.py config/tiny_meta.py.")
    runs = [path.parent if path.name == "metrics.jsonl" else path for path in runs]
    files = [path for path in runs if path.suffix == ".jsonl"]
    if 0 < len(files) < len(runs):
        raise UserError(f"{files[0]} is a file of an evaluation and others are folders of runs: draw them apart.")
    output = args.output or (runs[0].parent / "depth.png" if files else runs[0] / "loss.png")
    (plot_depth if files else plot)(runs, output)
    print(output)


if __name__ == "__main__":
    run_cli(main)
