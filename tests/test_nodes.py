"""Tests several processes and machines: what they must have in common, who reports an error, and how they meet."""

import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from nanometa.common.errors import ReportedError, UserError
from nanometa.config import TrainConfig
from nanometa.training import agreement, launch
from nanometa.training.distributed import Dist, check_places, fresh_store, wait_for_name
from tests.conftest import ROOT, TINY, cli, losses, override, refusal, start_two, tree
from tests.training_runs import BASE as ONE
from tests.training_runs import TORCHRUN, run

BASE = override(TINY, "--dataset=data/u", "--block_size=32", "--max_steps=5", "--micro_batch_size=4")


@pytest.mark.slow
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


# ----------------------------------------------------------------------------- what processes have in common


def refused_once(results) -> str:
    """Returns the sentence with which two processes ended. Exactly one of them printed it, and nothing else."""
    assert [result.returncode for result in results] == [2, 2], [result.stderr.decode()[-2000:] for result in results]
    said = "".join(result.stderr.decode() for result in results)
    said = "".join(line for line in said.splitlines(keepends=True) if not line.startswith("[W"))  # gloo's own lines
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    return said


COMMAND = ("train.py", *override(ONE, "--micro_batch_size=4", "--max_steps=4", "--run_name=two_ranks"))


@pytest.mark.parametrize(
    ("rank", "changes", "sentence"),
    [
        (1, ("--learning_rate=2e-3",), "rank 1 has learning_rate=0.002, but rank 0 has learning_rate=0.001: start all"),
        (1, ("--seed=2", "--keep=3"), "rank 1 has seed=2 and keep=3, but rank 0 has seed=1337 and keep=2: start all"),
        (0, ("--out_dir=elsewhere",), "rank 1 has out_dir=out, but rank 0 has out_dir=elsewhere"),
        (1, ("--dataset=data/p",), "rank 1 has content of the dataset=[0-9a-f]+, but rank 0 has content"),
        (1, ("--dataset=data/nothing",), "error: rank 1 on .*: there is no dataset in data/nothing"),
        (0, ("--dataset=data/nothing",), "error: there is no dataset in data/nothing"),
        (1, ("--lerning_rate=1",), "error: rank 1 on .*: unknown setting --lerning_rate: did you mean 'learning_rate'"),
        (1, ("--device=cuda",), "rank 1 has device=cuda, but rank 0 has device=cpu"),
    ],
)  # fmt: skip
def test_processes_that_differ_end_with_one_sentence_before_anything_is_written(workdir, rank, changes, sentence):
    before = tree(workdir)
    commands = [COMMAND, COMMAND]
    commands[rank] = override(COMMAND, *changes)
    said = refused_once(start_two((workdir, workdir), *commands))
    assert re.search(sentence, said), said
    assert tree(workdir) == before


def test_a_rank_that_falls_back_to_an_older_checkpoint_is_refused(workdir, tmp_path):
    """Both ranks find the run, but the newest checkpoint of rank 1's machine is damaged."""
    run(workdir, "fallback", "--max_steps=4", "--save_interval=2", "--micro_batch_size=4")
    shutil.copytree(workdir, tmp_path / "copy")
    weights = tmp_path / "copy/out/fallback/step_00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    args = override(COMMAND, "--run_name=fallback", "--max_steps=6", "--save_interval=2", "--init_from=resume")
    before = tree(workdir)
    said = refused_once(start_two((workdir, tmp_path / "copy"), args, args))
    assert re.search(
        r"rank 1 has start=step 2 of out/fallback/step_00000002 \(\w+\); .*model.safetensors is damaged: .*, "
        r"but rank 0 has start=step 4 of out/fallback/step_00000004",
        said,
    ), said
    assert tree(workdir) == before


def test_equal_datasets_may_have_different_paths(workdir, tmp_path):
    shutil.copytree(workdir / "data/u", tmp_path / "data/copy")
    other = override(COMMAND, "--dataset=data/copy")
    results = start_two((workdir, tmp_path), COMMAND, other)
    assert [result.returncode for result in results] == [0, 0], [result.stderr.decode() for result in results]
    assert b"rank 0 of 2 is waiting for the other processes at 127.0.0.1:" in results[0].stdout
    alone = run(workdir, "alone", "--max_steps=4", "--micro_batch_size=4")
    assert losses(workdir / "out/two_ranks") == pytest.approx(losses(alone), rel=1e-5)


def test_an_error_during_training_is_reported_once(workdir):
    """All ranks see the same loss, so all of them end the run."""
    args = ("--run_name=diverged", "--learning_rate=1e30", "--grad_clip=0", "--max_skipped=2", "--max_steps=50")
    args = override(COMMAND, *args)
    assert "training has failed: the last 2 steps" in refused_once(start_two((workdir, workdir), args, args))


