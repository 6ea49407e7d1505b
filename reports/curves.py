"""Draws the curves of runs from their metrics.jsonl: bits per byte or exact answers in validation, and the training
loss. For files of eval.py perplexity --documents it draws the loss by depth in documents.

python report.py curves                                # the newest run -> out/<run>/loss.png
python report.py curves out/tiny_meta out/tiny_gpt2 --output=compare.png
python report.py curves out/tiny_meta --follow         # redraws while the run is being trained, until it ends
python report.py curves out/tiny_meta/perplexity.jsonl    # -> out/tiny_meta/depth.png
"""

from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.terminal import write_line
from nanometa.config.command_line import Parser, path_argument
from nanometa.reports import depth
from nanometa.reports.drawing import png, tiled
from nanometa.reports.follow import follow
from nanometa.reports.training import draw, heading, looks_of, panels_of, reached, read_run


def picture(folders: list[Path]) -> bytes:
    """Returns a PNG of the curves of all runs."""
    runs = [read_run(folder) for folder in folders]
    if early := [run.folder for run in runs if not run.val]:
        raise UserError(f"{early[0]} has no evaluation yet: wait for the first evaluation of the run.")
    texts = [run.folder for run in runs if not run.tasks]
    if 0 < len(texts) < len(runs):
        raise UserError(
            f"{texts[0]} was trained on text and others on tasks, which have no common axis: draw them separately."
        )
    ends = [
        f"{look['label']}, seed {run.seed}: {reached(run)}"
        for run, look in zip(runs, looks_of(runs).values(), strict=True)
    ]
    panels = [png(draw, *panel) for panel in panels_of(runs).values()]
    if not panels:
        raise UserError(
            f"{', '.join(map(str, folders))} recorded neither a loss nor a result of a step, so there is "
            f"nothing to draw: give folders of runs that train.py wrote."
        )
    return tiled(f"{heading(runs)}. At the end: {'; '.join(ends)}.", panels)


def main(argv: list[str]) -> None:
    parser = Parser(prog="report.py curves", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="*",
        type=path_argument,
        help="folders of runs (by default the run that logged last), or .jsonl files",
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        help="name of the PNG; by default loss.png or depth.png in the folder of the first run",
    )
    parser.add_argument(
        "--follow", action="store_true", help="redraw whenever there are new figures, until the runs end or Ctrl-C"
    )
    parser.add_argument(
        "--interval", type=float, help="for --follow: seconds between two looks at the runs (by default 30)"
    )
    args = parser.parse_args(argv)
    if args.interval is not None and not args.follow:
        raise UserError("--interval has no effect: it is only used with --follow; leave it out, or add --follow.")
    if args.interval is not None and not 0.1 <= args.interval <= 86400:
        raise UserError(f"--interval={args.interval:g} is out of range: it must lie in 0.1 .. 86400.")
    runs = args.runs or sorted(Path("out").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)[-1:]
    if not runs:
        raise UserError("there is no run in out/: train one first, for example python train.py config/tiny_meta.py.")
    runs = [path.parent if path.name == "metrics.jsonl" else path for path in runs]
    files = [path for path in runs if path.suffix == ".jsonl"]
    if 0 < len(files) < len(runs):
        raise UserError(f"{files[0]} is a file of an evaluation, but others are folders of runs: draw them separately.")
    output = args.output or (runs[0].parent / "depth.png" if files else runs[0] / "loss.png")
    if output.suffix != ".png":
        raise UserError(f"{output} does not end in .png, but the picture is a PNG: take a name that does.")
    if files and args.follow:
        raise UserError(f"--follow has no effect on {files[0]}, a file of an evaluation: leave it out.")
    if args.follow:
        return follow(runs, lambda: write_atomically(output, picture(runs)), output, args.interval or 30)
    drawn = png(depth.draw, *depth.read(files), width=7.5) if files else picture(runs)
    write_atomically(output, drawn)
    write_line(str(output))
