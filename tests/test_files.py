"""Tests atomic writes of files, locks of folders, and paths in folders of strangers."""

import os
import socket
import subprocess
import sys

import pytest

from nanometa.common.errors import UserError
from nanometa.common.files import leads_out, lock_folder, own_file, read_json_lines, remove, write_atomically
from tests.conftest import ROOT


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, call):
    path = tmp_path / "facts.json"
    write_atomically(path, b"old")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_stays_locked_until_the_locking_process_ends(tmp_path):
    code = (
        "import sys; from pathlib import Path; from nanometa.common.files import lock_folder\n"
        "held = lock_folder(Path(sys.argv[1])); print(held is not None, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    assert lock_folder(tmp_path) is None
    other.kill()
    other.wait()
    held = lock_folder(tmp_path)
    assert held is not None and lock_folder(tmp_path) is None
    held.release()


def test_no_module_imports_fcntl_which_windows_lacks():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in ("tests", "records", ".venv"):
            assert "\nimport fcntl" not in path.read_text(), path


def test_a_file_of_a_folder_is_neither_a_link_out_nor_a_pipe_nor_a_folder(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "file").write_text("here")
    (folder / "sub").mkdir()
    (tmp_path / "linked").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    for name, target in (
        ("inside", "file"), ("to_absolute", folder / "file"), ("dangling_inside", "none"), ("below", "sub/none"),
    ):  # fmt: skip
        (folder / name).symlink_to(target)
    for name in ("file", "missing", "inside", "to_absolute", "dangling_inside", "below"):
        assert own_file(folder / name) == folder / name and own_file(tmp_path / "linked" / name)
    for number, target in enumerate(
        ("../other/x", other / "dangling", "/dev/zero", "/dev/null", "..", folder / "../x")
    ):
        path = folder / f"out{number}"
        path.symlink_to(target)
        for one in (path, tmp_path / "linked" / path.name):
            assert leads_out(one)
            with pytest.raises(
                UserError, match=f"{path.name} is a link out of its folder: delete the link, or replace it with the"
            ):
                own_file(one)
    for name, target in (("to_pipe", "pipe"), ("loop", "loop"), ("there", "back"), ("back", "there")):
        (folder / name).symlink_to(target)
    for name in ("pipe", "to_pipe", "sub", "loop", "there"):
        with pytest.raises(UserError, match=f"{name} is not a regular file: move it out of the folder"):
            own_file(folder / name)


def test_a_pipe_in_place_of_json_lines_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "tasks.jsonl")
    with pytest.raises(UserError, match="tasks.jsonl is not a regular file"):
        read_json_lines(tmp_path / "tasks.jsonl", lambda line: None, "eval.py")


def test_an_atomic_write_and_a_removal_touch_no_target_of_a_link(tmp_path):
    """Also if the temporary file of the write is a link, because its name can be guessed."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    path, partial = run / "latest", run / f".latest.{socket.gethostname()}.{os.getpid()}.writing"
    for link in (path, partial):
        link.symlink_to(kept / "file")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and not path.is_symlink() and list(run.iterdir()) == [path]
    partial.symlink_to(kept / "created")
    write_atomically(path, b"newer")
    for target in (kept, kept / "file", "nowhere"):
        (run / "link").symlink_to(target)
        remove(run / "link")
        assert not os.path.lexists(run / "link")
    (run / "folder").mkdir()
    (run / "folder/link").symlink_to(kept)
    for gone in ("folder", "latest", "missing"):
        remove(run / gone)
    assert not list(run.iterdir())
    assert [file.name for file in kept.iterdir()] == ["file"] and (kept / "file").read_text() == "mine"


@pytest.mark.parametrize("target", ["../elsewhere", "../created"])
def test_a_lock_is_not_taken_through_a_link(tmp_path, target):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(target)
    with pytest.raises(UserError, match=".lock is a link out of its folder"):
        lock_folder(tmp_path / "run")
    assert (tmp_path / "elsewhere").read_text() == "mine" and not (tmp_path / "created").exists()
