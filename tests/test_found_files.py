"""Tests which files glob patterns find: each once, through any links, and no pipes or devices."""

import glob
import os
import socket
from pathlib import Path

import pytest

from nanometa.common.errors import UserError
from nanometa.data.found_files import files_of
from nanometa.data.opening import open_regular
from tests.conftest import cli, refusal, write_texts
from tests.test_formats import items_of, write
from tests.test_sources import SMALL

PATTERNS = (
    "**", "**/*", "**/*.txt", "a/**", "a/**/*.txt", "**/b/*", "**/b/**", "a/**/b/**/*.txt", "**/**/*.txt", "*", "*/*",
    "a/*/../*.txt", "**/.hidden/*", "[ab]/**/*.txt", "**/x[1].txt", "./**/*.txt", "a//**/*.txt", "**/*/",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("t.txt", "a/t.txt", "a/b/t.txt", "a/b/c/t.md", "b/b/t.txt", "a/.hidden/t.txt", ".t.txt", "a/x[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_pythons_glob(folder, pattern):
    expected = {Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)}
    for absolute in (False, True):
        try:
            found, notes = files_of((os.path.join(folder, pattern) if absolute else pattern,))
        except UserError:
            found, notes = [], []
        assert {folder / path for path in found} == {Path(os.path.normpath(folder / path)) for path in expected} or (
            ".." in pattern and len(found) == len({path.resolve() for path in expected})
        )
        assert not notes and found == sorted(found)


def test_link_loops_and_second_paths_give_each_document_once(folder):
    """glob.glob follows one such loop 40 times, and three of them without end."""
    for number in range(3):
        (folder / f"a/b/up{number}").symlink_to("..")
        (folder / f"again{number}.txt").symlink_to("a/b/t.txt")
    (folder / "elsewhere").symlink_to("a/b")
    found, notes = files_of(("**/*.txt", str(folder / "**/*.txt"), "./t.txt", "a/../t.txt"))
    assert sorted(path.read_text() for path in found) == ["a/b/t.txt", "a/t.txt", "a/x[1].txt", "b/b/t.txt", "t.txt"]
    assert not any(path.is_symlink() or "up" in str(path) or "elsewhere" in str(path) for path in found)
    assert (
        len(notes) == 1 and "paths left out, because they lead to files that are read under another path: " in notes[0]
    )
    # only through a link: followed, once
    (folder / "c").mkdir()
    (folder / "c/more").symlink_to("../a")
    assert [str(path) for path in files_of(("c/**/*.md",))[0]] == ["c/more/b/c/t.md"]


def test_the_number_of_left_out_paths_is_printed(tmp_path):
    write_texts(tmp_path / "texts", documents=40)
    (tmp_path / "texts/again.txt").symlink_to("doc001.txt")
    result = cli("prepare.py", "--source=files", "--files=texts/*.txt", "--name=a", *SMALL, cwd=tmp_path)
    assert result.returncode == 0 and b"read under another path: 1\n" in result.stdout


def test_pipes_devices_and_sockets_are_skipped_without_being_opened(folder):
    """Reading them would never end."""
    os.mkfifo("pipe.txt")
    os.mkfifo("pipe.jsonl")
    os.mkfifo("pipe.parquet")
    Path("zero.txt").symlink_to("/dev/zero")
    Path("full.jsonl.gz").symlink_to("/dev/full")
    Path("broken.txt").symlink_to("nothing")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        items = items_of("*.*")
    assert items.pop(-2) == "t.txt"
    assert {Path(item.where).name: item.reason.split(":")[0] for item in items} == {
        **dict.fromkeys(("pipe.txt", "pipe.jsonl", "pipe.parquet", "zero.txt", "full.jsonl.gz", "socket.txt"),
                        "not a regular file"),
        "broken.txt": "No such file or directory",
    }  # fmt: skip
    assert open_regular(Path("t.txt")).read() == b"t.txt"


def test_only_pipes_are_refused_with_the_cure(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    error = refusal(cli("prepare.py", "--source=files", "--files=pipe", *SMALL, "--name=a", cwd=tmp_path))
    assert "there is no text in files pipe" in error and "pipe: not a regular file: copy its content to a file" in error
    assert not list((tmp_path / "data").iterdir())


def test_names_of_files_cannot_steer_the_terminal(tmp_path):
    write_texts(tmp_path / "texts", documents=40)
    name = "texts/e\x1b[2J\nvil\u202e.txt"
    write(tmp_path / name, b"\xff")
    (tmp_path / os.fsdecode(b"texts/latin\xe9.txt")).write_text("text")
    result = cli("prepare.py", "--files", "texts/*.txt", name, "--source=files", "--name=a", *SMALL, cwd=tmp_path)
    shown = cli("prepare.py", "--inspect=data/a", cwd=tmp_path)
    for out in (result, shown):
        assert out.returncode == 0, out.stderr.decode()
        assert r"e\x1b[2J\nvil\u202e.txt" in out.stdout.decode() and b"\x1b[2J" not in out.stdout
    assert r"texts/e\x1b[2J\nvil\u202e.txt: not UTF-8 at byte 0" in result.stdout.decode()
    assert all(line.isprintable() for line in result.stdout.decode().splitlines())


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("a/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("nanometa.data.found_files.os.scandir", refuse)
    found, notes = files_of(("**/*.txt",))
    assert [str(path) for path in found] == ["a/t.txt", "a/x[1].txt", "b/b/t.txt", "t.txt"]
    assert set(notes) == {"the folder a/b is left out, because it cannot be read (Permission denied)"}
