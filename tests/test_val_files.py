"""Tests prepare.py --val_files, which names the files of the validation split."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nanometa import prepare
from nanometa.common.errors import UserError
from nanometa.common.files import file_sha256
from nanometa.config import PrepareConfig
from nanometa.config.command_line import load_config
from nanometa.data.found_files import files_of
from nanometa.data.shards import SPLITS, TokenStream, read_manifest
from nanometa.data.sources import open_source
from nanometa.data.tokenizer import Tokenizer
from nanometa.data.verify import verify
from tests.conftest import cli, manifest, override, refusal, tree, write_texts
from tests.test_parts import content
from tests.test_staging import pull

QUIET = Console(quiet=True)
FILES = ("--source=files", "--files=texts/*.txt", "--val_files=held/*.txt", "--bpe_vocab_size=300",
         "--chunk_content=28", "--injection=none", "--workers=1", "--name=bad")  # fmt: skip
CFG = PrepareConfig(source="files", files=("texts/*.txt",), val_files=("held/*.txt",), name="a", bpe_vocab_size=300,
                    chunk_content=28, injection="none", workers=1)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with 20 files to train on and 10 to validate on."""
    write_texts(tmp_path / "texts", documents=30)
    (tmp_path / "held").mkdir()
    for number in range(10, 20):
        (tmp_path / f"texts/doc{number:03}.txt").rename(tmp_path / f"held/doc{number:03}.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(**changes) -> Path:
    """Prepares a dataset with changed settings, and returns its folder."""
    return prepare.prepare(dataclasses.replace(CFG, **changes), "", QUIET)


def tokens_of(folder: Path, split: str) -> np.ndarray:
    shards = read_manifest(folder)["splits"][split]["shards"]
    stream = TokenStream(folder, shards, Tokenizer.load(folder).n_vocab)
    return stream.read(0, len(stream))


def text_of(pattern: str) -> str:
    return "".join(path.read_text() + "<|endoftext|>" for path in sorted(Path().glob(pattern)))


def test_each_split_is_the_text_of_its_files_in_their_order(folder):
    data = made()
    tokenizer, splits = Tokenizer.load(data), manifest(data)["splits"]
    for split, pattern in (("train", "texts/*.txt"), ("val", "held/*.txt")):
        ids, text = tokens_of(data, split), text_of(pattern)
        assert text.startswith(tokenizer.decode(ids)) and len(ids) == splits[split]["content_tokens"]
        dropped = splits[split]["content_tokens_dropped_at_end"]
        assert len(text) - len(tokenizer.decode(ids)) < 20 * dropped + 20 and dropped < 28
    assert [splits[split]["documents"] for split in SPLITS] == [20, 10]


def test_the_manifest_says_which_files_validate_and_the_shards_are_verified(folder):
    result = cli("prepare.py", *override(FILES, "--name=a"), cwd=folder)
    facts = manifest(folder / "data/a")
    assert facts["val_fraction"] is None
    assert facts["source"] == "files texts/*.txt and validation files held/*.txt"
    assert b"% of the text, that of the validation files\n" in result.stdout, result.stderr
    assert cli("prepare.py", "--inspect=data/a", cwd=folder).returncode == 0
    data = folder / "data/a"
    assert "verified" in verify(data, read_manifest(data), Tokenizer.load(data).n_content)


def test_file_formats_and_workers_do_not_change_the_bytes(folder):
    for name in ("texts", "held"):
        rows = [json.dumps({"text": path.read_text()}) for path in sorted(Path(name).iterdir())]
        Path(f"{name}.jsonl").write_text("\n".join(rows))
    made(name="txt")
    made(name="rows", files=("texts.jsonl",), val_files=("held.jsonl",), workers=3)
    made(name="mixed", files=("texts/*.txt",), val_files=("held.jsonl",))
    for name in ("rows", "mixed"):
        for file in ("train_000000.bin", "val_000000.bin", "tokenizer.ranks"):
            assert file_sha256(Path(f"data/{name}/{file}")) == file_sha256(Path(f"data/txt/{file}"))


def test_a_document_longer_than_a_piece_stays_in_its_split(folder):
    """Without val_files, the pieces of a long document go to both splits."""
    Path("long.txt").write_text("".join(f"line {number} of a long document\n" for number in range(20_000)))
    splits = manifest(made(val_files=("long.txt",)))["splits"]
    assert splits["val"]["documents"] == 1 and splits["train"]["documents"] == 20
    divided = manifest(made(name="b", files=("long.txt",), val_files=(), val_fraction=0.5))["splits"]
    assert divided["val"]["documents"] > 1


def test_the_tokenizer_is_trained_on_the_other_files_alone(folder):
    before = Tokenizer.load(made())
    Path("held/new.txt").write_text("zqxzqx zqxzqx zqxzqx " * 500)
    assert Tokenizer.load(made(name="b")).fingerprint == before.fingerprint
    shutil.move("held/new.txt", "texts/new.txt")
    assert Tokenizer.load(made(name="c")).fingerprint != before.fingerprint


def test_an_interrupted_preparation_continues_to_the_same_bytes_and_only_with_its_own_files(folder):
    cfg = dataclasses.replace(CFG, tokenizer="gpt2")
    prepare.prepare(dataclasses.replace(cfg, name="straight"), "", QUIET)
    for at in (5, 22):  # among the files to train on, and among those to validate on
        pull(cfg, at=at)
        other = dataclasses.replace(cfg, val_files=("held/doc01[0-5].txt",))
        with pytest.raises(UserError, match=r"differs from this one \(val_files=\('held/doc01\[0-5\].txt',\) against"):
            prepare.prepare(other, "", QUIET)
        with pytest.raises(UserError, match=r"differs from this one \(val_files=\(\) against"):
            prepare.prepare(dataclasses.replace(cfg, val_files=()), "", QUIET)
    prepare.prepare(cfg, "", QUIET)
    assert content(Path("data/a")) == content(Path("data/straight"))


def test_a_validation_file_that_changed_since_the_kill_is_refused(folder):
    cfg = dataclasses.replace(CFG, tokenizer="gpt2")
    pull(cfg, at=25)
    path = Path("held/doc012.txt")
    path.write_text(path.read_text().replace("the", "THE"))
    with pytest.raises(UserError, match="its files have been written to or replaced since"):
        prepare.prepare(cfg, "", QUIET)


def test_merged_parts_equal_one_preparation_and_keep_their_split(folder):
    made(name="whole")
    parts = [str(made(part=f"{number}/3")) for number in (1, 2, 3)]
    for given in ("--val_files=held/*.txt", "--val_fraction=0.2"):
        with pytest.raises(UserError, match=f"{given.split('=')[0]} has no effect"):
            prepare.merge_config(["--merge", *parts, given])
    prepare.merge(prepare.merge_config(["--merge", *parts]), "", QUIET)
    assert content(Path("data/a")) == content(Path("data/whole"))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--val_fraction=0.1"], "--val_fraction has no effect: it is only used without --val_files"),
        (["--val_files=held/no.txt"], "no file matches 'held/no.txt' of --val_files"),
        (["--val_files=held"], "'held' is a folder: give a pattern for its files, such as --val_files 'held/**/*.txt'"),
        (["--val_files=table.csv"], "or give --val_files patterns that do not match it"),
        (["--val_files=texts/doc003.txt"], "texts/doc003.txt is in both --files and --val_files, so the model would"),
        (["--val_files=link.txt"], "link.txt (texts/doc003.txt) is in both --files and --val_files"),
        (["--val_files=rows.jsonl"], "rows.jsonl has no column 'text', its columns are body"),
        (["--val_files=short.txt"], "the val split has 9 tokens in 1 documents, fewer than one chunk of 28: give more "
                                    "text."),
    ],
)  # fmt: skip
def test_bad_validation_files_are_refused_and_change_nothing_on_disk(folder, args, sentence):
    Path("table.csv").write_text("a,b\n")
    Path("link.txt").symlink_to("texts/doc003.txt")
    Path("rows.jsonl").write_text('{"body": "a text"}\n')
    Path("short.txt").write_text("@@@@@@@@")
    Path("data").mkdir()
    before = tree(folder)
    assert sentence in refusal(cli("prepare.py", *override(FILES, *args), cwd=folder))
    assert tree(folder) == before


@pytest.mark.parametrize("source", ["stdlib", "packages --packages numpy", "hf --hf_dataset=hub"])
def test_other_sources_have_no_validation_files(source):
    with pytest.raises(UserError, match="--val_files has no effect: it is only used with --source=files, but source="):
        load_config(PrepareConfig, f"--source={source} --val_files=held.txt".split())


def test_a_recipe_whose_source_is_replaced_loses_its_files(folder):
    """Both settings then have no effect, so val_fraction has one again."""
    Path("recipe.py").write_text("from config import PrepareConfig\nconfig = PrepareConfig(source='files', "
                                 "files=('texts/*.txt',), val_files=('held/*.txt',))\n")  # fmt: skip
    argv = ["recipe.py", "--source=packages", "--packages=einops", "--val_fraction=0.2"]
    source = open_source(load_config(PrepareConfig, argv, config_file=True))
    assert "files" not in source.description and not source.val_paths
    assert not {Path(path) for path in source.stamps} & {*files_of(("texts/*.txt", "held/*.txt"))[0]}
