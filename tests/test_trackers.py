"""Tests that a tracker gets the figures of metrics.jsonl, and that it changes neither them nor the run."""

import builtins
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.config.command_line import load_config
from nanometa.training.run_log import RunLog
from tests.conftest import override
from tests.training_runs import BASE, equal, final, metrics, run

STEPS = 20


def load(*argv: str) -> TrainConfig:
    return load_config(TrainConfig, list(argv), config_file=True)


# ----------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("argv", "tracker"),
    [
        ((), "wandb"), (("--wandb=offline",), "wandb"), (("--wandb=online",), "wandb"),
        (("--wandb=disabled",), "none"), (("--tracker=wandb",), "wandb"), (("--tracker=none",), "none"),
        (("--tracker=tensorboard",), "tensorboard"), (("--tracker=wandb", "--wandb=online"), "wandb"),
        (("--tracker=none", "--wandb=disabled"), "none"),
        (("--tracker=tensorboard", "--wandb=disabled"), "tensorboard"),
    ],
)  # fmt: skip
def test_the_setting_wandb_chooses_the_tracker_unless_tracker_is_given(argv, tracker):
    assert load(*argv).tracked_by == tracker


@pytest.mark.parametrize(
    ("tracker", "wandb"),
    [("wandb", "disabled"), ("none", "offline"), ("none", "online"), ("tensorboard", "offline"),
     ("tensorboard", "online")],
)  # fmt: skip
def test_contradictory_trackers_are_refused_wherever_they_are_given(tmp_path, tracker, wandb):
    said = f"tracker={tracker} and wandb={wandb} contradict each other: give only one of them."
    (tmp_path / "c.py").write_text(f"from config import TrainConfig\nconfig = TrainConfig(wandb={wandb!r})")
    for argv in ((f"--tracker={tracker}", f"--wandb={wandb}"), (str(tmp_path / "c.py"), f"--tracker={tracker}")):
        with pytest.raises(UserError) as refused:
            load(*argv)
        assert said in str(refused.value)


# ----------------------------------------------------------------------------- runs


def wandb_history(run_dir: Path) -> list[dict]:
    """Returns the rows of a run's offline file, which consists of protocol buffers in the framing of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    raw, at, whole, rows = path.read_bytes(), 7, b"", []
    assert raw.startswith(b":W&B")
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:  # a block ends with zeros where no header fits
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        whole += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def tensorboard_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """Returns the values of each scalar by step, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def recorded(run_dir: Path) -> dict[str, dict[int, object]]:
    """Returns the values of metrics.jsonl, timings included, by the names that trackers get."""
    found: dict = {}
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name not in ("kind", "step"):
                found.setdefault(f"{line['kind']}/{name}", {})[line["step"]] = value
    return found


@pytest.fixture(scope="module")
def untracked(workdir) -> Path:
    return run(workdir, "untracked", f"--max_steps={STEPS}", "--tracker=none")


def tracked(workdir, name: str, *args: str) -> Path:
    """Trains with a tracker in place of the base settings' --wandb=disabled."""
    return run(workdir, name, f"--max_steps={STEPS}", *args)


def test_wandb_gets_all_figures_and_changes_none(workdir, untracked):
    folder = tracked(workdir, "in_wandb", "--tracker=wandb", "--wandb=offline")
    time.sleep(0.2)
    got: dict = {}
    for row in wandb_history(folder):
        for name, value in row.items():
            if "/" in name:
                got.setdefault(name, {})[row["_step"]] = value
    assert got == recorded(folder) and len(got["train/loss"]) == STEPS
    assert metrics(folder) == metrics(untracked) and equal(final(folder), final(untracked))


def test_tensorboard_gets_all_numbers_and_changes_none(workdir, untracked):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = tracked(workdir, "in_tensorboard", "--tracker=tensorboard")
    single = {tag: {step: float(np.float32(value)) for step, value in values.items() if value is not None}
              for tag, values in recorded(folder).items()}  # fmt: skip
    expected = {tag: values for tag, values in single.items() if values}
    assert tensorboard_scalars(folder) == expected and len(expected["train/loss"]) == STEPS
    assert metrics(folder) == metrics(untracked) and equal(final(folder), final(untracked))
    assert not (folder / "wandb").exists() and not (untracked / "wandb").exists()
    assert not (untracked / "tensorboard").exists()


def test_a_resumed_run_replaces_the_steps_that_are_trained_again(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    cfg = TrainConfig(tracker="tensorboard")
    for resumed_at, factor in ((-1, 1.0), (2, 10.0)):
        log = RunLog(tmp_path, cfg, {"chunk_markers": 0}, resumed_at, main=True)
        for step in range(resumed_at + 1, 6):
            log.record("train", step, loss=step * factor, what="text", missing=None)
        log.close()
    assert tensorboard_scalars(tmp_path) == {"train/loss": {0: 0, 1: 1, 2: 2, 3: 30, 4: 40, 5: 50}}
    assert {step: line for step, line in recorded(tmp_path)["train/loss"].items()} == {
        0: 0, 1: 1, 2: 2, 3: 30, 4: 40, 5: 50
    }  # fmt: skip


# ----------------------------------------------------------------------------- failures


def without(monkeypatch, name: str) -> None:
    """Makes the import of a package fail as if it were not installed."""
    whole = builtins.__import__

    def importing(module, *args, **kwargs):
        if module.split(".")[0] == name or module == f"torch.utils.{name}":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return whole(module, *args, **kwargs)

    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_sentence_and_leaves_nothing(workdir, monkeypatch, name):
    monkeypatch.chdir(workdir)
    without(monkeypatch, name)
    base = [arg for arg in BASE if not arg.startswith("--wandb")]
    with pytest.raises(UserError) as refused:
        train.main(override(base, "--run_name=missing", "--max_steps=1", f"--tracker={name}"))
    assert str(refused.value) == (
        f"tracker={name} needs a package that is not installed (No module named '{name}'): pip install {name}, or give "
        f"--tracker=none."
    )
    assert not (workdir / "out/missing").exists()


def test_a_missing_wandb_that_nobody_asked_for_is_a_warning(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "wandb")
    log = RunLog(tmp_path, TrainConfig(), {"chunk_markers": 0}, -1, main=True)
    log.record("train", 1, loss=2.0)
    log.close()
    assert capsys.readouterr().out.startswith("warning: wandb has failed (No module named 'wandb'), so it gets no more")
    assert recorded(tmp_path) == {"train/loss": {1: 2.0}}


@pytest.mark.parametrize("fails", ["SummaryWriter", "add_scalar", "close"])
def test_a_tensorboard_that_fails_costs_one_warning_and_no_step(tmp_path, monkeypatch, capsys, fails):
    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    writer = types.SimpleNamespace(add_scalar=lambda *args: None, close=lambda: None)
    setattr(writer, fails, broken)
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = broken if fails == "SummaryWriter" else lambda *args, **kwargs: writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = RunLog(tmp_path, TrainConfig(tracker="tensorboard"), {"chunk_markers": 0}, -1, main=True)
    for step in range(3):
        log.record("train", step, loss=float(step))
    log.close()
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard has failed ([Errno 28] No space left on device), so it gets no more") == 1
    assert len(recorded(tmp_path)["train/loss"]) == 3 and (tmp_path / "train.log").read_text() == said
