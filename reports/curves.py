"""Draws the loss curves of runs from their metrics.jsonl, with bits per byte beside them, or exact answers for runs on
tasks. For files of eval.py perplexity --documents it draws the loss by depth in documents.

python report.py curves                                # the newest run -> out/<run>/loss.png
python report.py curves out/tiny_meta out/tiny_gpt2 --output=compare.png
python report.py curves out/tiny_meta/perplexity.jsonl    # -> out/tiny_meta/depth.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.reports import depth
from nanometa.reports.drawing import png
from nanometa.reports.training import draw_losses, draw_packed, draw_values, read_run


def plot(folders: list[Path], output: Path) -> None:
    runs = [read_run(folder) for folder in folders]
    if early := [run.folder for run in runs if not run.val]:
        raise UserError(f"{early[0]} has no evaluation yet: wait for the first evaluation of the run.")
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    texts = [run.folder for run in runs if not run.tasks]
    if tasks and texts:
        raise UserError(
            f"{texts[0]} was trained on text and others on tasks, which have no common axis: draw them separately."
        )
    # runs on tasks are drawn by steps because tokens of their texts may be padding
    axis, label = ("step", "steps") if tasks else ("content_tokens", "content tokens")
    panels = [(f"exact_{task}", "share of exact answers", task.replace("_", " ")) for task in tasks] or [
        ("bits_per_byte", "bits per byte", "validation")
    ]
    rows, columns = (2, 3) if len(panels) > 2 else (1, 1 + len(panels))
    figure, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 4.2 * rows), layout="constrained", squeeze=False)
    left, *rights = axes.flat
    for number, run in enumerate(runs):
        look = {"color": f"C{number}", "label": run.folder.name}
        draw_losses(left, run, axis, look)
        for right, (key, _, _) in zip(rights, panels, strict=False):
            final = run.final[-1].get(key) if run.final else None
            ends = "" if final is None else f", whole split at the end: {final:.3f}"
            draw_values(right, run, axis, key, {**look, "label": look["label"] + ends})
    if not tasks:
        draw_packed(rights[0], runs[-1])
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
        raise UserError(f"{output} does not end in .png, but the picture is a PNG: take a name that does.")
    write_atomically(output, png(depth.loss_by_depth, *depth.read(files), width=7.5))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="report.py curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, help="folders of runs, by default the one that logged last, or .jsonl files"
    )
    parser.add_argument(
        "--output", type=Path, help="name of the PNG; by default loss.png or depth.png in the folder of the first run"
    )
    args = parser.parse_args(argv)
    runs = args.runs or sorted(Path("out").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)[-1:]
    if not runs:
        raise UserError("there is no run in out/: train one first, for example python train.py config/tiny_meta.py.")
    runs = [path.parent if path.name == "metrics.jsonl" else path for path in runs]
    files = [path for path in runs if path.suffix == ".jsonl"]
    if 0 < len(files) < len(runs):
        raise UserError(f"{files[0]} is a file of an evaluation, but others are folders of runs: draw them separately.")
    output = args.output or (runs[0].parent / "depth.png" if files else runs[0] / "loss.png")
    (plot_depth if files else plot)(runs, output)
    print(output)
