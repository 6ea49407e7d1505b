"""Tests the verification of shards: which damage it finds, what it remembers, and how long it may take."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from nanometa.common.errors import UserError
from nanometa.common.files import file_sha256
from nanometa.data import verify as module
from nanometa.data.loader import Windows
from nanometa.data.shards import HEADER, read_manifest
from nanometa.data.verify import CACHE, verify
from tests.conftest import ROOT, cli, manifest, override, refusal
from tests.training_runs import BASE, TORCHRUN

N_IDS = 301  # 299 tokens, <|endoftext|> and <|meta|>


@pytest.fixture
def folder(workdir, tmp_path):
    copied = shutil.copytree(workdir / "data/u", tmp_path / "u")
    (copied / CACHE).unlink(missing_ok=True)
    return copied


def seal(folder) -> None:
    """Writes the shards' current hashes into the manifest."""
    facts = manifest(folder)
    for split in facts["splits"].values():
        for entry in split["shards"]:
            entry["sha256"] = file_sha256(folder / entry["file"])
    (folder / "manifest.json").write_text(json.dumps(facts))


def test_an_id_beyond_the_vocabulary_is_named_with_its_position(folder, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 128)  # so that the position is counted over several blocks
    ids = np.memmap(folder / "val_000000.bin", dtype="<u2", mode="r+", offset=HEADER.size)
    ids[500], ids[700] = N_IDS, 65535
    ids.flush()
    seal(folder)
    with pytest.raises(UserError, match=r"val_000000.bin is damaged: position 500 holds the id 301, .* ids below 301"):
        verify(folder, manifest(folder), N_IDS)
    assert not (folder / CACHE).exists()


def test_a_verified_and_unchanged_shard_is_not_read_again(folder, monkeypatch):
    read, real = [], module._hash_and_check
    monkeypatch.setattr(module, "_hash_and_check", lambda path, *args: (read.append(path.name), real(path, *args))[1])
    shards = ["train_000000.bin", "val_000000.bin"]
    victim = folder / shards[0]

    def names():
        read.clear()
        verify(folder, manifest(folder), N_IDS)
        return sorted(read)

    assert names() == shards and names() == []
    stat = victim.stat()
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert names() == [shards[0]] and names() == []
    for damage in ("", "[]", "{", '{"train_000000.bin": 3}', "[" * 100_000, "\0"):
        (folder / CACHE).write_text(damage)
        assert names() == shards and names() == []
    known = json.loads((folder / CACHE).read_text())
    for key, value in (("size", 1), ("sha256", "0"), ("n_ids", 300), ("inode", 1), ("device", 1), ("ctime_ns", 1)):
        (folder / CACHE).write_text(json.dumps({**known, shards[0]: {**known[shards[0]], key: value}}))
        assert names() == [shards[0]]
    # a manifest with another hash is not satisfied by an earlier verification
    facts = manifest(folder)
    facts["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    with pytest.raises(UserError, match=r"train_000000.bin is damaged: its sha256 is .*, the manifest says 0000"):
        verify(folder, facts, N_IDS)
    victim.unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="its sha256 is no file"):
            verify(folder, manifest(folder), N_IDS)


@pytest.mark.parametrize("copying", ["cp -a", "copytree", "hard links", "move"])
def test_the_record_of_verified_shards_does_not_travel_with_a_copy(folder, tmp_path, copying):
    """A copy keeps the name, the size and the times of every file, and brings .verified.json along."""
    verify(folder, manifest(folder), N_IDS)
    other = tmp_path / "copy"
    if copying == "cp -a":
        subprocess.run(["cp", "-a", folder, other], check=True)
    elif copying == "copytree":
        shutil.copytree(folder, other)
    elif copying == "hard links":
        shutil.copytree(folder, other, copy_function=os.link)
    else:
        other = folder.rename(other)  # the files stay the same
        assert "all 2 shards are unchanged" in verify(other, manifest(other), N_IDS)
    shard = other / "train_000000.bin"
    stat, raw = shard.stat(), bytearray(shard.read_bytes())
    raw[-1] ^= 1
    with open(shard, "r+b") as file:
        file.write(raw)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"train_000000.bin is damaged"):
        verify(other, manifest(other), N_IDS)


