"""Finds runs and checkpoints by the names of their folders, and suggests one for a path that has none."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import own_file, parse_json
from nanometa.config.checks import similar_path

STATE = "state.json"  # a file that every checkpoint contains
# what a run writes before its first checkpoint
START = {"config.json", "metrics.jsonl", "train.log", "wandb", "tensorboard"}


def checkpoint_folders(run_dir: Path, kind: str) -> list[Path]:
    """Returns the folders named exactly <kind>_<8 digits>, oldest first; copies with other names are not ours.

    They come from one listing, because a run that saves and deletes has a checkpoint at any one moment only."""
    if not run_dir.is_dir():
        return []
    with os.scandir(run_dir) as entries:
        names = [
            entry.name
            for entry in entries
            if re.fullmatch(rf"{kind}_\d{{8}}", entry.name, re.ASCII)
            and (entry.is_dir(follow_symlinks=False) or Path(entry).is_dir())
        ]
    return [run_dir / name for name in sorted(names)]


def holds_run(path: Path) -> bool:
    """Returns whether a path is the folder of a checkpoint, or of a run that train.py made and that has a
    checkpoint."""
    return (path / STATE).is_file() or bool(checkpoint_folders(path, "step") + checkpoint_folders(path, "best"))


def holds_killed_start(run_dir: Path) -> bool:
    """Returns whether a folder holds only what a run writes before its first step. Its process was killed then, unless
    it still holds the lock of the folder.

    Such a folder contains no result, so a new run may take it over. Hidden files are not looked at."""
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")} if run_dir.is_dir() else set()
    if "config.json" not in names or not names <= START:
        return False
    metrics = own_file(run_dir / "metrics.jsonl")
    rows = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    return all(_precedes_steps(row) for row in rows if row.endswith(b"\n"))  # a kill can leave half a line at the end


def _precedes_steps(row: bytes) -> bool:
    """Returns whether a line of metrics.jsonl is that of an evaluation before the first step."""
    try:
        return parse_json(row)["step"] == 0
    except (ValueError, TypeError, KeyError):
        return False


def newest_run(out: Path) -> Path:
    """Returns the run in a folder of runs that saved last. Raises UserError if there is none."""
    pointers = sorted((path for path in out.glob("*/latest") if path.is_file()), key=lambda path: path.stat().st_mtime)
    if not pointers:
        raise UserError(
            f"there is no trained run in {out}/: train one first, with python train.py config/tiny_meta.py."
        )
    return pointers[-1].parent


def suggestion(path: Path, known: Iterable[str] = ()) -> str:
    """Returns the end of an error message about a path that is not a checkpoint: which one may be meant.

    known: other names that may be misspelled, in addition to those of runs."""
    for run in (path, path.parent):
        if kept := [folder.name for kind in ("step", "best") for folder in checkpoint_folders(run, kind)]:
            return f"the checkpoints of {run} are {', '.join(kept)}; name one of them."
    if inside := _runs_in(path):
        return f"name one of the runs in it, such as {inside[0]}."
    close = similar_path(str(path), [*known, *map(str, _runs_in(path.parent) + _runs_in(Path("out")))])
    if close:
        return f"did you mean {close!r}?"
    return "name a run that train.py made, such as out/NAME, or one of its checkpoints."


def _runs_in(folder: Path) -> list[Path]:
    """Returns the runs in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if holds_run(path)) if folder.is_dir() else []
