"""Tests --min_document_tokens: it keeps the documents that a simple loop keeps, and changes nothing else."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nanometa import prepare
from nanometa.common.errors import UserError
from nanometa.config import PrepareConfig, TrainConfig
from nanometa.data.assemble import LongDocuments
from nanometa.data.inject import strip
from nanometa.data.loader import Windows
from nanometa.data.shards import SPLITS, read_manifest
from nanometa.data.tokenizer import Tokenizer
from nanometa.training.dataset import open_windows, recipe_of
from tests.conftest import WORDS, cli, manifest, override, refusal, tree
from tests.test_parts import content

N = 200
# chunks of one token, so that no token at the end of a split is dropped
FILES = ("--source=files", "--files=texts/*.txt", "--bpe_vocab_size=300", "--chunk_content=1", "--chunk_markers=1",
         "--val_fraction=0.3", "--workers=1")  # fmt: skip
LONG = f"--min_document_tokens={N}"


def run(folder, *args) -> str:
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    result = cli("prepare.py", *override(FILES, *args), cwd=folder, env=env)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Texts of 1 to 600 words, two that are cut between the splits, and one that is unreadable.

    The short texts consist of words that occur nowhere else. data/all contains all texts, data/long only the long
    ones.
    """
    folder = tmp_path_factory.mktemp("long")
    (folder / "texts").mkdir()
    draw = random.Random(3)
    for number in range(60):
        size = 50_000 if number in (20, 59) else draw.choice((1, 40, 90, 150, 300, 600))
        words = [draw.choice(WORDS) if size > 100 else f"zq{number}x{i}" for i in range(size)]
        (folder / f"texts/{number:02}.txt").write_text(" ".join(words).replace(" had ", "\n"))
    (folder / "texts/07.txt").write_bytes(b"caf\xe9")
    run(folder, "--name=all")
    run(folder, "--name=long", LONG)
    return folder


def documents(dataset: Path, split: str) -> list[list[int]]:
    """Returns the documents of a split, cut after every <|endoftext|>, token by token."""
    data = Windows(dataset, split, 2 if manifest(dataset)["chunk_markers"] else 1, "ignore")
    out, document = [], []
    for token in strip(data.stream.read(0, len(data.stream)), data.tokenizer.meta).tolist():
        document.append(token)
        if token == data.tokenizer.eot:
            out.append(document)
            document = []
    assert not document
    return out


def test_the_kept_documents_equal_those_of_a_simple_loop(folder):
    all_, long = manifest(folder / "data/all"), manifest(folder / "data/long")
    assert Tokenizer.load(folder / "data/all").fingerprint == Tokenizer.load(folder / "data/long").fingerprint
    tokenizer = Tokenizer.load(folder / "data/all")
    short = {"documents": 0, "of_documents": 0, "tokens": 0, "of_tokens": 0}
    for split in SPLITS:
        expected = []
        for document in documents(folder / "data/all", split):
            short["of_documents"] += 1
            short["of_tokens"] += len(document)
            if len(document) >= N:  # <|endoftext|> is counted
                expected.append(document)
            else:
                short["documents"] += 1
                short["tokens"] += len(document)
        assert documents(folder / "data/long", split) == expected
        assert long["splits"][split]["documents"] == len(expected) < all_["splits"][split]["documents"]
        assert long["splits"][split]["content_tokens"] == sum(map(len, expected))
        assert long["splits"][split]["bytes"] == sum(len(tokenizer.text_bytes(np.array(ids))) for ids in expected)
        if split == "val":
            assert long["val_text_compressed"]["bytes"] == long["splits"]["val"]["bytes"]
    assert short["of_documents"] > 59  # more than 59, because some texts are cut between the splits
    assert long["too_short"] == short and long["min_document_tokens"] == N
    assert long["documents_skipped"] == all_["documents_skipped"] == 1
    assert all_["min_document_tokens"] == 0 and all_["too_short"] == {**short, "documents": 0, "tokens": 0}


