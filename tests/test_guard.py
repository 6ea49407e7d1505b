"""Tests the guard against bad steps: all processes skip such a step, it is recorded, and many in a row end the run."""

import dataclasses
import json
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.config.command_line import load_config
from nanometa.data.loader import Windows, window_order
from nanometa.layers.loss import Objective
from nanometa.training.bad_steps import WINDOW, BadStepGuard
from nanometa.training.distributed import Dist
from tests.conftest import ROOT, cli, losses, override
from tests.training_runs import BASE, TORCHRUN, equal, final, metrics, run

CFG = TrainConfig()
CPU = Dist(0, 0, 1, torch.device("cpu"))


def judged_slowly(values: list[float], deviations: float) -> list[bool]:
    """Returns for each finite norm whether it is a spike by the definition."""
    out = []
    for i, value in enumerate(values):
        before = values[max(0, i - WINDOW) : i]
        enough = len(before) >= WINDOW // 2
        out.append(enough and value > statistics.fmean(before) + deviations * statistics.pstdev(before))
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 6), st.integers(0, 299))
def test_spikes_follow_the_definition_also_after_a_resume(seed, deviations, cut):
    generator = torch.Generator().manual_seed(seed)
    norms = (torch.randn(300, generator=generator).exp() + 0.1).tolist()
    cfg = dataclasses.replace(CFG, spike_deviations=deviations)
    guard, found = BadStepGuard(cfg), []
    for i, norm in enumerate(norms):
        if i == cut:
            guard = BadStepGuard(cfg, json.loads(json.dumps(guard.state())))
        take, wrong = guard.judge(1.0, norm)
        assert take  # by default, spikes are logged but not skipped
        found.append(bool(wrong))
    assert found == judged_slowly(norms, deviations)


def test_steps_that_are_not_finite_are_skipped_and_counted():
    guard = BadStepGuard(dataclasses.replace(CFG, max_skipped=3))
    for loss, norm in ((1.0, float("nan")), (float("inf"), 1.0)):
        take, wrong = guard.judge(loss, norm)
        assert not take and "gradient's norm" in wrong
        guard.check(5, "there")
    guard.in_a_row = guard.skipped = 0
    for loss, norm in ((1.0, 0.0), (float("inf"), 1.0)):
        take, wrong = guard.judge(loss, norm)
        assert not take and ("gradient is zero" in wrong) == (norm == 0)
        guard.check(5, "there")
    assert guard.judge(1.0, 1.0) == (True, "") and guard.in_a_row == 0 and guard.skipped == 2
    for _ in range(3):
        guard.judge(float("nan"), 1.0)
    with pytest.raises(
        UserError, match=r"the last 3 steps up to step 9 were skipped.*lower --learning_rate.*resume from there"
    ):
        guard.check(9, "there")


def test_a_spike_is_skipped_with_skip_spikes():
    guard = BadStepGuard(dataclasses.replace(CFG, skip_spikes=True))
    for i in range(100):
        assert guard.judge(1.0, 1.0 + i % 2 / 10) == (True, "")
    take, wrong = guard.judge(1.0, 9.0)
    # (9 - 1.05) / 0.05 deviations
    assert not take and "its gradient's norm 9 is 159.0 deviations above the mean of 1.05" in wrong


def test_a_skipped_spike_does_not_hide_the_next_one():
    """After norms of about 1 and a skipped norm of 1000, a norm of 50 is also a spike: skipped steps do not count."""
    guard = BadStepGuard(dataclasses.replace(CFG, skip_spikes=True))
    for i in range(WINDOW):
        guard.judge(1.0, 1.0 + i % 2 / 10)
    before = guard.state()["norms"]
    assert guard.judge(1.0, 1000.0)[0] is False and guard.state()["norms"] == before
    take, wrong = guard.judge(1.0, 50.0)
    assert not take and "its gradient's norm 50 is " in wrong and "above the mean of 1.05" in wrong
    assert guard.judge(1.0, 1.0) == (True, "") and guard.skipped == 2


# ----------------------------------------------------------------------------- in the training loop


