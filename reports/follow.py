"""Redraws the picture of runs while they are being trained, for report.py curves --follow."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import lock_folder
from nanometa.common.terminal import write_line
from nanometa.reports.training import METRICS, read_run


def follow(runs: list[Path], draw: Callable[[], object], output: Path, interval_s: float) -> None:
    """Calls `draw` now, whenever a run has recorded something new, and when the last run has ended.

    draw: draws the runs into the file `output`. A run that has no evaluation yet is waited for. Returns when no process
    trains in the folders any more, or when the user presses Ctrl-C. Raises UserError as `draw` does, except before the
    first evaluation of a run that is being trained."""
    say = write_line if sys.stdout.isatty() else lambda line: None
    names = ", ".join(map(str, runs))
    say(
        f"following {names}: redrawing {output} when there are new figures, at most every {interval_s:g} s; Ctrl-C ends"
    )
    seen, drawn = None, False
    try:
        while True:
            active = [run for run in runs if is_training(run)]  # before the figures are read, so the last are drawn
            waiting = [run for run in runs if run in active and not _has_evaluation(run)]
            if waiting:
                say(f"waiting for the first evaluation of {waiting[0]}")
            elif (stamps := _stamps(runs)) != seen:
                draw()
                seen, drawn = stamps, True
                say(f"{time.strftime('%H:%M:%S')} {'; '.join(f'{run}: step {_step(run):,}' for run in runs)}")
            if not active:
                say(f"no process trains in {names} any more")
                break
            time.sleep(interval_s)
    except KeyboardInterrupt:
        say("")  # the terminal shows ^C
    if drawn:
        write_line(str(output))


def is_training(run: Path) -> bool:
    """Returns whether a process is training in the folder of a run, which it then holds the lock of.

    In a folder that cannot be written, the lock is not looked at: the run then counts as ended once it has recorded its
    final evaluation."""
    if not (run / ".lock").exists():
        return False
    try:
        lock = lock_folder(run)
    except OSError:
        return not read_run(run).final
    if lock is None:
        return True
    lock.release()
    return False


def _has_evaluation(run: Path) -> bool:
    """Returns whether a run has recorded an evaluation. A run that has just started may have no file yet."""
    try:
        return bool(read_run(run).val)
    except UserError:
        if (run / METRICS).exists():
            raise
        return False


def _stamps(runs: list[Path]) -> list[tuple[int, int]]:
    """Returns the sizes and times of the runs' records, which change when a run records something."""
    facts = [(run / METRICS).stat() for run in runs if (run / METRICS).exists()]
    return [(fact.st_size, fact.st_mtime_ns) for fact in facts]


def _step(run: Path) -> int:
    """Returns the last step that a run has recorded."""
    record = read_run(run)
    return max(line["step"] for line in record.train + record.val)
