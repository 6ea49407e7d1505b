"""Tests preparation in parts and after interruptions: the result always has the same bytes."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from nanometa import prepare
from nanometa.common.errors import UserError
from nanometa.common.files import file_sha256
from nanometa.config import PrepareConfig
from nanometa.data import staging
from nanometa.data.sources import FileSource
from tests.conftest import ROOT, cli, manifest, override, refusal, tree, write_texts
from tests.fast_cases import slow

FILES = ("--source=files", "--files=texts/*.txt", "--bpe_vocab_size=300", "--chunk_content=28", "--chunk_markers=4",
         "--val_fraction=0.1", "--workers=1")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with texts, and with data/whole, which is prepared from them in one go."""
    folder = tmp_path_factory.mktemp("parts")
    write_texts(folder / "texts", documents=30)
    (folder / "texts/doc007.txt").write_bytes(b"caf\xe9")  # a document that is skipped
    run(folder, "--name=whole")
    return folder


def run(folder, *args):
    result = cli("prepare.py", *override(FILES, *args), cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def content(folder: Path) -> dict:
    """Returns all that must be equal: the bytes of every file, and the manifest except for the command."""
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    return {**files, "manifest": {**manifest(folder), "command": ""}}


def test_three_merged_parts_equal_one_preparation(whole):
    for part in (3, 1, 2):
        run(whole, "--name=m", f"--part={part}/3")
    parts = [f"data/m.part{i}of3" for i in (1, 2, 3)]
    result = cli("prepare.py", "--merge", *parts, cwd=whole)  # no other arguments: the settings come from the parts
    assert result.returncode == 0, result.stderr.decode()
    assert content(whole / "data/m") == content(whole / "data/whole")
    # the same parts give the dataset of another arm
    result = cli("prepare.py", "--merge", *parts[::-1], "--injection=none", "--name=n", cwd=whole)
    assert result.returncode == 0, result.stderr.decode()
    run(whole, "--name=whole_none", "--injection=none")
    assert content(whole / "data/n") == content(whole / "data/whole_none")


def test_parts_that_do_not_fit_together_are_refused(whole):
    for name, args in (("a", "--part=1/2"), ("a", "--part=2/2"), ("b", "--part=2/2 --seed=5"), ("c", "--part=2/3")):
        run(whole, f"--name={name}", *args.split())
    shutil.copytree(whole / "data/a.part2of2", whole / "data/cut")
    next((whole / "data/cut").glob("unit_*.json")).unlink()
    shutil.copytree(whole / "data/a.part2of2", whole / "data/flipped")
    victim = sorted((whole / "data/flipped").glob("*.train"))[3]
    raw = bytearray(victim.read_bytes())
    raw[10] ^= 1
    victim.write_bytes(raw)
    before = tree(whole)
    a1, a2 = "data/a.part1of2", "data/a.part2of2"
    for parts, sentence in (
        (
            (a1, "data/b.part2of2"),
            "do not fit together (seed=5 against seed=1337): prepare both with the same settings",
        ),
        ((a1, "data/c.part2of3"), "do not fit together (one of 3 parts against one of 2 parts)"),
        ((a1,), "unit 1 of 29 is in none of the parts"),
        ((a1, "data/cut"), "is in none of the parts: give all parts"),
        ((a1, "data/flipped"), f"data/flipped/{victim.name} is damaged (its sha256 is "),
        ((a1, a1), "give every part once"),
        ((a1, "data/whole"), "data/whole is not a part of a dataset (plan.json is missing)"),
        (
            (a1, a2, "--seed=2"),
            "seed=2 cannot be set when merging, because the parts were prepared with seed=1337: leave it out",
        ),
        ((a1, a2, "--name=whole"), "data/whole exists"),
    ):
        assert sentence in refusal(cli("prepare.py", "--merge", *parts, cwd=whole))
    for args, sentence in (
        (("--part=1/31",), "part=1/31 asks for more parts than the source has units: use 29 parts or fewer"),
        (("--part=3/2",), "part='3/2' is out of range"),
        (("--part=1",), "part='1' is out of range"),
    ):
        assert sentence in refusal(cli("prepare.py", *FILES, "--name=x", *args, cwd=whole))
    assert tree(whole) == before


class Pulled(BaseException):
    """Raised in place of a power failure."""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_an_interrupted_preparation_continues_to_the_same_bytes(tmp_path, monkeypatch, seed):
    """Interrupts a preparation of one file with many rows a dozen times, also within the unit. Segments have 500
    tokens."""
    write_texts(tmp_path / "texts", documents=60)
    rows = [json.dumps({"text": path.read_text()}) for path in sorted((tmp_path / "texts").iterdir())]
    rows[20] = "no json"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "SEGMENT_TOKENS", 500)
    monkeypatch.setattr("nanometa.data.encoders.BATCH_CHARS", 2000)
    cfg = PrepareConfig(
        source="files", files=("a.jsonl",), name="straight", bpe_vocab_size=300, chunk_content=28, chunk_markers=4,
        val_fraction=0.1, workers=1,
    )  # fmt: skip
    console = Console(quiet=True)
    prepare.prepare(cfg, "", console)
    read, done = FileSource.read, []
    cfg = dataclasses.replace(cfg, name="pulled", tokenizer="data/straight")
    for _ in range(12):
        at = random.Random(seed + 100 * len(done)).randrange(3, 60)
        monkeypatch.setattr(FileSource, "read", lambda self, unit, at=at: cut(read(self, unit), at))
        with pytest.raises(Pulled):
            prepare.prepare(cfg, "", console)
        done.append(len(list(Path("data/.pulled.partial").glob("unit_*.json"))))
    assert done == sorted(done) and done[-1] > 1
    monkeypatch.setattr(FileSource, "read", read)
    prepare.prepare(cfg, "", console)
    assert content(Path("data/pulled")) == content(Path("data/straight"))
    assert not Path("data/.pulled.partial").exists()


