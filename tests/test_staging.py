"""Tests that an unfinished preparation continues only with its own segments and the same files."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from nanometa import prepare
from nanometa.common.errors import UserError
from nanometa.config import PrepareConfig
from nanometa.data import staging
from nanometa.data.sources import FileSource
from nanometa.data.summary import validation_share
from tests.conftest import manifest, tree, write_texts
from tests.test_parts import Pulled, content, run

QUIET = Console(quiet=True)
CFG = PrepareConfig(source="files", files=("texts/*.txt",), name="a", bpe_vocab_size=300, chunk_content=28,
                    chunk_markers=4, val_fraction=0.1, workers=1)  # fmt: skip
WORK = Path("data/.a.partial")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts", documents=30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanometa.data.encoders.BATCH_CHARS", 2000)
    return tmp_path


def pull(cfg=CFG, at: int = 20) -> None:
    """Prepares until the item with number `at` of a unit is read, as if the power failed then."""
    read, count = FileSource.read, [0]

    def failing(self, unit):
        for item in read(self, unit):
            count[0] += 1
            if count[0] > at:
                raise Pulled
            yield item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSource, "read", failing)
        with pytest.raises(Pulled):
            prepare.prepare(cfg, "", QUIET)


def pulled_with_gpt2() -> PrepareConfig:
    cfg = dataclasses.replace(CFG, tokenizer="gpt2")
    pull(cfg)
    assert len(list(WORK.glob("unit_*.json"))) > 5
    return cfg


def test_segments_without_their_plan_are_never_used(folder):
    """Deleting a folder once removed the plan first, so a kill left segments that another preparation continued."""
    pulled_with_gpt2()
    (WORK / staging.PLAN).unlink()
    for name in ("texts", "straight/texts"):
        write_texts(Path(name), documents=30, words=200)
    prepare.prepare(CFG, "", QUIET)
    os.chdir("straight")
    prepare.prepare(CFG, "", QUIET)
    assert content(folder / "straight/data/a") == content(folder / "data/a")


def test_segments_of_another_plan_are_never_used(folder):
    cfg = pulled_with_gpt2()
    shutil.copytree(WORK, "old")
    shutil.rmtree(WORK)
    pull(cfg, at=0)
    for path in Path("old").glob("unit_*"):
        shutil.copy(path, WORK)
    assert not staging.finished_segments(WORK, 0, 2) and list(WORK.glob("unit_*.json"))
    prepare.prepare(cfg, "", QUIET)
    prepare.prepare(dataclasses.replace(cfg, name="b"), "", QUIET)
    assert content(Path("data/a")) == content(Path("data/b"))


@pytest.mark.parametrize("steps", range(4))
def test_a_kill_while_a_folder_is_deleted_leaves_no_incomplete_one(tmp_path, monkeypatch, steps):
    """Stops the deletion after each number of steps."""
    work = tmp_path / ".a.partial"
    work.mkdir()
    for name in ("plan.json", "unit_000000_000000.json"):
        (work / name).write_text("{}")
    before, left = tree(work), [steps]

    def counted(function):
        def call(*args, **kwargs):
            if not left[0]:
                raise Pulled
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    with pytest.raises(Pulled):
        staging.discard(work)
    assert not work.exists() or tree(work) == before
    monkeypatch.undo()
    work.mkdir(exist_ok=True)
    staging.discard(work)
    assert not list(tmp_path.iterdir())


def changed(path: Path, keep_time: bool) -> None:
    """Replaces the text of a file by another one of the same size, perhaps with the same time of its last change."""
    facts = path.stat()
    path.write_text(path.read_text().replace("the", "THE"))
    assert path.stat().st_size == facts.st_size
    if keep_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize(("name", "keep_time"), [("doc002", False), ("doc002", True), ("doc028", False)])
def test_files_that_were_replaced_since_the_kill_are_not_mixed_in(folder, name, keep_time):
    """Both a file that was tokenized before the kill and one that was not."""
    cfg = pulled_with_gpt2()
    changed(folder / f"texts/{name}.txt", keep_time)
    before = {path: facts for path, facts in tree(folder).items() if not path.endswith(".lock")}
    with pytest.raises(
        UserError, match="(files that have changed since|been written to or replaced since).* delete it"
    ):
        prepare.prepare(cfg, "", QUIET)
    assert {path: facts for path, facts in tree(folder).items() if not path.endswith(".lock")} == before
    shutil.rmtree(WORK)
    prepare.prepare(cfg, "", QUIET)


def test_a_file_that_changes_during_the_preparation_is_refused(folder, monkeypatch):
    read = FileSource.read

    def changing(self, unit):
        for number, item in enumerate(read(self, unit)):
            if unit == 3 and not number:
                changed(self.units[unit][0], keep_time=False)
            yield item

    monkeypatch.setattr(FileSource, "read", changing)
    with pytest.raises(UserError, match="has changed during the preparation, so its text may be a mixture"):
        prepare.prepare(dataclasses.replace(CFG, tokenizer="gpt2"), "", QUIET)
    assert not list(Path("data").iterdir())


def test_unfinished_preparations_of_earlier_versions_continue(folder):
    """Their plan has no id, no stamps and fewer settings, and their segments have fewer fields."""
    cfg = pulled_with_gpt2()
    plan = json.loads((WORK / staging.PLAN).read_text())
    del plan["id"], plan["stamps"], plan["config"]["separator"], plan["config"]["val_files"]
    (WORK / staging.PLAN).write_text(json.dumps(plan))
    for path in WORK.glob("unit_*.json"):
        segment = json.loads(path.read_text())
        for key in ("digest", "plan", "endoftext", "skipped_by_kind"):
            del segment[key]
        path.write_text(json.dumps(segment))
    done = [len(staging.finished_segments(WORK, unit, 2)) for unit in range(30)]
    assert sum(done) > 5
    marked = next(WORK.glob("unit_*.train"))
    before = marked.stat().st_mtime_ns
    part = dataclasses.replace(cfg, name="b")
    prepare.prepare(part, "", QUIET)
    assert marked.stat().st_mtime_ns == before
    prepare.prepare(cfg, "", QUIET)
    assert content(Path("data/a")) == content(Path("data/b"))


def test_damaged_new_fields_of_a_segment_count_as_not_written(folder):
    pulled_with_gpt2()
    path = WORK / "unit_000000_000000.json"
    good = json.loads(path.read_text())
    assert good["plan"] == staging.plan_id(WORK) != "" and len(good["digest"]) == 64
    for key, value in (("plan", 3), ("plan", "x"), ("digest", None), ("endoftext", -1), ("skipped_by_kind", []),
                       ("skipped_by_kind", {"x": "y"})):  # fmt: skip
        path.write_text(json.dumps({**good, key: value}))
        assert staging.finished_segments(WORK, 0, 2) == []


def test_parts_that_were_prepared_for_different_shards_are_not_merged_silently(folder):
    for part, injection in ((1, "none"), (2, "uniform")):
        cfg = dataclasses.replace(CFG, tokenizer="gpt2", part=f"{part}/2", injection=injection)
        prepare.prepare(cfg, "", QUIET)
    parts = ["--merge", "data/a.part1of2", "data/a.part2of2"]
    with pytest.raises(
        UserError, match=r"different --injection \(none and uniform\): say which to use with --injection"
    ):
        prepare.merge(prepare.merge_config(parts), "", QUIET)
    prepare.merge(prepare.merge_config([*parts, "--injection=none"]), "", QUIET)
    assert manifest(folder / "data/a")["injection"] == "none"


def test_the_progress_bar_ends_at_100_percent(folder):
    """The bar once compared bytes of text with bytes of files, and ended at 31 % for rows with other columns."""
    rows = [
        json.dumps({"text": path.read_text(), "other": "x" * 5000}) for path in sorted((folder / "texts").iterdir())
    ]
    (folder / "a.jsonl").write_text("\n".join(rows))
    for files in ("a.jsonl", "texts/*.txt"):
        shutil.rmtree("data", ignore_errors=True)
        out = run(folder, f"--files={files}", "--name=a")
        assert [line for line in out.splitlines() if line.startswith("tokenizing")][-1].split()[2] == "100%", out


def test_the_share_of_the_validation_split_is_said_and_explained(folder):
    out = run(folder, "--name=a", "--val_fraction=0.1")
    sizes = {name: split["bytes"] for name, split in manifest(folder / "data/a")["splits"].items()}
    share = 100 * sizes["val"] / sum(sizes.values())
    assert (
        abs(share - 10) > 2 and f"the validation split has {share:.3g} % of the text, not val_fraction = 10 %:" in out
    )
    even = {"val_fraction": 0.2, "splits": {"train": {"bytes": 79}, "val": {"bytes": 21}}}
    assert validation_share(even) == "  the validation split has 21 % of the text"
