import io
import json
import re
import shlex
import time

import pytest
from rich.console import Console

from nanometa import prepare as module
from nanometa.common.files import file_sha256
from nanometa.config import PrepareConfig
from nanometa.data.sources import Piece
from nanometa.data.tokenizer import Tokenizer
from nanometa.prepare import split_of
from tests.conftest import cli, manifest, override, refusal, tree, write_texts

FILES = ("--source=files", "--files=texts/*.txt", "--bpe_vocab_size=300", "--chunk_content=28", "--chunk_markers=4",
         "--val_fraction=0.1")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_texts(tmp_path / "texts", documents=30)
    return tmp_path


def prepare(folder, *args):
    result = cli("prepare.py", *override(FILES, *args), cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def hashes(folder) -> dict:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*")) if path.name != "manifest.json"}


def test_any_number_of_workers_gives_the_same_bytes(folder):
    prepare(folder, "--name=w1", "--workers=1")
    prepare(folder, "--name=w5", "--workers=5", "--shard_tokens=1000000")
    assert hashes(folder / "data/w1") == hashes(folder / "data/w5")
    prepare(folder, "--name=seed2", "--seed=2")
    assert hashes(folder / "data/w1") != hashes(folder / "data/seed2")


def test_a_long_list_of_files_is_printed_shortened_and_recorded_whole(folder):
    names = [f"texts/a file with a long name {i}.txt" for i in range(40)]
    for i, name in enumerate(names):
        (folder / name).write_text(f"text number {i} of many, with its own words. " * 60)
    try:
        args = ("--source=files", "--name=listed", "--bpe_vocab_size=300", "--chunk_content=28", "--chunk_markers=4",
                "--val_fraction=0.1", "--files", *names)  # fmt: skip
        result = cli("prepare.py", *args, cwd=folder)
    finally:
        for name in names:
            (folder / name).unlink()
    assert result.returncode == 0, result.stderr.decode()
    facts, out = manifest(folder / "data/listed"), result.stdout.decode()
    assert shlex.split(facts["command"]) == ["python", "prepare.py", *args]
    assert facts["source"] == f"files {' '.join(names)}"
    assert len(re.findall("characters ...", out)) == 3 and max(map(len, out.splitlines())) < 600


def test_the_manifest_describes_the_shards(folder):
    out = prepare(folder, "--name=small", "--shard_tokens=500")
    facts = manifest(folder / "data/small")
    train = facts["splits"]["train"]
    # shards are whole numbers of chunks
    assert len(train["shards"]) > 10 and {entry["tokens"] for entry in train["shards"][:-1]} == {512}
    assert sum(entry["tokens"] for entry in train["shards"]) == train["content_tokens"] + train["markers"]
    assert train["markers"] == train["chunks"] * 4 and train["content_tokens"] == train["chunks"] * 28
    for split in facts["splits"].values():
        for entry in split["shards"]:
            assert file_sha256(folder / "data/small" / entry["file"]) == entry["sha256"]
    assert facts["command"].startswith("python prepare.py --source=files") and facts["command"] in out.replace("\n", "")
    assert sum(split["documents"] for split in facts["splits"].values()) == 30
    text = sum(path.stat().st_size for path in (folder / "texts").glob("*.txt"))
    kept = sum(split["bytes"] for split in facts["splits"].values())
    assert 0 <= text - kept < 28 * 10 * 2  # only the ends that fill no chunk are missing


def test_one_very_large_document_does_not_dominate_validation(tmp_path):
    write_texts(tmp_path / "texts", documents=1, words=600_000)
    prepare(tmp_path, "--name=one")
    splits = manifest(tmp_path / "data/one")["splits"]
    share = splits["val"]["bytes"] / (splits["val"]["bytes"] + splits["train"]["bytes"])
    assert 0.02 < share < 0.25


def test_the_split_of_a_document_depends_only_on_its_text(folder):
    """New documents do not move other documents to the other split, and equal texts go to the same split."""
    cfg = PrepareConfig(val_fraction=0.2)
    pieces = [Piece(f"document number {i}", last=True) for i in range(2000)]
    sides = [split_of(piece, cfg) for piece in pieces]
    assert [split_of(piece, cfg) for piece in pieces[::-1]][::-1] == sides
    assert 320 < sides.count("val") < 480


def test_a_bpe_is_trained_only_on_the_train_split(folder):
    prepare(folder, "--name=a")
    secret = "zqxzqx zqxzqx zqxzqx " * 200
    cfg = PrepareConfig(val_fraction=0.1)
    number = next(i for i in range(1000) if split_of(Piece(f"{i} {secret}", last=True), cfg) == "val")
    (folder / "texts/zz.txt").write_text(f"{number} {secret}")
    prepare(folder, "--name=b")
    a, b = (Tokenizer.load(folder / "data" / name) for name in "ab")
    assert a.fingerprint == b.fingerprint
    assert manifest(folder / "data/b")["splits"]["val"]["bytes"] > manifest(folder / "data/a")["splits"]["val"]["bytes"]


def test_a_bpe_that_runs_out_of_merges_says_so(folder):
    """A smaller vocabulary changes the model, so it must not pass unnoticed."""
    out = " ".join(prepare(folder, "--name=large", "--bpe_vocab_size=50000").split())
    n = Tokenizer.load(folder / "data/large").n_content
    assert 257 < n < 50_000
    assert f"warning: the tokenizer has {n:,} tokens, not bpe_vocab_size=50,000, because" in out
    assert "warning: the tokenizer" not in prepare(folder, "--name=small")
    assert Tokenizer.load(folder / "data/small").n_content == 300


def test_training_a_bpe_prints_signs_of_life(monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    for terminal, said in ((False, r"(training: 0 s so far\n){2,}"), (True, r"(?s).*training.*0:00:00.*")):
        out = io.StringIO()
        with module.heartbeat(Console(file=out, force_terminal=terminal), "training"):
            time.sleep(0.2)
        assert re.fullmatch(said, out.getvalue())


def test_unreadable_documents_are_counted_and_named(folder):
    (folder / "texts/latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 10)
    (folder / "texts/empty.txt").write_bytes(b"")
    out = prepare(folder, "--name=bad")
    facts = manifest(folder / "data/bad")
    assert facts["documents_skipped"] == 1
    assert facts["skipped"] == [["texts/latin1.txt", "not UTF-8 at byte 3"]]
    assert "1 document was skipped" in out and "texts/latin1.txt: not UTF-8 at byte 3" in out


def test_a_dataset_may_use_the_tokenizer_of_another(folder):
    prepare(folder, "--name=a")
    (folder / "texts/more.txt").write_text("entirely different words " * 500)
    prepare(folder, "--name=b", "--tokenizer=data/a")
    assert manifest(folder / "data/a")["tokenizer"] == manifest(folder / "data/b")["tokenizer"]
    prepare(folder, "--name=g", "--tokenizer=gpt2")
    assert manifest(folder / "data/g")["tokenizer"]["n_vocab"] == 50304


def test_inspect_shows_the_markers(workdir):
    result = cli("prepare.py", "--inspect", "data/u", cwd=workdir)
    out = result.stdout.decode()
    assert result.returncode == 0 and "train, window 0 of" in out and "val, window 1 of" in out
    assert out.count("<|meta|>") >= 16  # 4 markers in each of 4 windows


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--name=taken"], "data/taken exists: choose another --name"),
        (["--files=nothing/*.txt"], r"no file matches 'nothing/\*.txt'"),
        (["--tokenizer=gpt3"], "tokenizer='gpt3' is unknown"),
        (["--chunk_content=1000000"], "the train split has .* tokens in .* documents, fewer than one chunk"),
        (["--val_fraction=0.0000001"], "the val split has 0 tokens.*raise --val_fraction"),
        (["--inspect", "data/nothing"], "there is no dataset in data/nothing"),
        (["--wokers=3"], "did you mean 'workers'"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing_on_disk(folder, args, sentence):
    prepare(folder, "--name=taken")
    before = tree(folder)
    base = () if "--inspect" in args else FILES  # no other setting has an effect with --inspect
    error = refusal(cli("prepare.py", *override(base, *args), cwd=folder))
    assert re.search(sentence, error), error
    assert tree(folder) == before


def test_the_manifest_has_readable_settings(workdir):
    facts = json.loads((workdir / "data/u/manifest.json").read_text())
    assert facts["chunk_content"] == 28 and facts["chunk_markers"] == 4 and facts["injection"] == "uniform"
    assert facts["val_text_compressed"]["gzip_9_bits_per_byte"] > facts["val_text_compressed"]["bytes"] * 0
