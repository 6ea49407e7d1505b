"""Runs train.py on the small datasets of conftest.py, and compares runs."""

import json
import sys

import safetensors.torch
import torch

from tests.conftest import TINY, cli, override

BASE = (*TINY, "--dataset=data/u", "--block_size=32")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(workdir, name, *args, launcher=(sys.executable,)):
    result = cli("train.py", *override(BASE, f"--run_name={name}", *args), cwd=workdir, launcher=launcher)
    assert result.returncode == 0, result.stderr.decode()[-3000:] + result.stdout.decode()[-2000:]
    return workdir / "out" / name


def final(run_dir) -> dict[str, torch.Tensor]:
    folder = run_dir / (run_dir / "latest").read_text().strip()
    weights, optimizer = (
        safetensors.torch.load_file(folder / f"{kind}.safetensors") for kind in ("model", "optimizer")
    )
    return {**weights, **optimizer}


def metrics(run_dir) -> list[dict]:
    """Returns all that a run recorded, except timings."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
