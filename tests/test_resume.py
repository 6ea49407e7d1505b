"""Tests how runs stop and resume: equal results, signals, and files that a killed run left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch

from nanometa import train
from nanometa.config import TrainConfig
from nanometa.training.checkpoint import load_run
from nanometa.training.resume import occupied
from nanometa.training.run_log import RunLog, earlier_environments
from tests.conftest import ROOT, TWO, losses, override
from tests.fast_cases import every
from tests.training_runs import BASE, equal, final, metrics, run


def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(workdir, straight):
    args = ("--dropout=0.1", "--micro_batch_size=4", "--lr_decay_steps=30")
    run(workdir, "resumed", "--max_steps=17", *args)
    # Lines that were written after the last save must be deleted, because they will be written again.
    with open(workdir / "out/resumed/metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 18, "loss": 0.0}\n{"kind": "tr')
    result = run(workdir, "resumed", "--max_steps=30", *args, "--init_from=resume")
    assert equal(final(result), final(straight))
    lines = [line for line in metrics(result) if (line["step"], line["kind"]) != (17, "val")]
    assert lines == metrics(straight)  # the first part evaluated once more, at its end in step 17
    log = (result / "train.log").read_text()
    assert "changed since the checkpoint: max_steps 17 -> 30" in log
    assert "resumed from out/resumed/step_00000017 at step 17; the run originally started from scratch\n" in log


def test_best_weights_newer_than_the_resumed_step_are_set_aside(workdir, straight, tmp_path):
    """Best weights of step 30 are set aside when the run resumes from step 20. Trained again, they are the same."""
    shutil.copytree(straight, workdir / "out/back")
    assert json.loads((straight / "step_00000030/state.json").read_text())["best"]["step"] == 30
    shutil.rmtree(workdir / "out/back/step_00000030")
    args = ("--dropout=0.1", "--micro_batch_size=4", "--init_from=resume", "--lr_decay_steps=30", "--eval_interval=100")
    back = run(workdir, "back", *args, "--max_steps=21")
    names = {path.name for path in back.glob("*best*")}
    # step 21 is best, because the last step is evaluated and no other best weights are left
    assert names == {"abandoned_best_00000030", "best_00000021"}
    assert load_run(back).state["step"] == 21
    back = run(workdir, "back", *override(args, "--eval_interval=10"), "--max_steps=30")
    assert equal(final(back), final(straight))
    assert {path.name for path in back.glob("*best*")} == {"best_00000030"}
    ours, theirs = (safetensors.torch.load_file(r / "best_00000030/model.safetensors") for r in (back, straight))
    assert equal(ours, theirs)


def test_a_run_may_resume_with_another_number_of_processes(workdir, tmp_path):
    args = ("--lr_decay_steps=12", "--eval_interval=6", "--micro_batch_size=4")
    whole = run(workdir, "whole", "--max_steps=12", *args)
    run(workdir, "elastic", "--max_steps=6", *args)
    elastic = run(workdir, "elastic", "--max_steps=12", *args, "--init_from=resume", launcher=TWO)
    assert losses(elastic) == pytest.approx(losses(whole), rel=1e-5)


def test_init_from_auto_starts_and_later_resumes(workdir):
    """Also in the folder of a run that was killed before its first checkpoint."""
    (workdir / "out/auto/.step_00000001.writing").mkdir(parents=True)
    (workdir / "out/auto/config.json").write_text("{}")
    (workdir / "out/auto/metrics.jsonl").write_text('{"kind": "val", "step": 0, "loss": 9}\n{"kind": "tra')
    first = run(workdir, "auto", "--init_from=auto", "--max_steps=4")
    before = final(first)
    assert [line["step"] for line in metrics(first)] == [0, 1, 2, 3, 4, 4, 4]
    assert [path.name for path in first.glob(".*")] == [".lock"]
    again = run(workdir, "auto", "--init_from=auto", "--max_steps=4")
    assert equal(final(again), before)
    assert len([line for line in metrics(again) if line["kind"] == "train"]) == 4


@pytest.mark.parametrize("number", every(2, [signal.SIGTERM, signal.SIGINT]))
def test_a_signal_saves_a_checkpoint_and_ends_with_status_0(workdir, number):
    name = f"signal{int(number)}"
    command = [sys.executable, str(ROOT / "train.py"), *BASE, f"--run_name={name}", "--max_steps=100000"]
    process = subprocess.Popen(command, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step      25"):
            process.send_signal(number)
            break
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    step = int(re.search(r"stopped by a signal after step ([\d,]+)", out)[1].replace(",", ""))
    assert step >= 25
    run_dir = workdir / "out" / name
    assert (run_dir / "latest").read_text() == f"step_{step:08d}\n"
    resumed = run(workdir, name, "--init_from=resume", f"--max_steps={step + 2}")
    assert [line["step"] for line in metrics(resumed) if line["kind"] == "train"] == list(range(1, step + 3))


def test_a_repeated_signal_counts_once_and_a_later_one_ends_the_process(monkeypatch):
    """torchrun forwards the signal that its processes also got from a scheduler, so they get it twice."""
    previous = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    now, sent = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    try:
        stop = train.StopFlag()
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert stop.raised and not sent
        now[0] += 1.5
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGINT)] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), previous, strict=True):
            signal.signal(number, handler)


def test_a_start_killed_before_config_json_leaves_the_folder_free(tmp_path, monkeypatch):
    """config.json is written before any other visible file. A folder without one was left by a start that was
    killed."""
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        RunLog(tmp_path, TrainConfig(wandb="disabled"), {"chunk_markers": 0}, -1, main=True)
    assert not occupied(tmp_path)


def test_damaged_lines_of_metrics_are_dropped_on_resume(tmp_path):
    lines = [
        b'{"kind": "val", "step": 0}',
        b"\xff\xfe",
        b"\0" * 9,
        b"3",
        b'{"step": 1}',
        b'{"kind": "train", "step": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"kind": "tra')
    RunLog(tmp_path, TrainConfig(wandb="disabled"), {"chunk_markers": 0}, 2, main=True).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines[0] + b"\n" + lines[-1] + b"\n"


def test_a_resumed_run_names_all_its_starts(workdir):
    """Each start once, in order, in config.json and in the checkpoints. A branch has no earlier starts of its own."""

    def commands(path) -> list[str]:
        saved = json.loads(path.read_text())
        return [start["command"].split("--max_steps=")[1][:1] for start in saved["earlier_environments"]]

    for steps in (2, 4, 4, 6):
        folder = run(workdir, "starts", f"--max_steps={steps}", "--init_from=auto")
    assert commands(folder / "config.json") == commands(folder / "step_00000006/state.json") == ["2", "4"]
    branch = run(workdir, "starts_branch", "--max_steps=7", "--branch_from=out/starts/step_00000006")
    assert commands(branch / "config.json") == []


@pytest.mark.parametrize("damage", [None, 3, [3], {"command": "train.py"}])
def test_earlier_starts_of_any_shape_are_read(damage):
    assert earlier_environments({"earlier_environments": damage, "environment": {"command": "x"}}) == [{"command": "x"}]
