"""Tests the queue of a study, which survives kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanometa.common.errors import UserError
from nanometa.common.statistics import holm
from nanometa.studies import queue
from nanometa.studies.analysis import analyse, picture, table
from nanometa.studies.plan import Plan, read_plan
from tests.conftest import ROOT
from tests.fast_cases import every
from tests.study_plans import PLAN, write_plan


@pytest.fixture
def plan_file(tmp_path) -> Path:
    return write_plan(tmp_path)


# ----------------------------------------------------------------------------- the queue


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """Replaces the repository by stand-ins for its commands."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in ("train", "eval", "probe"):
        shutil.copy(ROOT / "tests/study_commands.py", folder / f"{name}.py")
    monkeypatch.setattr(queue, "ROOT", folder)
    monkeypatch.setattr(queue, "POLL_S", 0.02)
    return folder


def run_queue(
    plan: Plan, tmp_path: Path, name: str = "out", workers: int = 2, limit: float | None = None
) -> list[dict]:
    lines = tmp_path / name / "lines.jsonl"
    queue.Queue(plan, lines, tmp_path / name, workers, 1, limit).run()
    return queue.read_lines(lines, plan)


def comparable(lines: list[dict]) -> list[dict]:
    """Returns lines without timings, in the order of their cells."""
    return sorted(({**line, "cpu_s": None} for line in lines), key=lambda line: line["cell"])


