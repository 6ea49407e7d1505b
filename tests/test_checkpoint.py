import builtins
import io
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, TrainConfig
from nanometa.config.checks import to_dict
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training import checkpoint
from nanometa.training.checkpoint import load_run, newest, open_checkpoint, save
from tests.conftest import ROOT, tree

FACTS = {
    "dataset": "data/x", "injection": "none", "chunk_content": 16, "chunk_markers": 0, "tokenizer": "",
    "shards": {}, "content_sha256": {},
}  # fmt: skip
TOKENIZER = Tokenizer.train(["some words for a tokenizer " * 20], 270)


def write(run_dir, step, kind="step", keep=2, fill=0.0):
    cfg = TrainConfig(
        model=GPTConfig(
            n_layer=1,
            n_head=1,
            n_embd=8,
            block_size=16,
            vocab_size=TOKENIZER.n_vocab,
            content_vocab_size=TOKENIZER.n_content,
        )
    )
    model = GPT(cfg.model, seed=step)
    state = {"step": step, "config": to_dict(cfg), "data": FACTS, "best": None}
    files = {
        checkpoint.WEIGHTS: model.state_dict(),
        checkpoint.STATE: json.dumps(state).encode(),
        **TOKENIZER.files(),
    }
    if kind == "step":
        files[checkpoint.OPTIMIZER] = {"wte.weight/exp_avg": torch.full((3,), float(step))}
    return save(run_dir, kind, step, files, keep)


def test_the_newest_checkpoint_is_found_and_older_ones_are_pruned(tmp_path):
    assert newest(tmp_path, warn=print) is None
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000010"]
    assert newest(tmp_path, warn=print).step == 10
    assert newest(tmp_path, warn=print).optimizer()["wte.weight/exp_avg"].tolist() == [10.0] * 3
    modes = {path.stat().st_mode for path in (tmp_path / "step_00000010").iterdir()}
    (tmp_path / "any").touch()
    assert modes == {(tmp_path / "any").stat().st_mode}  # all files have the permissions that the user's umask gives


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.ranks", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    write(tmp_path, 1)
    victim = write(tmp_path, 2) / name
    raw = victim.read_bytes()
    if damage == "flip":
        middle = len(raw) // 2
        victim.write_bytes(raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :])
    elif damage == "truncate":
        victim.write_bytes(raw[:-5])
    else:
        victim.unlink()
    warnings = []
    found = newest(tmp_path, warnings.append)
    assert found.step == 1 and len(warnings) == 1 and name in warnings[0] and "Falling back" in warnings[0]
    assert load_run(found.folder).state["step"] == 1
    with pytest.raises(UserError, match=name):
        open_checkpoint(victim.parent)


