"""Tests the pictures of runs that are being trained: report.py curves --follow, and the run's own loss.png."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.common.files import lock_folder
from nanometa.reports import curves, follow, own_curves
from nanometa.reports.curves import picture
from nanometa.reports.own_curves import OwnCurves
from tests.conftest import ROOT, override
from tests.training_runs import BASE, metrics, run


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": {}}))
    return folder


def record(folder: Path, *steps: int, kind: str = "val") -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        for step in steps:
            line = {"kind": kind, "step": step, "content_tokens": 100 * step, "bits_per_byte": 3.0 - step / 50}
            file.write(json.dumps(line) + "\n")


class Clock:
    """Stands in for the module time in follow.py. Each sleep does the next of `events` in place of waiting."""

    def __init__(self, *events):
        self.events, self.slept = list(events), []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.events.pop(0)()

    def strftime(self, form: str) -> str:
        return "12:00:00"


def interrupt() -> None:
    raise KeyboardInterrupt


def following(monkeypatch, argv: list[str], *events, terminal: bool = False) -> tuple[str, list[int], Clock]:
    """Runs curves --follow while `events` happen. Returns what was printed, the steps that each picture showed, and the
    clock."""
    shown, clock, out = [], Clock(*events), io.StringIO()
    out.isatty = lambda: terminal
    whole = curves.picture

    def noted(folders):
        drawn = whole(folders)
        shown.append([json.loads(row)["step"] for row in (folders[0] / "metrics.jsonl").read_text().splitlines()][-1])
        return drawn

    monkeypatch.setattr(follow, "time", clock)
    monkeypatch.setattr(curves, "picture", noted)
    monkeypatch.setattr(sys, "stdout", out)
    curves.main([*argv, "--follow"])
    assert not clock.events
    return out.getvalue(), shown, clock


def test_a_run_is_redrawn_when_it_has_recorded_something_until_it_ends(tmp_path, monkeypatch):
    folder = write_config(tmp_path / "some")
    lock = lock_folder(folder)
    events = (
        lambda: record(folder, 0), lambda: record(folder, 10), lambda: None, lambda: record(folder, 20),
        lambda: (record(folder, 30), record(folder, 30, kind="final"), lock.release()),
    )  # fmt: skip
    said, shown, clock = following(monkeypatch, [str(folder), "--interval=5"], *events)
    assert shown == [0, 10, 20, 30] and clock.slept == [5] * 5 and said == f"{folder / 'loss.png'}\n"
    monkeypatch.undo()
    assert (folder / "loss.png").read_bytes() == picture([folder])


def test_on_a_terminal_following_says_what_it_does(tmp_path, monkeypatch):
    folder = write_config(tmp_path / "some")
    lock = lock_folder(folder)
    events = (lambda: record(folder, 0), lambda: record(folder, 1200), interrupt)
    said, shown, _ = following(monkeypatch, [str(folder)], *events, terminal=True)
    lock.release()
    assert said.splitlines() == [
        f"following {folder}: redrawing {folder / 'loss.png'} when there are new figures, at most every 30 s; Ctrl-C "
        f"ends",
        f"waiting for the first evaluation of {folder}",
        f"12:00:00 {folder}: step 0",
        f"12:00:00 {folder}: step 1,200",
        "",
        f"{folder / 'loss.png'}",
    ]
    assert shown == [0, 1200]


def test_several_runs_are_followed_until_the_last_one_ends(tmp_path, monkeypatch):
    folders = [write_config(tmp_path / name) for name in ("a", "b")]
    locks = [lock_folder(folder) for folder in folders]
    for folder in folders:
        record(folder, 0)
    events = (lambda: locks[0].release(), lambda: None, lambda: (record(folders[1], 7), locks[1].release()))
    output = tmp_path / "both.png"
    said, shown, _ = following(monkeypatch, [*map(str, folders), f"--output={output}"], *events)
    assert len(shown) == 2 and said == f"{output}\n" and output.exists()


def test_a_run_that_has_ended_is_drawn_once(tmp_path, monkeypatch):
    folder = write_config(tmp_path / "some")
    record(folder, 0, 10)
    assert following(monkeypatch, [str(folder)])[:2] == (f"{folder / 'loss.png'}\n", [10])


def test_the_lock_of_a_folder_that_cannot_be_written_is_not_looked_at(tmp_path, monkeypatch):
    folder = write_config(tmp_path / "some")
    (folder / ".lock").touch()
    record(folder, 0)

    def refused(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(follow, "lock_folder", refused)
    assert follow.is_training(folder)
    record(folder, 10, kind="final")
    assert not follow.is_training(folder)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["out/x", "--interval=5"], "--interval has no effect: it is only used with --follow"),
        (["out/x", "--follow", "--interval=0"], "--interval=0 is out of range: it must lie in 0.1 .. 86400."),
        (["out/x", "--follow", "--interval=nan"], "--interval=nan is out of range"),
        (["out/x", "--follow", "--interval=often"], "argument --interval: invalid float value: 'often'"),
        (["out/x/perplexity.jsonl", "--follow"], "--follow has no effect on out/x/perplexity.jsonl, a file of an"),
        (["out/x", "--follow"], "there is no folder out/x"),
    ],
)
def test_following_what_cannot_change_is_refused(tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        curves.main(argv)
    assert sentence in str(refused.value)


# ----------------------------------------------------------------------------- loss.png of the run itself


def test_a_run_draws_its_curves_at_the_end_and_changes_nothing(workdir, monkeypatch):
    plain = run(workdir, "plain", "--max_steps=3")
    assert not (plain / "loss.png").exists()
    monkeypatch.chdir(workdir)
    train.main(override(BASE, "--run_name=drawn", "--max_steps=3", "--draw_curves=True"))
    drawn = workdir / "out/drawn"
    assert (drawn / "loss.png").read_bytes() == picture([Path("out/drawn")])
    assert metrics(drawn) == metrics(plain)


def test_pictures_at_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """The first picture costs 3 s and the others 1 s, so the second one may follow 150 s after the first."""
    now, costs, drawn = [0.0], [3.0, 1.0, 1.0, 1.0], []

    def slow(folders):
        drawn.append(now[0])
        now[0] += costs.pop(0)
        return b"png"

    monkeypatch.setattr(own_curves.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(curves, "picture", slow)
    own = OwnCurves(tmp_path, pytest.fail)
    for at in range(0, 300, 10):
        now[0] = max(now[0], float(at))
        own.draw(last=False)
    own.draw(last=True)
    assert drawn == [100, 260, 290]


@pytest.mark.parametrize("error", [UserError("there is\nno figure."), MemoryError(), OSError(28, "No space left")])
def test_curves_that_cannot_be_drawn_cost_one_warning_and_no_run(tmp_path, monkeypatch, error):
    def broken(folders):
        raise error

    monkeypatch.setattr(curves, "picture", broken)
    warnings = []
    own = OwnCurves(tmp_path, warnings.append)
    for _ in range(3):
        own.draw(last=True)
    (said,) = warnings
    assert said.startswith("warning: the curves could not be drawn (") and f"report.py curves {tmp_path} draws" in said
    assert "\n" not in said and not list(tmp_path.iterdir())


def test_curves_that_are_switched_off_are_not_drawn(tmp_path):
    own = OwnCurves(tmp_path, pytest.fail, on=False)
    own.draw(last=True)
    assert not list(tmp_path.iterdir())


def test_a_run_loads_matplotlib_only_to_draw():
    code = "import sys, nanometa.reports.own_curves; print([name in sys.modules for name in ('matplotlib', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[False, False]", done.stderr