def test_a_record_of_an_earlier_version_is_not_relied_on(folder):
    """Earlier versions recorded only size and modification time."""
    verify(folder, manifest(folder), N_IDS)
    known = json.loads((folder / CACHE).read_text())
    old = {name: {key: of[key] for key in ("size", "mtime_ns", "sha256", "n_ids")} for name, of in known.items()}
    (folder / CACHE).write_text(json.dumps(old))
    assert "verified the sha256 of 2 shards" in verify(folder, manifest(folder), N_IDS)
    assert json.loads((folder / CACHE).read_text()) == known


@pytest.mark.parametrize("call", ["builtins.open", "os.replace", "os.fsync"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_dataset_that_cannot_be_written_is_verified_each_time(folder, monkeypatch, call, number):
    """A read-only mount, the folder of another user, a full disk."""
    module_name, name = call.split(".")
    real = getattr(sys.modules[module_name], name)

    def refuse(*args, **kwargs):
        if call != "builtins.open" or CACHE in str(args[0]):
            raise OSError(number, os.strerror(number), str(args[0]))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        if number == errno.EROFS:
            patch.setattr("os.unlink", refuse)
        said = verify(folder, manifest(folder), N_IDS)
    assert "verified the sha256 of 2 shards" in said
    assert said.endswith(f"; {CACHE} cannot be written ({os.strerror(number)}), so the next start verifies them again")
    assert not (folder / CACHE).exists()
    assert "of 2 shards" in verify(folder, manifest(folder), N_IDS)
    unchanged = f"all 2 shards are unchanged since they were verified ({CACHE})"
    assert verify(folder, manifest(folder), N_IDS) == unchanged


def test_a_record_that_is_no_file_is_replaced_or_left_alone(folder, tmp_path):
    """A link is replaced without a look at its target. A pipe is not waited for."""
    (tmp_path / "mine").write_text("mine")
    for make in (
        lambda path: path.symlink_to(tmp_path / "mine"), lambda path: path.symlink_to("/dev/zero"), os.mkfifo
    ):  # fmt: skip
        make(folder / CACHE)
        assert "of 2 shards" in verify(folder, manifest(folder), N_IDS)
        assert "all 2 shards" in verify(folder, manifest(folder), N_IDS)
        (folder / CACHE).unlink()
    (folder / CACHE).mkdir()
    assert "cannot be written" in verify(folder, manifest(folder), N_IDS)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_shard_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    real = module._hash_and_check

    def touched(path, *args):
        found = real(path, *args)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(module, "_hash_and_check", touched)
    with pytest.raises(UserError, match="changed while it was read"):
        verify(folder, manifest(folder), N_IDS)
    assert not (folder / CACHE).exists()


def test_verification_reports_its_progress(folder, monkeypatch):
    monkeypatch.setattr(module, "REPORT_SECONDS", 0)
    monkeypatch.setattr(module, "BLOCK", 4096)
    lines = []
    verify(folder, manifest(folder), N_IDS, lines.append)
    assert len(lines) > 5 and all("GB/s" in line and "to go" in line for line in lines)


def test_shards_outside_the_dataset_are_refused(folder, tmp_path):
    """Neither a name in the manifest nor a link in place of a shard may lead out of the dataset's folder."""
    shutil.copy(folder / "val_000000.bin", tmp_path / "val_000000.bin")
    facts = manifest(folder)
    for name in ("../val_000000.bin", str(tmp_path / "val_000000.bin"), "/etc/passwd", ".", "", "sub/val_000000.bin"):
        facts["splits"]["val"]["shards"][0]["file"] = name
        (folder / "manifest.json").write_text(json.dumps(facts))
        with pytest.raises(UserError, match="is damaged"):
            read_manifest(folder)
        with pytest.raises(UserError, match="is damaged"):
            verify(folder, facts, N_IDS)
    facts["splits"]["val"]["shards"][0]["file"] = "val_000000.bin"
    (folder / "manifest.json").write_text(json.dumps(facts))
    for target in (tmp_path / "val_000000.bin", "/dev/zero", "../val_000000.bin"):
        (folder / "val_000000.bin").unlink()
        (folder / "val_000000.bin").symlink_to(target)
        for use in (lambda: verify(folder, manifest(folder), N_IDS), lambda: Windows(folder, "val", 32, "ignore")):
            with pytest.raises(UserError, match="val_000000.bin is a link out of its folder"):
                use()
    # a link to the dataset, and a link within it, are allowed
    (folder / "val_000000.bin").unlink()
    os.rename(tmp_path / "val_000000.bin", folder / "body")
    (folder / "val_000000.bin").symlink_to("body")
    (tmp_path / "link").symlink_to(folder)
    verify(tmp_path / "link", manifest(folder), N_IDS)
    assert Windows(tmp_path / "link", "val", 32, "ignore").n_windows > 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.ranks", "manifest.json"])
def test_no_file_of_a_dataset_leads_out_of_its_folder(folder, tmp_path, name):
    """Nor is it a pipe or a folder. A link that stays in the dataset is allowed."""
    path, body = folder / name, folder / "body"
    path.rename(tmp_path / "moved")
    for target in (tmp_path / "moved", "../moved", "/dev/zero", tmp_path / "nowhere"):
        path.symlink_to(target)
        with pytest.raises(
            UserError, match=f"{name} is a link out of its folder: delete the link, or replace it with the file"
        ):
            Windows(folder, "val", 32, "ignore")
        path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(UserError, match=f"{name} is not a regular file"):
            Windows(folder, "val", 32, "ignore")
        path.rename(tmp_path / make.__name__)
    (tmp_path / "moved").rename(body)
    path.symlink_to("body")
    assert Windows(folder, "val", 32, "ignore").n_windows > 0


def test_the_log_says_what_was_verified_and_other_data_need_permission(workdir, tmp_path):
    shutil.copytree(workdir / "data/u", tmp_path / "data/u")
    result = cli(
        "prepare.py", "--source=files", f"--files={workdir}/texts/*.txt", "--name=other", "--tokenizer=data/u",
        "--chunk_content=28", "--chunk_markers=4", "--val_fraction=0.2", "--seed=5", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    args = override(BASE, "--run_name=r", "--max_steps=2", "--verify=header")
    assert cli("train.py", *args, cwd=tmp_path).returncode == 0
    log = tmp_path / "out/r/train.log"
    assert (
        "only the headers and sizes of the shards were verified, not their contents (--verify=header)"
        in log.read_text()
    )

    args = override(BASE, "--run_name=r", "--max_steps=4", "--init_from=resume", "--dataset=data/other")
    error = refusal(cli("train.py", *args, cwd=tmp_path))
    assert "the sha256 of train_000000.bin was " in error and "give the run's dataset, data/u, or add --allow" in error
    result = cli("train.py", *args, "--allow_changed_data", cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    text = log.read_text()
    assert (
        "changed since the checkpoint (--allow_changed_data): 2 shards of data/other, among them train_000000.bin"
        in text
    )
    assert "verified the sha256 of 2 shards" in text and (tmp_path / "data/other" / CACHE).exists()
    # the run now belongs to the other dataset
    again = override(tuple(args), "--max_steps=5")
    assert cli("train.py", *again, cwd=tmp_path).returncode == 0
    assert "all 2 shards are unchanged since they were verified" in log.read_text()


@pytest.mark.slow
def test_slow_hashing_does_not_run_into_the_timeout_of_collectives(tmp_path):
    """The timeout is 4 seconds instead of 30 minutes, and one process takes 9 seconds."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys, time
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
import torch
from nanometa.training import distributed as dist
dist.timedelta = lambda minutes=0, days=0: timedelta(seconds=4) if minutes else timedelta(days=days)
with dist.processes() as alone:
    d = alone.on("cpu")
    assert d.sum(torch.ones(1)).item() == 2
    if d.rank == 0:
        time.sleep(9)
    print(d.hear("a", f"word {{d.rank}}"), flush=True)
    assert d.hear("b", "") == ["", ""] and d.sum(torch.ones(1)).item() == 2
"""
    )
    result = cli(str(script), cwd=tmp_path, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    # the output of the two processes may be on one line
    assert result.stdout.decode().count("['word 0', 'word 1']") == 2