def test_a_newer_format_asks_for_an_update_without_falling_back(tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / "manifest.json"
    before = path.read_text()
    assert json.loads(before)["format"] == 1
    path.write_text(before.replace('"format": 1', '"format": 2'))
    sentence = "manifest.json has format 2, and this version of nanoMeta reads up to 1: update nanoMeta"
    for read in (lambda: open_checkpoint(path.parent), lambda: newest(tmp_path, print), lambda: load_run(tmp_path)):
        with pytest.raises(UserError, match=sentence):
            read()
    path.write_text(before)
    assert newest(tmp_path, print).step == 2


def test_if_all_checkpoints_are_damaged_that_is_an_error(tmp_path):
    (write(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact \(.*state.json is damaged: its sha256 is "):
        newest(tmp_path, warn=lambda sentence: None)


def test_a_failed_save_leaves_the_old_checkpoints_and_no_partial_one(tmp_path, monkeypatch):
    """Whichever call fails, the newest checkpoint is the old one or the complete new one."""
    hashing = "nanometa.training.checkpoint.file_sha256"
    calls = ["safetensors.torch.save_file", hashing, "os.fsync", "os.rename", "os.replace"]
    for call in calls:
        for nth in range(1, 12):
            folder = tmp_path / f"{call}_{nth}"
            folder.mkdir()
            write(folder, 1)
            count = iter(range(1, 1000))
            with monkeypatch.context() as patch:
                import importlib

                module, attribute = call.rsplit(".", 1)
                real = getattr(importlib.import_module(module), attribute)

                def failing(*args, real=real, count=count, nth=nth, **kwargs):
                    if next(count) == nth:
                        raise OSError(28, "No space left on device")
                    return real(*args, **kwargs)

                patch.setattr(call, failing)
                try:
                    write(folder, 2)
                    failed = False
                except OSError:
                    failed = True
            warnings = []
            found = newest(folder, warnings.append)
            assert found.step in ((1, 2) if failed else (2,)) and not warnings
            checkpoint.sweep(folder, found.step, keep=2)
            assert all(not path.name.startswith(".") for path in folder.iterdir())
            write(folder, 3)
            assert newest(folder, warnings.append).step == 3


def test_a_save_writes_syncs_and_renames_in_the_safe_order(tmp_path, monkeypatch):
    """Records the calls of a save, because a kill cannot show a missing sync: it loses nothing that the kernel has
    buffered.

    All files are written, then synced, and then the folder is synced. The folder is renamed and its parent synced. Then
    `latest` is written, synced and moved into place. Last, the oldest checkpoint is removed.
    """
    write(tmp_path, 3)
    write(tmp_path, 4)
    events, opened = [], {}
    real_open, real_fsync, real_file, real_tensors = os.open, os.fsync, io.open, safetensors.torch.save_file

    def short(path) -> str:
        return str(path).removeprefix(f"{tmp_path}/")

    def spy_open(path, *args, **kwargs):
        handle = real_open(path, *args, **kwargs)
        opened[handle] = path
        return handle

    def spy_file(path, mode="r", *args, **kwargs):
        file = real_file(path, mode, *args, **kwargs)
        if not mode.startswith("r"):
            events.append(("write", short(path)))
            opened[file.fileno()] = path
        return file

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(io, "open", spy_file)
    monkeypatch.setattr(builtins, "open", spy_file)
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(("sync", short(opened[handle]))), real_fsync(handle))
    )
    for name in ("rename", "replace"):
        real = getattr(os, name)
        spy = lambda a, b, name=name, real=real: (events.append((name, short(a), short(b))), real(a, b))  # noqa: E731
        monkeypatch.setattr(os, name, spy)
    spy = lambda tensors, path: (events.append(("write", short(path))), real_tensors(tensors, path))  # noqa: E731
    monkeypatch.setattr(safetensors.torch, "save_file", spy)

    final, partial = write(tmp_path, 5), ".step_00000005.writing"
    names = {f"{partial}/{path.name}" for path in final.iterdir()}
    pointer = f".latest.{socket.gethostname()}.{os.getpid()}.writing"
    n = len(names)
    assert set(events[:n]) == {("write", name) for name in names} and events[n - 1] == (
        "write",
        f"{partial}/manifest.json",
    )
    assert set(events[n : 2 * n]) == {("sync", name) for name in names}
    assert events[2 * n :] == [
        ("sync", partial),
        ("rename", partial, "step_00000005"),
        ("sync", str(tmp_path)),
        ("write", pointer),
        ("sync", pointer),
        ("replace", pointer, "latest"),
        ("sync", str(tmp_path)),
        ("rename", "step_00000003", ".step_00000003.deleting"),
    ]


def test_a_resumed_run_completes_a_save_that_was_killed(tmp_path, monkeypatch):
    """After a kill between the rename and the update of `latest`, `latest` is corrected and the oldest checkpoint
    removed."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_settle", lambda *args: None)
        write(tmp_path, 3)
    assert (tmp_path / "latest").read_text() == "step_00000002\n"
    checkpoint.sweep(tmp_path, newest(tmp_path, pytest.fail).step, keep=2)
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]


def test_a_save_replaces_a_damaged_checkpoint_of_the_same_step(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    write(tmp_path, 2)
    assert newest(tmp_path, warn=pytest.fail).step == 2


def test_the_best_checkpoint_is_loaded_unless_it_is_damaged(tmp_path, capsys):
    write(tmp_path, 3)
    write(tmp_path, 2, kind="best", keep=1)
    assert load_run(tmp_path).state["step"] == 2
    assert load_run(tmp_path / "step_00000003").state["step"] == 3
    write(tmp_path, 5, kind="best", keep=1)
    assert [path.name for path in tmp_path.glob("best_*")] == ["best_00000005"]
    (tmp_path / "best_00000005/model.safetensors").write_bytes(b"")
    assert load_run(tmp_path).state["step"] == 3
    assert "best_00000005/model.safetensors is damaged" in capsys.readouterr().err


def test_a_checkpoint_without_an_optimizer_is_refused_for_a_resume(tmp_path):
    write(tmp_path, 2, kind="best", keep=1).rename(tmp_path / "step_00000002")
    found = newest(tmp_path, pytest.fail)
    with pytest.raises(UserError, match="step_00000002 contains weights but no optimizer state: use a step_ folder"):
        found.optimizer()


def test_a_run_resumed_after_damage_deletes_no_intact_checkpoint(tmp_path):
    """The newest checkpoints are damaged and an older one is resumed. Pruning by name alone would keep the damaged
    ones."""
    for step in (10, 15, 20):
        write(tmp_path, step, keep=3)
    for step in (15, 20):
        (tmp_path / f"step_{step:08d}/model.safetensors").write_bytes(b"")
    write(tmp_path, 20, kind="best", keep=1)
    found = newest(tmp_path, lambda sentence: None)
    assert found.step == 10
    checkpoint.sweep(tmp_path, found.step, keep=2)
    write(tmp_path, 13)
    write(tmp_path, 13, kind="best", keep=1)
    assert newest(tmp_path, pytest.fail).step == 13
    names = {path.name for path in tmp_path.iterdir()}
    assert {"step_00000010", "step_00000013", "best_00000013", "damaged_step_00000015"} <= names
    assert load_run(tmp_path).state["step"] == 13


def test_pruning_leaves_a_users_own_copies_alone(tmp_path):
    shutil.copytree(write(tmp_path, 1), tmp_path / "step_00000001_backup")
    (tmp_path / "step_notes.txt").write_text("mine")
    for step in (2, 3, 4):
        write(tmp_path, step)
    assert (tmp_path / "step_00000001_backup/model.safetensors").exists() and (tmp_path / "step_notes.txt").exists()
    assert newest(tmp_path, pytest.fail).step == 4


def test_a_missing_run_is_reported_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained run in out/"):
        load_run()
    with pytest.raises(UserError, match="no checkpoint in 'out/x'"):
        load_run("out/x")


def test_best_weights_of_later_steps_are_set_aside_on_resume(tmp_path):
    """The run resumes at step 20, so best weights of step 30 no longer belong to it."""
    for step in (10, 20):
        write(tmp_path, step)
    write(tmp_path, 30, kind="best", keep=1)
    assert load_run(tmp_path).state["step"] == 30
    checkpoint.sweep(tmp_path, 20, keep=2)
    assert {path.name for path in tmp_path.glob("*best*")} == {"abandoned_best_00000030"}
    assert load_run(tmp_path).state["step"] == 20
    # after the same step is reached again, the copy that was set aside is not needed
    write(tmp_path, 30, kind="best", keep=1)
    assert {path.name for path in tmp_path.glob("*best*")} == {"best_00000030"}


READER = """
import sys
from pathlib import Path
from nanometa.evals.common import FACTS, facts_of
from nanometa.model import GPT
from nanometa.training.checkpoint import load_run, newest

run_dir, seen, warned = Path(sys.argv[1]), set(), []
for i in range(25):
    found = newest(run_dir, warned.append)
    seen.add(found.step)
    found.tokenizer(), found.weights(found.empty_model())
    assert found.optimizer()["wte.weight/exp_avg"].tolist() == [float(found.step)] * 3
    run = load_run(run_dir)
    assert run.model.wte.weight[0, 0] == GPT(run.config.model, seed=run.state["step"]).wte.weight[0, 0]
    assert facts_of(run)["weights_sha256"] == run.weights_sha256 and tuple(facts_of(run)) == FACTS
print(len(seen), warned)
"""


def test_a_reader_of_a_run_that_is_being_trained_sees_no_damage(tmp_path):
    """One process saves and deletes checkpoints without pause; another one loads the newest and the best checkpoint
    25 times. What it loads is of one step, which seeded the weights."""
    write(tmp_path, 1)
    write(tmp_path, 1, kind="best", keep=1)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    step = 1
    while reader.poll() is None:
        step += 1
        write(tmp_path, step, keep=2)
        write(tmp_path, step, kind="best", keep=1)
    out, error = reader.communicate()
    assert reader.returncode == 0, error
    number, warnings = out.split(maxsplit=1)
    assert int(number) > 3 and warnings.strip() == "[]" and "warning" not in error
    assert {path.name.split("_")[0] for path in tmp_path.iterdir()} == {"step", "best", "latest"}


def test_a_checkpoint_deleted_while_it_is_read_makes_the_reader_look_again(tmp_path, monkeypatch):
    """The run has deleted the checkpoint, so a newer one exists. A damaged checkpoint is still named, once."""
    for step in (1, 2, 3):
        write(tmp_path, step, keep=3)
    (tmp_path / "step_00000003/model.safetensors").write_bytes(b"")
    real, calls, warnings = checkpoint.open_checkpoint, [], []

    def pruned(folder):
        calls.append(folder.name)
        if calls == ["step_00000003", "step_00000002"]:
            shutil.rmtree(folder)
            write(tmp_path, 4, keep=4)
        return real(folder)

    monkeypatch.setattr(checkpoint, "open_checkpoint", pruned)
    assert newest(tmp_path, warnings.append).step == 4 and len(warnings) == 1 and "step_00000003" in warnings[0]


def test_a_checkpoint_that_is_deleted_once_its_files_are_open_is_still_loaded(tmp_path, monkeypatch):
    """Also if reading takes longer than the run needs for its next save, which deletes the checkpoint every time."""
    write(tmp_path, 1, kind="best", keep=1)
    real = checkpoint.open_file_sha256

    def late(file):
        shutil.rmtree(tmp_path / "best_00000001", ignore_errors=True)
        return real(file)

    monkeypatch.setattr(checkpoint, "open_file_sha256", late)
    run = load_run(tmp_path)
    assert not list(tmp_path.iterdir()) and run.state["step"] == 1 and run.tokenizer.n_vocab == TOKENIZER.n_vocab
    assert torch.equal(run.model.wte.weight, GPT(run.config.model, seed=1).wte.weight)


def test_a_reader_gives_up_after_many_deleted_checkpoints(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def replaced(folder):
        shutil.rmtree(folder)
        write(tmp_path, int(folder.name[5:]) + 1)
        return open_checkpoint(folder)

    monkeypatch.setattr(checkpoint, "open_checkpoint", replaced)
    monkeypatch.setattr(checkpoint, "OPENINGS", 3)
    with pytest.raises(UserError, match=r"was deleted before its files were open, 3 times: wait until the run saves"):
        load_run(tmp_path)


def test_a_deleted_checkpoint_is_not_called_damaged(tmp_path):
    folder = write(tmp_path, 1)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="does not exist, or its run has just deleted it: use another one"):
        open_checkpoint(folder)


# ----------------------------------------------------------------------------- links


def archive(run_dir, name) -> None:
    """Moves a checkpoint to another folder and leaves a link to it."""
    target = run_dir.parent / "archive" / name
    target.parent.mkdir(exist_ok=True)
    shutil.move(run_dir / name, target)
    (run_dir / name).symlink_to(target)


def test_a_link_to_an_archived_checkpoint_is_skipped_and_neither_deleted_nor_followed(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for step in (1, 2, 3):
        write(run_dir, step, keep=3)
    archive(run_dir, "step_00000001")
    archive(run_dir, "step_00000003")
    before = tree(tmp_path / "archive")
    warnings = []
    assert newest(run_dir, warnings.append).step == 2
    assert len(warnings) == 1 and "step_00000003 is a link out of" in warnings[0] and "Falling back" in warnings[0]
    checkpoint.sweep(run_dir, 2, keep=2)
    for step in (3, 4, 5, 6):
        write(run_dir, step)
    assert newest(run_dir, pytest.fail).step == 6
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"step_00000001", "linked_step_00000003", "step_00000005", "step_00000006", "latest"}
    assert (run_dir / "step_00000001").is_symlink() and (run_dir / "linked_step_00000003").is_symlink()
    assert tree(tmp_path / "archive") == before
    assert load_run(run_dir / "step_00000001").state["step"] == 1  # a link that the user names is followed


def test_if_only_links_are_left_the_refusal_says_what_to_do(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write(run_dir, 1)
    archive(run_dir, "step_00000001")
    with pytest.raises(UserError, match=r"step_00000001 is a link out of .*: replace the link with the folder itself"):
        newest(run_dir, lambda sentence: None)


def test_a_dangling_link_in_place_of_a_checkpoint_does_not_stop_a_save(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step_00000002").symlink_to("/nowhere/step_00000002")
    write(tmp_path, 2)
    assert newest(tmp_path, pytest.fail).step == 2 and (tmp_path / "linked_step_00000002").is_symlink()


def test_a_checkpoint_linked_within_the_run_is_used(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "kept").mkdir()
    (tmp_path / "step_00000001").rename(tmp_path / "kept/step_00000001")
    (tmp_path / "step_00000001").symlink_to("kept/step_00000001")
    assert newest(tmp_path, pytest.fail).step == 1
    for step in (2, 3, 4):
        write(tmp_path, step)
    assert load_run(tmp_path / "step_00000001").state["step"] == 1  # a link is not pruned


def test_links_among_temporary_files_are_removed_without_their_targets(tmp_path):
    run_dir, kept = tmp_path / "run", tmp_path / "kept"
    run_dir.mkdir()
    kept.mkdir()
    (kept / "file").write_text("mine")
    write(run_dir, 1)
    for name in (".step_00000001.deleting", ".step_00000002.writing", ".latest.host.1.writing"):
        (run_dir / name).symlink_to(kept)
    checkpoint.sweep(run_dir, 1, keep=2)
    assert {path.name for path in run_dir.iterdir()} == {"step_00000001", "latest"}
    for name in (".step_00000002.writing", ".step_00000001.deleting"):
        (run_dir / name).symlink_to(kept)
    write(run_dir, 2)
    write(run_dir, 3)
    assert newest(run_dir, pytest.fail).step == 3 and (kept / "file").read_text() == "mine"
