"""Tests runs on tasks that end early because their answers are exact enough: --stop_at."""

import dataclasses
import json
import shutil

import pytest

from nanometa import train as train_command
from nanometa.common.errors import UserError
from nanometa.config import TaskConfig, TrainConfig
from nanometa.config.command_line import load_config
from nanometa.reports.training import read_run
from nanometa.training import messages
from nanometa.training.checkpoint import load_run
from nanometa.training.ending import Ending
from nanometa.training.optimizer import decay_of, learning_rate
from tests.conftest import TINY, TWO, cli, override, refusal
from tests.fast_cases import every
from tests.training_runs import equal, final, metrics

TASK = TaskConfig(tasks=("parity", "copying"), placements=("none", "target"))
# the last 22 of 110 steps are the decay
CFG = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110, schedule="wsd", task=TASK, stop_at=0.5)


def figures(*shares: float) -> dict:
    """Returns figures with the share of exact answers of each cell; those of the tasks alone are 1."""
    names = [f"{task}_{at}" for task in TASK.tasks for at in TASK.placements]
    return {"exact_parity": 1.0, "exact_copying": 1.0} | {
        f"exact_{name}": share for name, share in zip(names, shares, strict=True)
    }


HIGH, LOW = figures(0.75, 0.5, 1.0, 1.0), figures(0.75, 0.5, 0.49, 1.0)


def ending(step: int, **changes) -> Ending:
    """Returns the ending of a run whose evaluation after a step has enough exact answers."""
    made = Ending(dataclasses.replace(CFG, **changes))
    made.judge(step, HIGH)
    return made


def test_every_cell_must_have_the_share():
    made = Ending(CFG)
    assert not made.judge(40, LOW) and made.reached is None and made.last == 110
    assert [made.rate(step) for step in range(120)] == [learning_rate(step, CFG) for step in range(120)]
    assert made.judge(41, HIGH) and made.reached == {"step": 41, "exact": 0.5, "end": 63}
    assert not made.judge(42, HIGH) and made.last == 63  # it has ended already


@pytest.mark.parametrize("step", [10, 40, 87])
def test_the_decay_after_the_evaluation_is_that_of_the_normal_end(step):
    made = ending(step)
    assert made.last == step + 22
    assert [made.rate(i) for i in range(step)] == [learning_rate(i, CFG) for i in range(step)]
    assert [made.rate(step + i) for i in range(30)] == [learning_rate(88 + i, CFG) for i in range(30)]


def test_a_decay_that_begins_in_the_warm_up_starts_from_its_rate():
    made = ending(5)
    rates = [made.rate(step) for step in range(28)]
    assert rates[:6] == [learning_rate(step, CFG) for step in range(6)] and made.last == 27
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[27] == pytest.approx(0.1)
    assert rates[16] == pytest.approx(0.1 + (6 / 11 - 0.1) * (1 - 0.5**0.5))


def test_the_end_stays_if_the_decay_has_begun():
    for step in (88, 100, 110):
        made = ending(step)
        assert made.reached == {"step": step, "exact": 0.5, "end": None} and made.last == 110
        assert [made.rate(i) for i in range(120)] == [learning_rate(i, CFG) for i in range(120)]
        assert not made.judge(step + 1, HIGH)  # said once


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_other_schedules_end_at_the_evaluation(schedule):
    made = ending(40, schedule=schedule, min_lr=0.0)
    assert made.last == made.reached["end"] == 40
    assert made.rate(39) == learning_rate(39, made.cfg)


def test_max_steps_is_the_cap_of_the_decay():
    made = ending(90, lr_decay_steps=200)  # whose decay takes 40 steps
    assert made.reached["end"] == 130 and made.last == 110
    longer = Ending(dataclasses.replace(CFG, lr_decay_steps=200, max_steps=200), made.reached, 110)
    assert longer.last == 130 and longer.rate(110) == made.rate(110) < 1


def test_evaluations_before_the_first_step_or_in_the_curriculum_do_not_count():
    assert ending(0).reached is None
    assert ending(49, task=dataclasses.replace(TASK, curriculum_steps=50)).reached is None
    assert ending(50, task=dataclasses.replace(TASK, curriculum_steps=50)).last == 72


def test_a_resumed_run_keeps_its_end_unless_its_answers_are_not_enough_any_more():
    state = json.loads(json.dumps(ending(40).reached))
    for kept in (CFG, dataclasses.replace(CFG, stop_at=0.3), dataclasses.replace(CFG, max_steps=1000)):
        assert Ending(kept, state, 45).last == 62
    for dropped in (dataclasses.replace(CFG, stop_at=0.51), dataclasses.replace(CFG, stop_at=None)):
        made = Ending(dropped, state, 45)
        assert made.reached is None and made.last == 110 and made.rate(45) == 1.0
    # no step since the evaluation: the end is that of an uninterrupted run with these settings
    assert Ending(dataclasses.replace(CFG, max_steps=1000), state, 40).last == 240
    assert Ending(dataclasses.replace(CFG, schedule="constant"), state, 40).last == 40