def cut(items, n):
    for number, item in enumerate(items):
        if number == n:
            raise Pulled
        yield item


def start(folder, *args):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "prepare.py"), *FILES, *args], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # children of a background job ignore SIGINT
    )  # fmt: skip


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory) -> Path:
    """A folder with enough text that a signal arrives in the middle of its preparation."""
    folder = tmp_path_factory.mktemp("slow")
    for number in range(16):
        write_texts(folder / "texts", documents=1, words=100_000)
        (folder / "texts/doc000.txt").rename(folder / f"texts/{number:03}.txt")
    run(folder, "--name=straight")
    return folder


@pytest.mark.parametrize("number", [*map(slow, (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL])
def test_a_killed_preparation_continues_to_the_same_bytes(slow_folder, number):
    process = start(slow_folder, "--name=cut")
    while not list(slow_folder.glob("data/.cut.partial/unit_*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)  # returns only when the workers, which also hold the pipes, have ended
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130 and error == "interrupted\n", error
        assert "the tokenized text is kept in data/.cut.partial: give the same command again to continue" in out
    assert not (slow_folder / "data/cut").exists()
    assert "differs from this one (seed=7 against seed=1337)" in refusal(
        cli("prepare.py", *FILES, "--name=cut", "--seed=7", cwd=slow_folder)
    )
    out = run(slow_folder, "--name=cut")
    assert "continuing the preparation in data/.cut.partial: " in out
    assert content(slow_folder / "data/cut") == content(slow_folder / "data/straight")
    assert not list((slow_folder / "data").glob(".cut*"))
    shutil.rmtree(slow_folder / "data/cut")


@pytest.mark.parametrize("limit", [20_000, 1_000_000])
def test_a_full_disk_is_reported_and_the_preparation_can_continue(slow_folder, limit):
    """Limits the size of files: with the small limit the tokenized text does not fit, with the large one only the
    shards."""
    command = [sys.executable, str(ROOT / "prepare.py"), *FILES, "--name=full"]
    result = subprocess.run(
        command, cwd=slow_folder, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    error = refusal(result)
    assert "data/full is not finished" in error and "File too large" in error and "is kept" in error
    assert not (slow_folder / "data/full").exists()
    run(slow_folder, "--name=full")
    assert content(slow_folder / "data/full") == content(slow_folder / "data/straight")
    shutil.rmtree(slow_folder / "data/full")


def test_a_second_preparation_of_the_same_name_is_refused(whole):
    (whole / "data/.two.partial").mkdir()
    held = staging.lock(whole / "data/.two.partial")
    assert "another process is preparing data/.two.partial" in refusal(
        cli("prepare.py", *FILES, "--name=two", cwd=whole)
    )
    held.release()
    run(whole, "--name=two")
    assert content(whole / "data/two") == content(whole / "data/whole")


def test_the_refusal_of_a_damaged_segment_says_how_to_repair_it(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts", documents=30)
    run(tmp_path, "--name=a", "--part=1/1")
    part = tmp_path / "data/a.part1of1"
    segment = sorted(part.glob("unit_*.json"))[1]
    victim = max((segment.with_suffix(f".{split}") for split in staging.SPLITS), key=lambda path: path.stat().st_size)
    with open(victim, "r+b") as file:
        file.write(b"\xff")
    error = refusal(cli("prepare.py", "--merge", "data/a.part1of1", cwd=tmp_path))
    assert f"delete data/a.part1of1/{segment.name} and prepare it again" in error
    os.rename(part, tmp_path / "data/.a.part1of1.partial")
    (tmp_path / f"data/.a.part1of1.partial/{segment.name}").unlink()
    run(tmp_path, "--name=a", "--part=1/1")
    run(tmp_path, "--name=b")
    assert cli("prepare.py", "--merge", "data/a.part1of1", cwd=tmp_path).returncode == 0
    assert content(tmp_path / "data/a") == content(tmp_path / "data/b")


def test_an_incomplete_plan_counts_as_damaged(tmp_path):
    (tmp_path / staging.PLAN).write_text('{"config": {')
    with pytest.raises(UserError, match="is damaged"):
        staging.read_plan(tmp_path)
    (tmp_path / staging.PLAN).write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        staging.read_plan(tmp_path)
