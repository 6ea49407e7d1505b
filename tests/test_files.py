"""Tests atomic writes of files and locks of folders."""

import os
import subprocess
import sys

import pytest

from nanometa.common.files import lock_folder, write_atomically
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