def test_the_queue_writes_a_line_for_every_cell(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    lines = run_queue(plan, tmp_path)
    assert {line["cell"] for line in lines} == {cell.key for cell in plan.cells()} and len(lines) == 13
    line = next(line for line in lines if line["cell"] == "deciding/M/1")
    tasks = line["measures"]["tasks"]
    assert [(cell["length"], cell["placement"]) for cell in tasks][:2] == [(128, "target"), (128, "background")]
    assert line["finetune"]["reached_at"] == 4 and line["commit"] == "c" and line["measures"]["text_ablation"]
    assert "outcomes" not in tasks[0] and "arm" not in tasks[0] and all(line["cpu_s"].values())
    assert list(line["cpu_s"]) == [
        "pretrain_M_1",
        "pretrain_M_1_text_ablation",
        "finetune_deciding_M_1",
        "finetune_deciding_M_1_tasks",
    ]
    oracle, plain = (next(of for of in lines if of["cell"] == f"deciding/{arm}/1") for arm in "OM")
    assert oracle["cpu_s"]["pretrain_M_1"] == plain["cpu_s"]["pretrain_M_1"]
    assert oracle["pretrain"] == plain["pretrain"] and oracle["measures"].keys() == {"tasks"}
    assert oracle["measures"]["tasks"] != plain["measures"]["tasks"]
    assert run_queue(plan, tmp_path) == lines  # a second call finds nothing to do
    assert not list((tmp_path / "out/fake").glob("finetune_*/step_*"))


def test_the_cells_of_a_study_without_fine_tuning_train_once(plan_file, commands, tmp_path):
    """Their measures belong to the pretraining, variants change it, and the analysis compares figures alone."""
    start, _, end = PLAN.partition("[sizes.small]")
    end = end.partition("[[analysis.figures]]")[2]
    start = start.replace('finetune = ["--placements target background"]\n', "")
    start = start.replace('of = "finetune"', 'of = "pretrain"')
    plan_file.write_text(f'{start}[analysis]\nstage = "deciding"\n[[analysis.figures]]{end}')
    with pytest.raises(UserError, match=r"has finetune in \[arms.O\], but no finetune in \[settings\]"):
        read_plan(str(plan_file))
    oracle = 'weights_of = "M"\nfinetune = ["--visible=marked"]\n'
    plan_file.write_text(plan_file.read_text().replace(oracle, ""))
    plan = read_plan(str(plan_file))
    lines = run_queue(plan, tmp_path)
    by_cell = {line["cell"]: line for line in lines}
    assert len(lines) == 13 and "finetune" not in lines[0] and by_cell["deciding/G/1"]["measures"]["tasks"]
    assert by_cell["tuning/M/7/low"]["pretrain"] != by_cell["tuning/M/7/high"]["pretrain"]
    results = analyse(plan, lines)
    assert [row.name for row in results.comparisons] == ["H5", "H2"] and not any(map(len, results.curves.values()))
    assert results.levels[0].values["P"].keys() == {1, 2, 3} and results.levels[1].values.keys() == {"M"}
    first, second = (row.p for row in results.comparisons)
    assert {row.holm for row in results.comparisons} == set(holm([first, second]))
    text = table(plan, results)
    assert "bits_per_byte of pretrain, bits per byte:" in text and "exact of text_ablation (placement=text)" in text
    assert picture(plan, results).startswith(b"\x89PNG")


@pytest.mark.parametrize("moments", every(2, [4, 10]))
def test_a_killed_queue_writes_the_lines_of_an_uninterrupted_one(plan_file, commands, tmp_path, moments):
    plan = read_plan(str(plan_file))
    expected = comparable(run_queue(plan, tmp_path, "whole"))
    program = (
        f"import sys; from pathlib import Path; from nanometa.studies import queue\n"
        f"from nanometa.studies.plan import read_plan\n"
        f"queue.ROOT = Path({str(commands)!r}); out = Path({str(tmp_path / 'killed')!r})\n"
        f"queue.Queue(read_plan({str(plan_file)!r}), out / 'lines.jsonl', out, 2, 1, None).run()\n"
    )
    draws, kills = random.Random(5), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    while True:
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
        time.sleep(draws.uniform(1.0, 2.0)) if kills < moments else process.wait()
        if process.poll() is not None:
            break
        kind = draws.choice((signal.SIGTERM, signal.SIGKILL))
        # only the queue, so that its commands are left behind; or all of them, as when a machine goes down
        if draws.random() < 0.5:
            process.send_signal(kind)
        else:
            os.killpg(process.pid, kind)
        process.wait()
        kills += 1
    assert process.returncode == 0
    lines = queue.read_lines(tmp_path / "killed/lines.jsonl", plan)
    assert comparable(lines) == expected
    assert all(len(line["cpu_s"]) == (4 if line["arm"] == "M" else 3) for line in lines)  # also of earlier calls


def test_a_line_that_a_kill_cut_short_is_written_again(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    run_queue(plan, tmp_path)
    path = tmp_path / "out/lines.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert len({line["cell"] for line in run_queue(plan, tmp_path)}) == 13


def test_a_cell_whose_folders_were_deleted_starts_again(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    expected = run_queue(plan, tmp_path)
    for path in (tmp_path / "out/fake").glob("*_M_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = [line for line in expected if not (line["arm"] == "M" and line["seed"] == 1)]
    (tmp_path / "out/lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert comparable(run_queue(plan, tmp_path)) == comparable(expected)


def test_runs_that_differ_are_named_with_the_difference(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    script = (commands / "train.py").read_text()
    (commands / "train.py").write_text(script.replace('"torch": "2"', '"torch": str(time.time())'))
    with pytest.raises(UserError, match="13 cells failed: .* differ in torch"):
        run_queue(plan, tmp_path)


def test_a_cell_that_was_trained_at_two_commits_names_both(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    script = (commands / "train.py").read_text()
    changing = '"commit": "first" if "run_name=pretrain" in str(sys.argv) else "second"'
    (commands / "train.py").write_text(script.replace('"commit": "c"', changing))
    lines = run_queue(plan, tmp_path)
    assert {line["commit"] for line in lines} == {"second and first"}


@pytest.mark.parametrize("changes", ["{'commit': 'before'}", "{'processor': 'another'}"])
def test_all_starts_of_a_resumed_run_count(plan_file, commands, tmp_path, changes):
    plan = read_plan(str(plan_file))
    script = (commands / "train.py").read_text()
    start = '{"environment": ENVIRONMENT, '
    earlier = f'"earlier_environments": [ENVIRONMENT | {changes}], '
    assert start in script
    (commands / "train.py").write_text(script.replace(start, start + earlier))
    if "commit" in changes:
        assert {line["commit"] for line in run_queue(plan, tmp_path)} == {"before and c"}
    else:
        with pytest.raises(UserError, match="13 cells failed: .*the starts of .* differ in processor .another, p"):
            run_queue(plan, tmp_path)


def test_weights_that_a_kill_left_behind_are_removed(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    run_queue(plan, tmp_path)
    left = tmp_path / "out/fake/finetune_deciding_P_1/step_5"
    left.mkdir()
    run_queue(plan, tmp_path)
    assert not left.exists() and list((tmp_path / "out/fake/pretrain_P_1").glob("step_*"))


def test_a_line_of_other_settings_is_refused_but_another_arm_may_change(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    lines = run_queue(plan, tmp_path)
    # the tuning stage overrides the learning rate, so choosing one for the arm changes only the deciding stage
    plan_file.write_text(PLAN.replace('label = "meta"\n', 'label = "meta"\nfinetune = ["--learning_rate=2"]\n'))
    changed = read_plan(str(plan_file))
    path = tmp_path / "out/lines.jsonl"
    with pytest.raises(UserError, match="a line of deciding/M/1 that was measured with other settings"):
        queue.read_lines(path, changed)
    kept = [line for line in lines if not line["cell"].startswith("deciding/M")]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert queue.read_lines(path, changed) == kept


def test_a_failed_command_is_named_and_the_other_cells_are_finished(plan_file, commands, tmp_path):
    plan_file.write_text(PLAN.replace('"--visible=marked"', '"--fail"'))
    plan = read_plan(str(plan_file))
    with pytest.raises(
        UserError, match=r"2 cells failed: deciding/O/1 \(train.py .* ended with status 1 \(this command fails\)"
    ):
        run_queue(plan, tmp_path)
    assert len(queue.read_lines(tmp_path / "out/lines.jsonl", plan)) == 11


def test_a_worker_that_fails_unexpectedly_ends_the_queue(plan_file, commands, tmp_path, monkeypatch):
    """A full disk, for example, must not end one of the threads without a word."""
    plan, written = read_plan(str(plan_file)), []

    def full(path: Path, lines: list[dict]) -> None:
        written.append(lines)
        raise OSError("No space left on device")

    monkeypatch.setattr(queue, "write_lines", full)
    with pytest.raises(OSError, match="No space left"):
        run_queue(plan, tmp_path)
    assert len(written) <= 2  # one for each worker


def test_the_queue_stops_at_its_limit_and_goes_on_later(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    assert len(run_queue(plan, tmp_path, limit=0.5)) < 13
    assert len(run_queue(plan, tmp_path)) == 13


def test_two_queues_share_neither_a_folder_nor_a_file_of_lines(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    first = queue.Queue(plan, tmp_path / "a.jsonl", tmp_path / "out", 1, 1, None)
    with pytest.raises(UserError, match=r"another queue writes to .*a\.jsonl: wait for it"):
        queue.Queue(plan, tmp_path / "a.jsonl", tmp_path / "other", 1, 1, None)
    with pytest.raises(UserError, match="another process works on"):
        queue.Queue(plan, tmp_path / "a.jsonl", tmp_path / "out", 1, 1, None)
    first.lock.release()
