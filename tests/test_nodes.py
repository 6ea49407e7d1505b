"""Tests several machines: two torchrun agents that meet over a socket, and the SLURM script with imitated SLURM
commands."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.training.distributed import fresh_store
from tests.conftest import ROOT, TINY, cli, losses, override

BASE = override(TINY, "--dataset=data/u", "--block_size=32", "--max_steps=5", "--micro_batch_size=4")


def test_two_nodes_give_the_losses_of_one(workdir):
    args = [*BASE, "--run_name=nodes"]
    port = 20000 + os.getpid() % 20000
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test",
                "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", str(ROOT / "train.py"), *args,
            ],
            cwd=workdir, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    out = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], out
    assert sum("2 processes" in stdout for stdout, _ in out) == 1  # only rank 0 prints
    assert cli("train.py", *BASE, "--run_name=node", cwd=workdir).returncode == 0
    assert losses(workdir / "out/nodes") == pytest.approx(losses(workdir / "out/node"), rel=1e-5)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_the_slurm_script_starts_torchrun_on_every_node(tmp_path):
    script(tmp_path / "bin/scontrol", '[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"')
    script(tmp_path / "bin/srun", '"$@"; SLURM_NODEID=1 "$@"')
    script(tmp_path / ".venv/bin/torchrun", 'printf "<%s>" "$@"; echo')
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77"}
    result = subprocess.run(
        ["bash", str(ROOT / "train.sbatch"), "config/meta_gpt2.py", "--run_name=a b"], cwd=tmp_path, text=True,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}, capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    line = (
        "<--nnodes=2><--nproc_per_node=8><--max_restarts=3><--rdzv_id=77><--rdzv_backend=c10d>"
        "<--rdzv_endpoint=n1:29500><train.py><config/meta_gpt2.py><--run_name=a b><--init_from=auto>"
    )
    assert result.stdout.splitlines() == [line, line]


def test_every_start_gets_its_own_part_of_the_store():
    """Three starts share one store, which outlives them as torchrun's does. In the second start, rank 2 dies early."""
    memory, wait = torch.distributed.HashStore(), timedelta(seconds=20)

    def start(ranks=(0, 1, 2), wait=wait) -> dict:
        with ThreadPoolExecutor(len(ranks)) as pool:
            return dict(zip(ranks, pool.map(lambda rank: fresh_store(memory, rank, 3, wait), ranks), strict=True))

    first = start()
    first[1].set("address", "of the first start")
    assert first[0].get("address") == first[2].get("address") == b"of the first start"
    with pytest.raises(UserError, match=r"processes \[2\] of 3 did not connect"):
        start((0, 1), timedelta(seconds=0.5))
    third = start()
    assert not any(store.check(["address"]) for store in third.values())
    third[0].set("address", "of the third")
    assert third[1].get("address") == third[2].get("address") == b"of the third"