def trainer(workdir, monkeypatch, name, *args) -> train.Trainer:
    monkeypatch.chdir(workdir)
    return train.Trainer(load_config(TrainConfig, override(BASE, f"--run_name={name}", *args)), CPU)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_with_nan_or_inf_changes_no_weight_and_no_moment(workdir, monkeypatch, bad):
    subject = trainer(workdir, monkeypatch, f"poison_{bad}")
    for _ in range(3):
        subject.train_step(False)
    before = {name: p.clone() for name, p in subject.model.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in subject.optimizer.tensors().items()}
    forward = Objective.forward

    def poisoned(self, *batch):
        nats = forward(self, *batch)
        if bad == "loss":
            return nats * float("nan")
        nats.register_hook(lambda grad: grad * float("inf"))
        return nats

    monkeypatch.setattr(Objective, "forward", poisoned)
    subject.train_step(False)
    assert subject.step == 4 and equal(before, subject.model.state_dict())
    assert equal(moments, subject.optimizer.tensors())
    monkeypatch.setattr(Objective, "forward", forward)
    subject.train_step(False)
    assert subject.step == 5 and not equal(before, subject.model.state_dict())
    subject.log.close()
    (line,) = [line for line in metrics(workdir / f"out/poison_{bad}") if line["kind"] == "guard"]
    assert line["step"] == 4 and line["what"] == "skipped"
    assert line["windows"] == window_order(3, 8, subject.train_data.n_windows, 1337).tolist()
    assert "step       4  update skipped: its loss is " in (workdir / f"out/poison_{bad}/train.log").read_text()


POISONED = """
import os, sys
sys.path.insert(0, {root!r})
from nanometa import train
from nanometa.config import command_line as cli
from nanometa.layers.loss import Objective
forward, calls = Objective.forward, []
def poisoned(self, *batch):
    nats = forward(self, *batch)
    if self.training:
        calls.append(1)
    return nats * float("nan") if os.environ.get("RANK") == "1" and len(calls) in (5, 6) else nats
Objective.forward = poisoned
cli.run_cli(train.main)
"""


def test_a_bad_batch_on_one_rank_makes_all_ranks_skip_the_step(workdir, tmp_path):
    """Rank 1 gets NaN in its third step (two micro-batches per step). Both ranks skip that step and stay equal."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(root=str(ROOT)))
    args = override(BASE, "--micro_batch_size=2", "--run_name=one_rank", "--max_steps=6")
    result = cli(str(script), *args, cwd=workdir, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    folder = workdir / "out/one_rank"
    found = losses(folder)
    assert found[2] is None and all(loss is not None for i, loss in enumerate(found) if i != 2)
    assert [line["step"] for line in metrics(folder) if line["kind"] == "guard"] == [3]
    assert all(torch.isfinite(tensor).all() for tensor in final(folder).values())
    assert "NaN" not in (folder / "metrics.jsonl").read_text()  # the file is valid JSON


def test_an_interrupted_evaluation_is_done_on_resume(workdir, monkeypatch):
    """The run is stopped in the evaluation after step 10 and again in the last one. It then equals an uninterrupted
    run."""
    args = ("--eval_windows=40", "--micro_batch_size=2", "--max_steps=12")
    straight = run(workdir, "eval_straight", *args)
    batch, flag = Windows.batch, train.StopFlag

    def stop_in(kind: str, run_name: str):
        subject = trainer(workdir, monkeypatch, run_name, *args, "--init_from=auto")
        stop, calls = flag(), []
        monkeypatch.setattr(train, "StopFlag", lambda: stop)

        def counted(self, windows):
            due = self is subject.val_data and (subject.step == 10 if kind == "val" else subject.step == 12)
            calls.append(due)
            # step 12 is evaluated twice, and the final evaluation is the second
            if sum(calls) > (3 if kind == "val" else 25):
                stop.raised = True
            return batch(self, windows)

        monkeypatch.setattr(Windows, "batch", counted)
        subject.run()
        subject.lock.release()
        monkeypatch.setattr(Windows, "batch", batch)

    for kind in ("val", "final"):
        stop_in(kind, "eval_stopped")
        lines = metrics(workdir / "out/eval_stopped")
        assert lines[-1]["step"] == (10 if kind == "val" else 12) and lines[-1]["kind"] != "final"
    assert "stopped by a signal after step 10" in (workdir / "out/eval_stopped/train.log").read_text()
    resumed = run(workdir, "eval_stopped", *args, "--init_from=resume")
    assert equal(final(resumed), final(straight)) and metrics(resumed) == metrics(straight)
    assert [path.name for path in resumed.glob("best_*")] == [path.name for path in straight.glob("best_*")]