def test_a_finished_run_says_how_to_go_on():
    made = ending(40)
    assert made.finished(61) == [] == Ending(CFG).finished(110)
    (said,) = made.finished(62)
    assert said.startswith("the run is finished: after step 40 every cell had at least 50.0% exact answers")
    assert said.endswith("it ended after step 62; to train further, give --stop_at=None or a --stop_at above 0.5")
    (said,) = ending(40, max_steps=40, lr_decay_steps=110, schedule="constant").finished(40)
    assert said.endswith("above 0.5 and a --max_steps above 40")


def test_the_line_of_the_evaluation_says_when_the_run_ends():
    said = [messages.stop_at_line(40, 0.5, 0.625, end, last) for end, last in ((62, 62), (40, 40), (None, 110))]
    assert said[0].startswith("step      40  every cell has at least 62.5% exact answers (stop_at=0.5); the learning ")
    assert [line.rpartition(", ")[2] for line in said] == [
        "and the run ends after step 62",
        said[1].rpartition(", ")[2],
        "so the run ends after step 110 as planned",
    ]
    assert said[1].endswith("(stop_at=0.5); the run ends here")


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(UserError, match=f"^stop_at={share} is out of range: it must lie in "):
        TrainConfig(stop_at=share, task=TASK)


def test_a_run_on_text_refuses_it():
    with pytest.raises(UserError, match="^--stop_at has no effect: it is only used with --tasks"):
        load_config(TrainConfig, ["--stop_at=0.5"], config_file=True)


# ----------------------------------------------------------------------------- runs
# A new model answers half of the parity texts within ten steps, by always giving the same answer.

BASE = (*TINY, "--dataset=data/u", "--block_size=96", "--position=rope", "--train_length=96", "--level=easy")
BASE = override(BASE, "--batch_size=16", "--micro_batch_size=16", "--learning_rate=1e-2", "--schedule=wsd",
                "--eval_windows=None", "--eval_interval=6", "--save_interval=5")  # fmt: skip


def train(workdir, name, *args, **how):
    args = override(BASE, f"--run_name={name}", *args)
    result = cli("train.py", *args, "--tasks", "parity", "--placements", "none", "target", cwd=workdir, **how)
    assert result.returncode == 0, result.stderr.decode()[-3000:] + result.stdout.decode()[-2000:]
    return workdir / "out" / name


def steps(run_dir, kind="train") -> list[int]:
    return [line["step"] for line in metrics(run_dir) if line["kind"] == kind]


@pytest.fixture(scope="module")
def ended(workdir):
    """A run that reaches its share at step 12 and has 40 steps at most, so that it ends after step 20."""
    return train(workdir, "ended", "--max_steps=40", "--stop_at=0.3")


def test_a_run_that_reaches_the_share_decays_and_ends(ended):
    (line,) = [line for line in metrics(ended) if line["kind"] == "stop_at"]
    step, end = line["step"], line["end"]
    assert line == {"kind": "stop_at", "step": step, "stop_at": 0.3, "exact": line["exact"], "end": step + 8}
    val = {line["step"]: line for line in metrics(ended) if line["kind"] == "val"}
    cells = {at: min(of[f"exact_parity_{place}"] for place in ("none", "target")) for at, of in val.items()}
    assert line["exact"] == cells[step] >= 0.3 and all(share < 0.3 for at, share in cells.items() if at < step)
    assert steps(ended) == list(range(1, end + 1)) and steps(ended, "final") == [end] and end < 40
    rates = [line["learning_rate"] for line in metrics(ended) if line["kind"] == "train"]
    normal = TrainConfig(learning_rate=1e-2, min_lr=1e-4, warmup_steps=3, schedule="wsd", max_steps=40)
    assert decay_of(normal) == (32, 40)
    assert rates == [learning_rate(i if i < step else i - step + 32, normal) for i in range(end)]
    assert load_run(ended / f"step_{end:08d}").state["stop_at"] == {"step": step, "exact": line["exact"], "end": end}
    log = (ended / "train.log").read_text()
    assert "whole run: at most 40 steps" in log and f"and the run ends after step {end}\n" in log
    assert f"step {end:>7}/{end}  loss" in log and "time left 0:00\nstep" in log
    assert read_run(ended).stop_at == [{name: line[name] for name in ("kind", "step", "stop_at", "exact", "end")}]


def test_a_run_that_does_not_reach_it_equals_one_without(workdir):
    with_it, without = (
        train(workdir, f"all_{share}", "--max_steps=8", f"--stop_at={share}") for share in ("1.0", "None")
    )
    assert metrics(with_it) == metrics(without) and equal(final(with_it), final(without))
    assert load_run(with_it).state["stop_at"] is None