def test_the_tokenizer_is_trained_on_all_documents(folder):
    """The test would notice a tokenizer trained on the remaining documents only."""
    assert manifest(folder / "data/long")["tokenizer"] == manifest(folder / "data/all")["tokenizer"]
    for name, sha256 in content(folder / "data/all").items():
        assert not name.startswith("tokenizer.") or content(folder / "data/long")[name] == sha256
    tokenizer = Tokenizer.load(folder / "data/long")
    kept = [tokenizer.decode(ids[:-1]) for ids in documents(folder / "data/long", "train")]
    assert Tokenizer.train(kept, 300).fingerprint != tokenizer.fingerprint


def test_workers_sources_and_injections_keep_the_same_documents(folder):
    texts = [path for path in sorted((folder / "texts").iterdir()) if path.name != "07.txt"]
    rows = [json.dumps({"text": path.read_text()}) for path in texts]
    (folder / "hub").mkdir()
    (folder / "hub/a.jsonl").write_text("\n".join([*rows[:7], "no json", *rows[7:]]))
    run(folder, "--name=w3", LONG, "--workers=3")
    run(folder, "--name=rows", LONG, "--files=hub/a.jsonl")
    assert content(folder / "data/w3") == content(folder / "data/long")
    expected = {**content(folder / "data/long"), "manifest": None}
    assert {**content(folder / "data/rows"), "manifest": None} == expected
    (folder / "hub/a.jsonl").write_text("\n".join(rows))  # `datasets` refuses files with a broken row
    hub = [arg for arg in FILES if not arg.startswith(("--source", "--files"))]
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    args = (*hub, "--source=hf", "--hf_dataset=hub", "--name=hub", LONG)
    assert cli("prepare.py", *args, cwd=folder, env=env).returncode == 0
    assert {**content(folder / "data/hub"), "manifest": None} == expected
    sha256 = {manifest(folder / "data/long")["splits"][split]["content_sha256"] for split in SPLITS}
    for injection in ("periodic", "none"):
        run(folder, f"--name={injection}", LONG, f"--injection={injection}")
        splits = manifest(folder / f"data/{injection}")["splits"]
        assert {splits[split]["content_sha256"] for split in SPLITS} == sha256


def test_merged_parts_keep_the_same_documents(folder):
    for part in ("1/2", "2/2"):
        run(folder, "--name=m", LONG, f"--part={part}")
        run(folder, "--name=free", f"--part={part}")
    assert cli("prepare.py", "--merge", "data/m.part1of2", "data/m.part2of2", cwd=folder).returncode == 0
    assert content(folder / "data/m") == content(folder / "data/long")
    # the setting may also be given when merging, so one tokenization serves several datasets
    args = ("--merge", "data/free.part1of2", "data/free.part2of2", LONG)
    assert cli("prepare.py", *args, cwd=folder).returncode == 0
    assert content(folder / "data/free") == content(folder / "data/long")


def test_left_out_documents_are_reported_at_the_end_and_by_inspect(folder):
    short = manifest(folder / "data/long")["too_short"]
    sentence = (
        f"  left out as too short: {short['documents']} of {short['of_documents']} documents, with {short['tokens']:,} "
        f"of {short['of_tokens']:,} content tokens, because each of them had fewer than {N} tokens "
        "(min_document_tokens)\n"
    )
    skipped = "  1 document was skipped:\n"
    assert sentence + skipped in run(folder, "--name=said", LONG)
    for name, said in (("long", sentence + skipped), ("all", skipped)):
        out = io.StringIO()
        prepare.inspect(folder / "data" / name, Console(file=out, soft_wrap=True))
        assert said in out.getvalue() and ("left out" in out.getvalue()) == (name == "long")


