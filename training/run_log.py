"""Writes a run's config.json, metrics.jsonl and train.log, and its wandb log. Only rank 0 writes."""

import functools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import nanometa
from nanometa.common.errors import UserError, printable
from nanometa.common.files import leads_out, own_file, parse_json, sync, write_atomically
from nanometa.config import TrainConfig
from nanometa.config.checks import to_dict


@functools.cache
def environment() -> dict:
    """Returns what is needed to repeat a run: the command, versions, the machine and the source commit.

    The values are looked up once, at the start, because a commit made during the run is not the code that runs."""

    def git(*args: str) -> str:
        result = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def finite(value: float) -> float | None:
    """Returns the value, or None if it is not finite: JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def log_files(run_dir: Path) -> tuple[Path, Path]:
    """Returns the paths of metrics.jsonl and train.log, to which a run appends.

    Raises UserError if one of them, or the folder of wandb, is a link out of the run's folder."""
    if leads_out(run_dir / "wandb"):
        raise UserError(f"{run_dir / 'wandb'} is a link out of its folder: replace the link with the folder itself.")
    return own_file(run_dir / "metrics.jsonl"), own_file(run_dir / "train.log")


class RunLog:
    """The log of a run: lines for people (screen and train.log) and for programs (metrics.jsonl and wandb).

    Opening it deletes the lines of metrics.jsonl beyond `step` (all lines if `step` is -1), since those steps are
    trained again. It writes nothing unless `main` is True."""

    def __init__(self, run_dir: Path, cfg: TrainConfig, data: dict, step: int, main: bool):
        self.main, self.wandb = main, None
        if not main:
            return
        self.metrics, text = log_files(run_dir)
        if self.metrics.exists():
            lines = self.metrics.read_text(errors="replace").splitlines()
            kept = "".join(line + "\n" for line in lines if _is_kept(line, step))
            write_atomically(self.metrics, kept.encode())
        resolved = {"config": to_dict(cfg), "data": data, "environment": environment()}
        # Written before any other visible file: it shows --init_from=auto that the folder is a run, even if the run is
        # killed before its first checkpoint.
        write_atomically(run_dir / "config.json", (json.dumps(resolved, indent=2) + "\n").encode())
        self.text = open(text, "a")
        if cfg.wandb != "disabled":
            import wandb

            settings = wandb.Settings(silent=True, console="off")
            self.wandb = wandb.init(
                project="nanometa", name=cfg.run_name, id=cfg.run_name, resume="allow", dir=run_dir, mode=cfg.wandb,
                config=resolved["config"], settings=settings,
            )  # fmt: skip

    def say(self, line: str) -> None:
        """Prints a line and appends it to train.log. Names and texts from files cannot break it into several lines."""
        line = printable(line)
        if self.main:
            print(line, flush=True)
            print(line, file=self.text, flush=True)

    def record(self, kind: str, step: int, **values) -> None:
        """Appends a line to metrics.jsonl. Values whose names end in _s, and mfu, are timings; all others are
        reproducible to the last bit."""
        if not self.main:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def sync(self) -> None:
        """Flushes metrics.jsonl to disk. A checkpoint needs that first: a resume does not write those lines again."""
        if self.main and self.metrics.exists():
            sync(self.metrics)

    def close(self) -> None:
        """Closes train.log and ends the wandb run."""
        if self.main:
            self.text.close()
            if self.wandb:
                self.wandb.finish()


def _is_kept(line: str, step: int) -> bool:
    """Returns whether a run that resumes at `step` keeps this line of metrics.jsonl."""
    try:
        record = parse_json(line)
        return record["step"] <= step and record["kind"] != "final"  # a resumed run writes its own final line
    except (ValueError, TypeError, KeyError):  # a kill can leave half a line at the end
        return False
