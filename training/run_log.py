"""Writes a run's config.json, metrics.jsonl and train.log, and its log in a tracker. Only rank 0 writes."""

import functools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

import nanometa
from nanometa.common.errors import UserError, printable
from nanometa.common.files import leads_out, own_file, parse_json, sync, write_atomically
from nanometa.config import TrainConfig
from nanometa.config.checks import to_dict
from nanometa.training.trackers import FOLDERS, TrackerLog


@functools.cache
def environment() -> dict:
    """Returns what is needed to repeat a run: the command, versions, the machine and the source commit.

    The values are looked up once, at the start, because a commit made during the run is not the code that runs."""

    def git(*args: str) -> str:
        try:
            result = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:  # git is not installed
            return ""
        return result.stdout.strip() if result.returncode == 0 else ""

    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "nanometa": nanometa.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def earlier_environments(state: dict) -> list[dict]:
    """Returns the environments of the starts that trained a checkpoint of this run, other than the present one, oldest
    first. state: the checkpoint's state.json."""
    earlier = state.get("earlier_environments")
    found = [*(earlier if isinstance(earlier, list) else []), state.get("environment")]
    known = [one for one in found if isinstance(one, dict) and one != environment()]
    return [one for at, one in enumerate(known) if one not in known[:at]]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def finite(value: float) -> float | None:
    """Returns the value, or None if it is not finite: JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def show(line: str) -> None:
    """Prints a line on the terminal. A run whose terminal or reader is gone prints nothing more, and goes on."""
    try:
        print(printable(line), flush=True)
    except UnicodeEncodeError:  # the terminal's encoding lacks a character
        print(ascii(line)[1:-1], flush=True)
    except OSError as error:
        _discard(sys.stdout)
        try:
            print(f"warning: standard output is gone ({error}), but the run goes on", file=sys.stderr, flush=True)
        except OSError:
            _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Connects a stream that cannot be written to with the null device, because Python flushes it again at the exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def log_files(run_dir: Path) -> tuple[Path, Path]:
    """Returns the paths of metrics.jsonl and train.log, to which a run appends.

    Raises UserError if one of them, or the folder of a tracker, is a link out of the run's folder."""
    for folder in FOLDERS:
        if leads_out(run_dir / folder):
            raise UserError(
                f"{run_dir / folder} is a link out of its folder: delete the link, or replace it with the folder "
                f"itself."
            )
    return own_file(run_dir / "metrics.jsonl"), own_file(run_dir / "train.log")


class RunLog:
    """The log of a run: lines for people (screen and train.log) and for programs (metrics.jsonl and the tracker).

    Opening it deletes the lines of metrics.jsonl beyond `step` (all lines if `step` is -1), since those steps are
    trained again. It writes nothing unless `main` is True. As a context manager, it closes itself."""

    def __init__(
        self, run_dir: Path, cfg: TrainConfig, data: dict, step: int, main: bool, earlier: Sequence[dict] = ()
    ):
        """earlier: the environments of the starts that this one continues.

        Raises UserError if the tracker cannot start, as TrackerLog does."""
        self.main, self.tracker = main, None
        if not main:
            return
        self.metrics, text = log_files(run_dir)
        if self.metrics.exists():
            lines = self.metrics.read_text(errors="replace").splitlines()
            kept = "".join(line + "\n" for line in lines if _is_kept(line, step))
            write_atomically(self.metrics, kept.encode())
        arm = cfg.arm_name(data["chunk_markers"])
        resolved = {
            "arm": arm,
            "config": to_dict(cfg),
            "data": data,
            "environment": environment(),
            "earlier_environments": list(earlier),
        }
        # Written before any other visible file: it shows --init_from=auto that the folder is a run, even if the run is
        # killed before its first checkpoint.
        write_atomically(run_dir / "config.json", (json.dumps(resolved, indent=2) + "\n").encode())
        self.text = open(text, "a", encoding="utf-8")
        if (name := cfg.tracked_by) != "none":
            self.tracker = TrackerLog(name, run_dir, cfg, resolved["config"], step, warn=self.say)

    def say(self, line: str) -> None:
        """Prints a line and appends it to train.log. Unprintable characters, such as line breaks, are escaped."""
        if self.main:
            show(line)
            print(printable(line), file=self.text, flush=True)

    def record(self, kind: str, step: int, **values) -> None:
        """Appends a line to metrics.jsonl. Values whose names end in _s, and mfu, are timings; all others are
        reproducible to the last bit."""
        if not self.main:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.tracker:
            self.tracker.record({f"{kind}/{name}": value for name, value in values.items()}, step)

    def sync(self) -> None:
        """Flushes metrics.jsonl to disk. A checkpoint needs that first: a resume does not write those lines again."""
        if self.main and self.metrics.exists():
            sync(self.metrics)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        self.close(failed=error is not None)

    def close(self, failed: bool = False) -> None:
        """Ends the tracker's log and closes train.log. failed: whether an error ends the run."""
        if self.main:
            if self.tracker:
                self.tracker.close(failed)
            self.text.close()


def _is_kept(line: str, step: int) -> bool:
    """Returns whether a run that resumes at `step` keeps this line of metrics.jsonl."""
    try:
        record = parse_json(line)
        return record["step"] <= step and record["kind"] != "final"  # a resumed run writes its own final line
    except (ValueError, TypeError, KeyError):  # a kill can leave half a line at the end
        return False