@pytest.mark.parametrize("at", every(3, ["reached", 5, "decay"]))
def test_an_interrupted_run_equals_an_uninterrupted_one(workdir, ended, at):
    """Interrupted before, at and after the evaluation that reached the share."""
    (reached,) = steps(ended, "stop_at")
    stop = {5: 5, "reached": reached, "decay": reached + 3}[at]
    name = f"cut_{at}"
    # a first part that ends with a lower cap; its schedule is that of the whole run
    train(workdir, name, f"--max_steps={stop}", "--lr_decay_steps=40", "--stop_at=0.3")
    again = train(workdir, name, "--max_steps=40", "--lr_decay_steps=40", "--stop_at=0.3", "--init_from=resume")
    extra = (stop, "val") if stop % 6 else None  # the first part evaluates at its end
    assert [line for line in metrics(again) if (line["step"], line["kind"]) != extra] == metrics(ended)
    assert equal(final(again), final(ended))


@pytest.mark.parametrize("schedule", every(2, ["constant", "wsd"]))
def test_a_signal_during_the_evaluation_that_reaches_the_share(workdir, monkeypatch, schedule):
    """The resumed run makes the evaluation. A constant schedule then ends at once, and the checkpoint must know why."""
    monkeypatch.chdir(workdir)
    evaluate, calls = train_command.evaluate, []

    def interrupted(*args):
        calls.append(len(calls))  # not the arguments, which would keep the run and its lock alive
        return evaluate(*args) if len(calls) == 1 else None  # None: a signal arrived; the second is that of step 12

    def start(name, *more):
        args = override(BASE, f"--run_name={name}", "--max_steps=40", "--stop_at=0.3", "--eval_interval=12",
                        f"--schedule={schedule}", *more)  # fmt: skip
        train_command.main([*args, "--tasks", "parity", "--placements", "none", "target"])
        return workdir / "out" / name

    straight = start(f"straight_{schedule}")
    monkeypatch.setattr(train_command, "evaluate", interrupted)
    cut = start(f"signal_{schedule}")
    assert len(calls) == 2 and steps(cut)[-1] == 12 and steps(cut, "stop_at") == []
    monkeypatch.setattr(train_command, "evaluate", evaluate)
    for _ in range(2):  # the second time, the run is finished
        start(f"signal_{schedule}", "--init_from=auto")
        assert metrics(cut) == metrics(straight) and equal(final(cut), final(straight))
    assert steps(cut, "stop_at") == [12] and "the run is finished: after step 12 " in (cut / "train.log").read_text()


def test_a_finished_run_trains_no_further_until_it_is_told_how(workdir, ended):
    shutil.copytree(ended, workdir / "out/again")
    end = steps(ended)[-1]
    before = final(ended)
    for init in ("resume", "auto"):
        again = train(workdir, "again", "--max_steps=60", "--stop_at=0.3", f"--init_from={init}")
        assert equal(final(again), before) and steps(again) == steps(ended) and steps(again, "final") == [end]
    log = (again / "train.log").read_text()
    assert log.count(f"so it ended after step {end}; to train further, give --stop_at=None or a --stop_at above ") == 2
    further = train(workdir, "again", f"--max_steps={end + 2}", "--stop_at=None", "--init_from=resume")
    assert steps(further)[-1] == end + 2 and load_run(further).state["stop_at"] is None
    assert "the result will differ from a run that has these settings" in (further / "train.log").read_text()


def test_a_branch_of_a_decaying_run_ends_with_it(workdir, ended):
    (reached,) = steps(ended, "stop_at")
    folder = min(path for path in ended.glob("step_*") if int(path.name[5:]) > reached)
    branch = train(workdir, "branch", "--max_steps=40", "--stop_at=0.3", f"--branch_from=out/ended/{folder.name}")
    assert equal(final(branch), final(ended))


def test_two_processes_end_at_the_same_step_as_one(workdir, ended):
    two = train(workdir, "two", "--max_steps=40", "--stop_at=0.3", "--micro_batch_size=4", launcher=TWO)
    assert steps(two) == steps(ended) and steps(two, "stop_at") == steps(ended, "stop_at")


def test_other_schedules_end_at_the_evaluation_and_save_there(workdir):
    short = train(workdir, "constant", "--max_steps=40", "--stop_at=0.3", "--schedule=constant", "--eval_interval=11")
    (end,) = steps(short, "stop_at")
    assert steps(short)[-1] == end and (short / f"step_{end:08d}").is_dir() and steps(short, "final") == [end]


def test_a_dry_run_says_that_it_estimates_the_cap(workdir):
    args = override(BASE, "--max_steps=40", "--stop_at=0.3", "--dry_run=True", "--n_accelerators=1")
    result = cli("train.py", *args, "--tasks", "parity", cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    assert "stop_at=0.3 " in result.stdout.decode() and "the estimate is for all steps" in result.stdout.decode()
    assert "has no effect" in refusal(cli("train.py", *override(TINY, "--stop_at=0.3"), cwd=workdir))