@pytest.mark.slow
def test_a_refusal_of_rank_1_under_torchrun_is_one_sentence(workdir, tmp_path):
    script = tmp_path / "one_differs.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from nanometa import train\nfrom nanometa.config.command_line import run_cli\n"
        "sys.argv += ['--seed=5'] if os.environ['RANK'] == '1' else []\nrun_cli(train.main)\n"
    )
    result = cli(str(script), *COMMAND[1:], cwd=workdir, launcher=TORCHRUN, timeout=100)
    error = result.stderr.decode()
    assert result.returncode == 1 and error.count("error: rank 1 has seed=5, but rank 0 has seed=1337") == 1, error


def test_the_code_and_torch_are_compared():
    facts = agreement.program_and_settings(TrainConfig())
    assert {"nanometa.model", "nanometa.training.optimizer", "torch", "learning_rate"} <= facts.keys()
    assert not [name for name in facts if name.startswith("torch.")]
    store = torch.distributed.HashStore()

    def process(rank: int) -> str:
        mine = facts | {"nanometa.model": "edited", "torch": "2.0"} if rank == 1 else facts
        with pytest.raises(ReportedError) as caught:
            Dist(rank, rank, 2, torch.device("cpu"), store).compare("facts", mine)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        said = set(pool.map(process, range(2)))
    assert len(said) == 1
    assert re.match("rank 1 has torch=2.0 and nanometa.model=edited, but rank 0 has torch=", *said), said


# ----------------------------------------------------------------------------- the environment variables of torchrun

PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"LOCAL_RANK": "1"}, "WORLD_SIZE is missing beside LOCAL_RANK=1: start train.py with torchrun, or"),
        ({"WORLD_SIZE": "2"}, "the environment variable RANK is missing beside WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is missing beside RANK=0 and WORLD_SIZE=1"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "WORLD_SIZE is missing beside TORCHELASTIC_RUN_ID=x"),
        ({**PLACE, "RANK": "first"}, "RANK='first' is out of range: it must be a whole number in 0 .. 1 with"),
        ({**PLACE, "RANK": "-1"}, "RANK='-1' is out of range"),
        ({**PLACE, "RANK": "2"}, "RANK='2' is out of range"),
        ({**PLACE, "RANK": "0.5"}, "RANK='0.5' is out of range"),
        ({**PLACE, "LOCAL_RANK": "9"}, "LOCAL_RANK='9' is out of range"),
        ({**PLACE, "WORLD_SIZE": "0"}, "WORLD_SIZE='0' is out of range: it must be a whole number in 1 .. "),
        ({**PLACE, "WORLD_SIZE": "\u0662"}, "WORLD_SIZE='\u0662' is out of range"),
        ({**PLACE, "MASTER_PORT": "http"}, "MASTER_PORT='http' is out of range: it must be a whole number in 1 .."),
        ({**PLACE, "MASTER_PORT": "70000"}, "MASTER_PORT='70000' is out of range"),
        ({**PLACE, "MASTER_PORT": ""}, "MASTER_PORT is missing beside"),
        ({**PLACE, "MASTER_ADDR": ""}, "MASTER_ADDR is missing beside RANK=0 and LOCAL_RANK=0 and WORLD_SIZE=2"),
        ({"TORCHELASTIC_RESTART_COUNT": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RESTART_COUNT='x'"),
    ],
)  # fmt: skip
def test_impossible_places_among_the_processes_are_refused(workdir, env, sentence):
    said = refusal(cli(*COMMAND, cwd=workdir, env=env))
    assert sentence in said and not (workdir / "out/two_ranks_refused").exists()


def test_variables_that_are_empty_count_as_missing(workdir, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert launch.ranks() == (0, 0, 1)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch.ranks() == (0, 0, 1) and not launch.joins_group(1)


def test_processes_with_the_same_rank_or_other_numbers_of_processes_are_refused():
    for places, sentences in (
        ([(0, 2), (1, 2), (1, 2)], ["two processes have RANK=1: give every process a rank of its own."]),
        (
            [(0, 2), (1, 3)],
            [f"rank {a} has WORLD_SIZE={n}, but rank {b} has WORLD_SIZE={m}: set the same number."
             for a, n, b, m in ((0, 2, 1, 3), (1, 3, 0, 2))],
        ),
    ):  # fmt: skip
        store, said = torch.distributed.HashStore(), []

        def check(place, store=store, said=said):
            try:
                check_places(store, *place)
            except UserError as error:
                said.append(str(error))

        with ThreadPoolExecutor(len(places)) as pool:
            list(pool.map(check, places))
        assert sorted(said) == sentences


def test_an_unknown_host_is_not_waited_for_until_the_processes_time_out():
    wait_for_name("127.0.0.1")
    with pytest.raises(OSError):
        wait_for_name("no.such.host.invalid", patience=0)


def test_an_occupied_port_is_reported_in_one_sentence(workdir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {**PLACE, "MASTER_PORT": str(taken.getsockname()[1])}
        result = cli(*COMMAND, cwd=workdir, env=env, timeout=60)
    said = result.stderr.decode()
    assert result.returncode == 2 and "Traceback" not in said
    assert len(said.splitlines()[-1]) < 600 and "frame #" not in said.splitlines()[-1]
    assert said.count("error: rank 0 of 2 cannot meet the other processes at MASTER_ADDR:MASTER_PORT = 127.0.0.1:") == 1