def test_manifests_without_min_document_tokens_still_load(folder, tmp_path):
    (tmp_path / "manifest.json").write_bytes((folder / "data/all/manifest.json").read_bytes())
    facts = {k: v for k, v in manifest(tmp_path).items() if k not in ("min_document_tokens", "too_short")}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    assert read_manifest(tmp_path) == {**facts, "min_document_tokens": 0}
    prepare.print_summary(tmp_path, read_manifest(tmp_path), Console(quiet=True))
    for damage in ({"min_document_tokens": 5}, {"min_document_tokens": "5"}, {"min_document_tokens": None}):
        (tmp_path / "manifest.json").write_text(json.dumps({**facts, **damage}))
        with pytest.raises(UserError, match="damaged"):
            read_manifest(tmp_path)


def test_the_name_of_a_dataset_contains_min_document_tokens(folder):
    root = Path("data")
    for cfg, name in (
        (PrepareConfig(), "stdlib_uniform"),
        (PrepareConfig(min_document_tokens=2048), "stdlib_uniform_2048plus"),
        (PrepareConfig(min_document_tokens=2048, recipe="c4", injection="none"), "c4_none_2048plus"),
        (PrepareConfig(min_document_tokens=2048, name="mine"), "mine"),
    ):
        assert prepare.dataset_folder(cfg, root) == root / name
        if name != "mine":  # the name leads back to the settings
            found = recipe_of(f"data/{name}")
            assert prepare.dataset_folder(found, root) == root / name
            assert (found.min_document_tokens, found.injection) == (cfg.min_document_tokens, cfg.injection)
    sentence = r"prepare.py config/stdlib.py --injection=none --min_document_tokens=4096\.$"
    with pytest.raises(UserError, match=sentence):
        open_windows(TrainConfig(dataset=str(folder / "stdlib_none_4096plus")), "train")


def test_a_split_without_documents_is_refused_and_changes_nothing(folder):
    longest = {split: max(map(len, documents(folder / "data/all", split))) for split in SPLITS}
    assert longest["val"] != longest["train"]
    least = min(longest.values())
    loser = min(SPLITS, key=longest.get)
    before = tree(folder)
    for n, where in ((least + 1, loser), (max(longest.values()) + 1, "train and val")):
        error = refusal(cli("prepare.py", *FILES, "--name=x", f"--min_document_tokens={n}", cwd=folder))
        assert f"min_document_tokens={n} leaves no document in {where}, because the longest has " in error
        assert all(f"{longest[split]} tokens in {split}" in error for split in SPLITS)
        assert error.endswith(f"lower it to {least} or less, or give longer documents.\n")
    # the remaining text is less than one chunk
    args = override(FILES, "--chunk_content=1000000", "--name=x", LONG)
    error = refusal(cli("prepare.py", *args, cwd=folder))
    assert f"others were left out by min_document_tokens={N})" in error and "or lower --min_document_tokens" in error
    assert tree(folder) == before
    run(folder, "--name=cured", f"--min_document_tokens={least}")
    assert [len(ids) for ids in documents(folder / "data/cured", loser)] == [least]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=12), st.integers(0, 14), st.data())
def test_documents_may_arrive_in_blocks_of_any_size(lengths, least, data):
    """Documents have 1 to 13 tokens, <|endoftext|> = 0 included, and all other tokens differ. Blocks may be empty."""
    stream, kept, token = [], [], 1
    for length in lengths:
        document = [*range(token, token + length), 0]
        token += length
        stream += document
        kept += document if length + 1 >= least else []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    long, out = LongDocuments(0, least), []
    for block in np.split(np.array(stream, np.uint16), cuts):
        passed = long.take(block)
        assert passed.dtype == np.uint16
        out += passed.tolist()
    assert out == kept
    short = [length + 1 for length in lengths if length + 1 < least]
    assert (long.too_short, long.tokens_too_short) == (len(short), sum(short))
    assert long.longest == (max((length + 1 for length in lengths), default=0) if least else 0)


def test_long_documents_are_passed_on_before_their_end():
    long = LongDocuments(0, 1000)
    passed = [len(long.take(np.ones(300, np.uint16))) for _ in range(10)]
    assert passed == [0, 0, 0, 1200, *[300] * 6]
