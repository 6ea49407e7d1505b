import json
import shutil

import pytest
import torch

import checkpoint
from checkpoint import load_run, newest, open_checkpoint, save
from config import GPTConfig, TrainConfig, UserError, to_dict
from data.tokenizer import Tokenizer
from model import GPT

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


def test_newest_and_pruning(tmp_path):
    assert newest(tmp_path, warn=print) is None
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000010"]
    assert newest(tmp_path, warn=print).step == 10
    assert newest(tmp_path, warn=print).optimizer()["wte.weight/exp_avg"].tolist() == [10.0] * 3


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.ranks", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_any_damage_is_named_and_the_one_before_is_used(tmp_path, name, damage):
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


def test_if_all_are_damaged_that_is_an_error(tmp_path):
    (write(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        newest(tmp_path, warn=lambda sentence: None)


def test_a_save_that_fails_leaves_the_old_ones_and_no_half_one(tmp_path, monkeypatch):
    """Whatever call fails, the newest checkpoint is the old one or the new one, whole."""
    calls = ["safetensors.torch.save_file", "checkpoint.file_sha256", "os.fsync", "os.rename", "os.replace"]
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
            checkpoint.sweep(folder, found.step)
            assert all(not path.name.startswith(".") for path in folder.iterdir())
            write(folder, 3)
            assert newest(folder, warnings.append).step == 3


def test_the_order_of_a_save(tmp_path, monkeypatch):
    """Every file is synced before the rename, the parent after it, and only then does the pointer move."""
    import os

    events, opened = [], {}
    real_open, real_fsync, real_rename, real_replace = os.open, os.fsync, os.rename, os.replace

    def spy_open(path, *args, **kwargs):
        handle = real_open(path, *args, **kwargs)
        opened[handle] = str(path)
        return handle

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(("fsync", opened[handle])), real_fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", str(b))), real_rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", str(b))), real_replace(a, b)))
    final = write(tmp_path, 5)
    partial = str(tmp_path / ".step_00000005.writing")
    names = [what for what, _ in events]
    rename = names.index("rename")
    synced = {path for what, path in events[:rename]}
    assert synced == {partial, *(f"{partial}/{path.name}" for path in final.iterdir())}
    assert events[rename:] == [
        ("rename", str(final)),
        ("fsync", str(tmp_path)),
        ("fsync", str(tmp_path / ".latest.writing")),
        ("replace", str(tmp_path / "latest")),
        ("fsync", str(tmp_path)),
    ]


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    write(tmp_path, 2)
    assert newest(tmp_path, warn=pytest.fail).step == 2


def test_best_is_preferred_for_use_and_a_damaged_one_replaced(tmp_path, capsys):
    write(tmp_path, 3)
    write(tmp_path, 2, kind="best", keep=1)
    assert load_run(tmp_path).state["step"] == 2
    assert load_run(tmp_path / "step_00000003").state["step"] == 3
    write(tmp_path, 5, kind="best", keep=1)
    assert [path.name for path in tmp_path.glob("best_*")] == ["best_00000005"]
    (tmp_path / "best_00000005/model.safetensors").write_bytes(b"")
    assert load_run(tmp_path).state["step"] == 3
    assert "best_00000005/model.safetensors is damaged" in capsys.readouterr().err


def test_going_on_after_damage_never_deletes_what_is_whole(tmp_path):
    """The newest are damaged, the one before is resumed: pruning by name alone would keep the damaged ones."""
    for step in (10, 15, 20):
        write(tmp_path, step, keep=3)
    for step in (15, 20):
        (tmp_path / f"step_{step:08d}/model.safetensors").write_bytes(b"")
    write(tmp_path, 20, kind="best", keep=1)
    found = newest(tmp_path, lambda sentence: None)
    assert found.step == 10
    checkpoint.sweep(tmp_path, found.step)
    write(tmp_path, 13)
    write(tmp_path, 13, kind="best", keep=1)
    assert newest(tmp_path, pytest.fail).step == 13
    names = {path.name for path in tmp_path.iterdir()}
    assert {"step_00000010", "step_00000013", "best_00000013", "damaged_step_00000015"} <= names
    assert load_run(tmp_path).state["step"] == 13


def test_a_users_copies_are_left_alone(tmp_path):
    shutil.copytree(write(tmp_path, 1), tmp_path / "step_00000001_backup")
    (tmp_path / "step_notes.txt").write_text("mine")
    for step in (2, 3, 4):
        write(tmp_path, step)
    assert (tmp_path / "step_00000001_backup/model.safetensors").exists() and (tmp_path / "step_notes.txt").exists()
    assert newest(tmp_path, pytest.fail).step == 4


def test_no_run_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained run in out/"):
        load_run()
    with pytest.raises(UserError, match="no checkpoint in 'out/x'"):
        load_run("out/x")
