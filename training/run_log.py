"""What a run leaves behind besides checkpoints: config.json, metrics.jsonl, train.log, wandb. Rank 0 writes."""

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import nanometa
from nanometa.common.files import sync, write_atomically
from nanometa.config import TrainConfig
from nanometa.config.checks import to_dict


@functools.cache
def environment() -> dict:
    """What a reviewer needs to repeat a run: command, versions, machine, source commit.

    Looked up once, at the start: a commit that is made while the run goes on is not the code that runs."""

    def git(*args: str) -> str:
        result = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
        return result.stdout.strip() if result.returncode == 0 else ""

    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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


class RunLog:
    """Lines for people (screen and train.log) and for programs (metrics.jsonl, wandb).

    Lines of metrics.jsonl beyond `step` are cut, -1 cuts all: those steps are trained again. Silent unless main."""

    def __init__(self, run_dir: Path, cfg: TrainConfig, data: dict, step: int, main: bool):
        self.main, self.wandb = main, None
        if not main:
            return
        self.metrics = run_dir / "metrics.jsonl"
        if self.metrics.exists():
            lines = self.metrics.read_text(errors="replace").splitlines()
            kept = "".join(line + "\n" for line in lines if _is_kept(line, step))
            write_atomically(self.metrics, kept.encode())
        resolved = {"config": to_dict(cfg), "data": data, "environment": environment()}
        # before any other file that is not hidden: by this one --init_from=auto knows a run that was killed early
        write_atomically(run_dir / "config.json", (json.dumps(resolved, indent=2) + "\n").encode())
        self.text = open(run_dir / "train.log", "a")
        if cfg.wandb != "disabled":
            import wandb

            settings = wandb.Settings(silent=True, console="off")
            self.wandb = wandb.init(
                project="nanometa", name=cfg.run_name, id=cfg.run_name, resume="allow", dir=run_dir, mode=cfg.wandb,
                config=resolved["config"], settings=settings,
            )  # fmt: skip

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)
            print(line, file=self.text, flush=True)

    def record(self, kind: str, step: int, **values) -> None:
        """One line of metrics.jsonl. Names that end in _s, and mfu, are timings; all else repeats bit for bit."""
        if not self.main:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def sync(self) -> None:
        """Metrics that a checkpoint follows on are on disk before it: a resume would not write them again."""
        if self.main and self.metrics.exists():
            sync(self.metrics)

    def close(self) -> None:
        if self.main:
            self.text.close()
            if self.wandb:
                self.wandb.finish()


def _is_kept(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return record["step"] <= step and record["kind"] != "final"  # not the end after all
    except (ValueError, TypeError, KeyError):  # a kill can cut the last line short
        return False
