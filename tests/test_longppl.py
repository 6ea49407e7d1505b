"""Tests eval.py longppl: pieces that two tokenizers share, short contexts, and key tokens, against slow loops."""

import dataclasses
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa import eval as evaluation
from nanometa.common.errors import UserError
from nanometa.common.statistics import clustered_ratio
from nanometa.config import MarkerConfig
from nanometa.data.assemble import marked_text
from nanometa.data.layout import IGNORE, Layout, batch_of
from nanometa.data.shards import read_manifest
from nanometa.data.tokenizer import ENDOFTEXT, Tokenizer
from nanometa.evals import longppl
from nanometa.evals.documents import documents_of, pieces
from nanometa.evals.longppl import LongpplEval, Sums, is_key
from nanometa.evals.piece_reader import PieceReader
from nanometa.evals.shared_text import SharedPiece, carried, cuts, shared_pieces
from nanometa.inference.scoring import score_batch
from tests.conftest import TINY, WORDS, cli, manifest, override
from tests.reference import longppl as reference
from tests.runs import run_on, saved
from tests.test_perplexity import double

KEY = " Schlüssel☃"  # has characters of two and three bytes
K, D = 8, 4  # short_length and short_stride
SHORT = ("--short_length=8", "--short_stride=4")


def write_texts(folder: Path) -> None:
    """Writes documents of random words, in which every 30th word is followed by KEY."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(24):
        words = [
            WORDS[i] + (KEY if place % 30 == 17 else "") for place, i in enumerate(rng.integers(len(WORDS), size=90))
        ]
        (folder / f"{number:02}.txt").write_text(" ".join(words))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with two datasets of one text: data/a and data/b have different tokenizers and chunks."""
    folder = tmp_path_factory.mktemp("two")
    write_texts(folder / "texts")
    for name, size, chunk in (("a", 290, 20), ("b", 330, 14)):
        args = ("--source=files", "--files=texts/*.txt", "--injection=none", "--val_fraction=0.3", f"--name={name}")
        result = cli("prepare.py", *args, f"--bpe_vocab_size={size}", f"--chunk_content={chunk}", cwd=folder)
        assert result.returncode == 0, result.stderr.decode()
    return folder


def plain(folder: Path, **changes):
    """Returns a run without markers on a dataset, in windows of 60 tokens."""
    return double(run_on(folder, second_attention="none", position="rope", **{"block_size": 60, **changes}))


# ----------------------------------------------------------------------------- the text in two tokenizations

token_bytes = st.lists(st.integers(1, 4), max_size=14)


@settings(max_examples=150, deadline=None)
@given(token_bytes, token_bytes, st.integers(1, 7))
def test_pieces_end_at_the_last_border_that_both_tokenizers_share(first, second, size):
    first, second = [0, *first], [0, *second]
    found = cuts(np.cumsum(first), np.cumsum(second), size)
    assert [((i.start, j.start), (i.stop, j.stop)) for i, j in found] == reference.cuts(first, second, size)
    for i, j in found:
        assert sum(first[: i.start]) == sum(second[: j.start]) and sum(first[i]) == sum(second[j])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3)), st.integers(1, 5))
def test_with_one_tokenizer_the_pieces_are_those_of_documents(content, size):
    content = np.array(content, dtype=np.int64)
    found, owners, _ = pieces(content, 0, size)
    mine = []
    for number, document in enumerate(documents_of(content, 0)):
        ends = np.cumsum(document > 0)
        mine += [(number, document[i].tolist()) for i, j in cuts(ends, ends, size) if i == j]
    assert mine == [(owner, piece) for owner, piece in zip(owners.tolist(), found.tolist(), strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=12), st.randoms(use_true_random=False))
def test_a_token_is_key_if_all_its_bytes_lie_in_one_merged_interval(tokens, random):
    flags, flagged = [flag for flag, _ in tokens], [size for _, size in tokens]
    asked, left = [0], sum(flagged)
    while left:
        asked.append(random.randint(0, min(4, left)))
        left -= asked[-1]
    found = carried(np.array(flags, dtype=bool), np.array(flagged, dtype=int), np.array(asked))
    assert found.tolist() == reference.inside(reference.merged(flags, flagged), asked)


def test_both_runs_read_the_same_bytes_of_the_same_documents(two):
    folders = two / "data/a", two / "data/b"
    runs = [plain(folder) for folder in folders]
    found = shared_pieces(runs, folders, 40)
    texts = [[run.tokenizer.text_bytes(piece[1 + i]) for piece in found] for i, run in enumerate(runs)]
    assert texts[0] == texts[1] and len(found) > 20
    assert max(len(piece.first) for piece in found) == 40 > max(len(piece.second) for piece in found)
    # the whole validation split, but for the remainders of documents
    documents = {path.read_bytes() for path in (two / "texts").glob("*.txt")}
    for number in {piece.document for piece in found}:
        mine = b"".join(text for piece, text in zip(found, texts[0], strict=True) if piece.document == number)
        assert sum(document.startswith(mine) for document in documents) == 1
        starts = next(piece for piece in found if piece.document == number)
        assert (starts.first[0], starts.second[0]) == tuple(run.tokenizer.eot for run in runs)
    assert sum(run.tokenizer.eot in ids[1:] for piece in found for run, ids in zip(runs, piece[1:], strict=True)) == 0


def test_the_hash_of_the_text_depends_on_documents_but_not_on_the_tokenizer(two, workdir, tmp_path):
    hashes = [
        [manifest(two / "data" / name)["splits"][split]["text_sha256"] for name in "ab"] for split in ("train", "val")
    ]
    assert all(a == b for a, b in hashes) and hashes[0] != hashes[1]
    tokenizers = [Tokenizer.load(two / "data" / name) for name in "ab"]
    for tokenizer in tokenizers:
        eot, one, word = [tokenizer.eot], tokenizer.encode("ä"), tokenizer.encode(ENDOFTEXT)
        assert marked_text(np.concatenate([one, eot, eot, one]), tokenizer) == "ä".encode() + b"\xff\xff" + "ä".encode()
        assert marked_text(np.concatenate([one, word, one, eot]), tokenizer) == f"ä{ENDOFTEXT}ä".encode() + b"\xff"
    assert len({manifest(workdir / "data" / name)["splits"]["val"]["text_sha256"] for name in "upn"}) == 1


# ----------------------------------------------------------------------------- reading


def slow_nats(run, batch, start: int, q: int) -> float:
    """Returns the nats of the target at position q of a Batch of one text if the text began at `start`."""
    columns = {
        "content": batch.tokens,
        "reads_from": torch.zeros_like(batch.tokens),
        "read_until": batch.tokens * 0 + 2**31 - 1,
    }
    for name in ("tokens", "positions", "reads_from", "read_until"):
        if getattr(batch, name) is not None:
            columns[name] = getattr(batch, name)
    layout = Layout(**{name: column[0].numpy() for name, column in columns.items()}).cut(start, q + 1 - start)
    target = np.full(q + 1 - start, IGNORE)
    target[-1] = batch.targets[0, q]
    index = np.array([[i - start for i in batch.meta_index[0].tolist() if start <= i <= q]], dtype=np.int64)
    hides = types.SimpleNamespace(before=batch.reads_from is not None, after=batch.read_until is not None)
    return score_batch(run.model, batch_of([layout], [target], index, hides=hides)).nats.sum().item()


SR = MarkerConfig(marker_place="newline", closing_reads="segment")
SPANS = MarkerConfig(marker_place="span", marks="clcr", closing_reads="segment", evict="segment", max_span=6)
WINDOW = MarkerConfig(evict="window", eviction_window=7, sinks=2)
READ = {
    "plain": ("n", {"second_attention": "none"}, MarkerConfig()),
    "random": ("n", {"second_attention": "random"}, MarkerConfig()),
    "window": ("n", {"second_attention": "none"}, WINDOW),
    "stored": ("u", {"second_attention": "meta"}, MarkerConfig()),
    "stored skip": ("u", {"second_attention": "meta", "rule": "skip"}, MarkerConfig()),
    "sr": ("n", {"second_attention": "none", "rule": "skip", "block_size": 40}, SR),
    "sr previous": (
        "n",
        {"second_attention": "meta", "rule": "skip", "block_size": 40, "meta_position": "previous"},
        SR,
    ),
    "clcr": ("n", {"second_attention": "none", "rule": "skip", "block_size": 40}, SPANS),
}


@pytest.mark.parametrize("name", READ)
def test_every_run_reads_a_piece_as_it_was_trained_and_again_from_every_start(workdir, name):
    data, changes, markers = READ[name]
    run = double(run_on(workdir / "data" / data, **{"position": "rope", **changes}))
    run.config = dataclasses.replace(run.config, markers=markers)
    reader, tokenizer = PieceReader(run, 45), run.tokenizer
    ids = shared_pieces((run, run), (workdir / "data" / data,) * 2, 45)[3].first
    batch = reader.batch(3, ids)
    tokens = batch.tokens[0].numpy()
    assert tokens[tokens < tokenizer.n_content].tolist() == ids.tolist()
    assert batch.targets[batch.targets != IGNORE].tolist() == ids[1:].tolist()
    markers_there = len(tokens) - len(ids)
    assert (markers_there > 1) == (markers.places_markers or data == "u")
    assert (batch.read_until is not None) == (markers.evict != "nothing")
    if markers_there:
        assert not np.array_equal(tokens, reader.batch(4, ids).tokens[0].numpy()) or markers is SR  # a draw of its own
    whole, short = reader.whole_nats(batch), reader.short_nats(batch, 11, 4)
    scored = np.flatnonzero(batch.targets[0] != IGNORE).tolist()
    assert whole == pytest.approx([slow_nats(run, batch, 0, q) for q in scored], abs=1e-6)
    for q, nats in zip(scored, short, strict=True):
        start = 0
        while q >= start + 11:
            start += 4
        if q < 11:
            assert math.isnan(nats)
        else:
            assert nats == pytest.approx(slow_nats(run, batch, min(start, len(tokens) - 11), q), abs=1e-6)
    assert np.nanmax(np.abs(whole - short)) > 0.01 or name == "window"


def test_windows_of_short_contexts_are_read_in_parts_alike(workdir, monkeypatch):
    run = plain(workdir / "data/n", block_size=56)
    reader, (piece, *_) = PieceReader(run, 56), shared_pieces((run, run), (workdir / "data/n",) * 2, 56)
    batch = reader.batch(0, piece.first)
    found = reader.short_nats(batch, 11, 4)
    monkeypatch.setattr("nanometa.evals.piece_reader.POSITIONS", 30)
    assert np.allclose(reader.short_nats(batch, 11, 4), found, rtol=0, atol=1e-9, equal_nan=True)
    assert np.isnan(reader.short_nats(batch, 56, 4)).all()  # no position has a longer context


# ----------------------------------------------------------------------------- key tokens


def test_thresholds_are_strict_and_a_token_without_a_short_context_is_never_key():
    whole, short = np.array([1.0, 1.0, 1.0, 2.0, 1.5]), np.array([3.0, 3.25, np.nan, 5.0, 9.0])
    assert is_key(whole, short, 2, -2).tolist() == [False, True, False, False, True]


def measured(cfg: LongpplEval, run, evaluator, found: list[SharedPiece]) -> list[dict]:
    sums, readers = Sums(cfg, run, evaluator), (PieceReader(run, 40), PieceReader(evaluator, 40))
    for number, piece in enumerate(found):
        sums.add(piece, *longppl.read(cfg, readers, number, piece))
    return list(sums.figures())


@pytest.mark.parametrize(("ours", "theirs"), [("a", "b"), ("b", "a"), ("a", "a")])
def test_the_figures_are_those_of_loops_that_read_every_prefix_again(two, ours, theirs):
    folders = two / "data" / ours, two / "data" / theirs
    run, evaluator = plain(folders[0]), plain(folders[1], seed=8)
    cfg = LongpplEval(short_length=K, short_stride=D, alpha=(0.5, 0.1), beta=-9.0)
    found = shared_pieces((run, evaluator), folders, 40)[:9:3]
    everything = []
    for piece in found:
        first, second = piece.first.tolist(), piece.second.tolist()
        n_bytes = [of.tokenizer.token_bytes[ids].tolist() for of, ids in ((run, first), (evaluator, second))]
        nats = reference.whole_nats(run, first), reference.whole_nats(evaluator, second)
        everything.append((piece.document, n_bytes, *nats, reference.short_nats(evaluator, second, K, D)))
    for line in measured(cfg, run, evaluator, found):
        keys, differences, lsds, by_document = [], [], [], {}
        for document, (first, second), nats, whole, short in everything:
            both = [(a, b) for a, b in zip(whole, short, strict=True) if b is not None]
            differences += [b - a for a, b in both]
            lsds += [b - a for a, b in both if b - a > line["alpha"] and a < 9]
            there = reference.inside(reference.key_intervals(whole, short, second, line["alpha"], -9), first)[1:]
            mine = [(a, size) for a, size, key in zip(nats, first[1:], there, strict=True) if key]
            keys += mine
            if mine:
                by_document.setdefault(document, []).extend(mine)
        assert (line["candidates"], line["keys"], line["key_tokens"]) == (len(differences), len(lsds), len(keys))
        assert line["keys"] > 2 and line["key_tokens"] > 2 and line["share"] == len(lsds) / len(differences)
        assert line["median_lsd"] == pytest.approx(np.median(differences), abs=1e-4)
        assert line["key_median_lsd"] == pytest.approx(np.median(lsds), abs=1e-4)
        mean = sum(nats for nats, _ in keys) / len(keys)
        assert line["key_loss"] == pytest.approx(mean, abs=1e-4) and line["longppl"] == pytest.approx(
            math.exp(mean), 1e-4
        )
        assert line["key_bytes"] == sum(size for _, size in keys)
        assert line["key_nats_per_byte"] == pytest.approx(sum(nats for nats, _ in keys) / line["key_bytes"], 1e-4)
        assert line["document_numbers"] == list(by_document)
        assert line["document_key_tokens"] == [len(of) for of in by_document.values()]
        sums = [sum(nats for nats, _ in of) for of in by_document.values()]
        assert line["document_key_nats"] == pytest.approx(sums, abs=1e-3)
        all_nats = [nats for _, _, of, *_ in everything for nats in of]
        assert line["tokens"] == len(all_nats) and line["loss"] == pytest.approx(np.mean(all_nats), abs=1e-4)
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert line["bits_per_byte"] == pytest.approx(line["nats_per_byte"] / math.log(2))
        low, high = line["perplexity_interval"]
        assert low < line["perplexity"] < high


@pytest.fixture(scope="module")
def runs(two, workdir, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    shape = {"second_attention": "none", "position": "rope"}
    tasks = run_on(workdir / "data/n", **shape)
    tasks.config = dataclasses.replace(tasks.config, task=dataclasses.replace(tasks.config.task, tasks=("parity",)))
    made = {
        "a": run_on(two / "data/a", **shape, block_size=60),
        "b": run_on(two / "data/b", **shape, block_size=56, seed=8),
        "n": run_on(workdir / "data/n", **shape, block_size=56), "u": run_on(workdir / "data/u", block_size=64),
        "table": run_on(workdir / "data/n", second_attention="none", block_size=28), "tasks": tasks,
    }  # fmt: skip
    return {name: saved(run, folder / name) for name, run in made.items()}


def lines_of(path: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("ours", "theirs"), [("a", "b"), ("b", "a")])
def test_keys_planted_in_the_text_are_found_with_another_tokenizer(runs, tmp_path, monkeypatch, ours, theirs):
    """An evaluator that knows where KEY stands, and one tokenizer per run, of which neither has KEY as one token."""
    expected = {"tokens": 0, "bytes": 0}

    def planted(tokenizer, ids: np.ndarray) -> np.ndarray:
        """Returns which tokens lie within an occurrence of KEY in the text of the ids."""
        text, word, ends = tokenizer.text_bytes(ids), KEY.encode(), np.cumsum(tokenizer.token_bytes[ids])
        found = np.zeros(len(ids), dtype=bool)
        at = text.find(word)
        while at >= 0:
            found |= (
                (ends - tokenizer.token_bytes[ids] >= at) & (ends <= at + len(word)) & (tokenizer.token_bytes[ids] > 0)
            )
            at = text.find(word, at + 1)
        return found

    def read(cfg, readers, number, piece):
        ours, theirs = (planted(of.run.tokenizer, ids) for of, ids in zip(readers, piece[1:], strict=True))
        theirs[0] = False  # the first token of a piece is not scored
        n_bytes = [of.run.tokenizer.token_bytes[ids].tolist() for of, ids in zip(readers, piece[1:], strict=True)]
        key = reference.inside(reference.merged(theirs.tolist(), n_bytes[1]), n_bytes[0])
        assert not any(k and not own for k, own in zip(key, ours, strict=True))
        # all of KEY is found, but where it is at the start of a piece
        assert all(i < 13 for i, (k, own) in enumerate(zip(key, ours, strict=True)) if own and not k)
        expected["tokens"] += sum(key[1:])
        expected["bytes"] += sum(size for k, size in zip(key[1:], n_bytes[0][1:], strict=True) if k)
        return np.ones(len(ours) - 1), np.full(len(theirs) - 1, 0.5), np.where(theirs[1:], 3.0, 0.5)

    monkeypatch.setattr(longppl, "read", read)
    output = tmp_path / "lines"
    evaluation.main(["longppl", f"--run={runs[ours]}", f"--evaluator={runs[theirs]}", f"--output={output}", *SHORT])
    line = lines_of(output)[0]
    assert line["alpha"] == 2 and line["keys"] > 10
    assert (line["key_tokens"], line["key_bytes"]) == (expected["tokens"], expected["bytes"])
    assert line["longppl"] == pytest.approx(math.e) and line["candidates"] > 40 * line["keys"] / 30


def test_the_command_writes_a_line_for_each_alpha_and_says_when_there_is_no_key(runs, tmp_path, capsys):
    output = tmp_path / "lines"
    command = ["longppl", f"--run={runs['u']}", f"--evaluator={runs['n']}", f"--output={output}", *SHORT]
    evaluation.main([*command, "--alpha", "0.25", "90", "--beta=-6", "--pieces=9"])
    found, none = lines_of(output)
    assert [line["alpha"] for line in (found, none)] == [0.25, 90] and found["eval"] == "longppl"
    assert found["key_tokens"] == found["keys"] > 3  # one tokenizer
    assert found["length"] == 56 and found["pieces"] == 9 and found["tokens"] == 9 * 55
    assert found["candidates"] == 9 * (56 - 1 - 11)
    assert (none["longppl"], none["longppl_interval"], none["key_loss"], none["key_median_lsd"]) == (None,) * 4
    assert (none["keys"], none["key_tokens"], none["share"], none["document_key_nats"]) == (0, 0, 0.0, [])
    assert {none[name] == found[name] for name in ("perplexity", "tokens", "median_lsd", "bytes")} == {True}
    out = capsys.readouterr().out
    assert f"LongPPL {found['longppl']:.3f} (" in out and f"perplexity {found['perplexity']:.3f} (" in out
    assert (
        "alpha 90    no token is key, so there is no LongPPL; the evaluator has 0 keys (0.00% of its tokens)\n" in out
    )
    assert "the latter nats are fewer than 6." in out and "key tokens from " in out


def test_a_result_does_not_depend_on_the_markers_of_the_dataset(runs, workdir, tmp_path):
    """The dataset without markers and the one with them have the same content. A run reads it with its own ones."""
    outputs = [tmp_path / name for name in "un"]
    for data, output in zip("un", outputs, strict=True):
        evaluation.main(["longppl", f"--run={runs['u']}", f"--evaluator={runs['u']}", f"--output={output}", *SHORT,
                         "--pieces=4", "--alpha=0.1", f"--dataset={workdir}/data/{data}"])  # fmt: skip
    first, second = (lines_of(output)[0] for output in outputs)
    apart = ("dataset", "evaluator_dataset", "command", "seconds")
    assert {k: v for k, v in first.items() if k not in apart} == {k: v for k, v in second.items() if k not in apart}


REFUSED = [
    ("n", "n", ("--evaluator=",), "evaluator is empty: name the run that finds the key tokens"),
    ("tasks", "n", (), "tasks/.* was trained on tasks \\(parity\\), not on text: use another run"),
    ("n", "tasks", (), "tasks/.* was trained on tasks"),
    ("n", "n", ("--short_length=52", "--short_stride=4"), "short_length=52 and short_stride=4 leave no token"),
    ("n", "n", ("--length=57", *SHORT), "was trained in windows of 56 content tokens, so the tokens that it finds in"),
    ("table", "n", ("--length=40", *SHORT), "table/.* cannot read the pieces: 40 positions do not fit"),
    ("a", "n", SHORT, "the validation texts of .*/data/a and .*/data/n differ: prepare both from the same source"),
    ("n", "n", ("--alpha", "2", "2"), "alpha=.* is out of range: it must name each threshold once"),
    ("n", "n", ("--alpha=-1",), "alpha=.* is out of range"),
    ("n", "n", ("--beta=1",), "beta=1.0 is out of range"),
    ("n", "n", ("--short_stride=0",), "short_stride=0 is out of range"),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "more", "sentence"), REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_sentence(runs, tmp_path, capsys, ours, theirs, more, sentence):
    evaluator = [] if "--evaluator=" in more else [f"--evaluator={runs[theirs]}"]
    with pytest.raises(UserError, match=sentence):
        evaluation.main(["longppl", f"--run={runs[ours]}", *evaluator, f"--output={tmp_path}/lines", *more])
    assert not (tmp_path / "lines").exists()


def without_hash(folder: Path) -> None:
    """Turns a dataset into one of an earlier version, whose manifest has no hash of the text."""
    facts = read_manifest(folder)
    for split in facts["splits"].values():
        split.pop("text_sha256", None)
    (folder / "manifest.json").write_text(json.dumps(facts))


def test_datasets_without_a_hash_of_the_text_need_the_same_tokens(two, workdir, runs, tmp_path):
    old = {name: shutil.copytree(folder, tmp_path / name) for name, folder in
           (("a", two / "data/a"), ("u", workdir / "data/u"), ("n", workdir / "data/n"))}  # fmt: skip
    for folder in old.values():
        without_hash(folder)
    with pytest.raises(UserError, match="the manifest of .*/a has no text_sha256, .*: prepare it again"):
        evaluation.main(["longppl", f"--run={runs['a']}", f"--evaluator={runs['b']}", f"--dataset={old['a']}", *SHORT])
    evaluation.main(["longppl", f"--run={runs['u']}", f"--evaluator={runs['n']}", f"--dataset={old['u']}", *SHORT,
                     f"--evaluator_dataset={old['n']}", "--pieces=2", f"--output={tmp_path}/lines"])  # fmt: skip
    assert {line["text_sha256"] for line in lines_of(tmp_path / "lines")} == {None}


# ----------------------------------------------------------------------------- what perplexity does not see

TAGS = tuple("red blue green pink grey gold teal plum lime navy rust jade sand coal mint wine".split())


def write_distant_texts(folder: Path, documents: int = 150) -> None:
    """Writes documents of lines of 12 to 15 words. Each line ends with # and a tag that its document has throughout.

    A word depends on the two words before it, so a model needs many steps to learn which words are likely."""
    rng = np.random.default_rng(5)
    after = rng.integers(len(WORDS), size=(len(WORDS), len(WORDS), 3))
    folder.mkdir()
    for number in range(documents):
        lines, tag, last = [], TAGS[rng.integers(len(TAGS))], [0, 1]
        for _ in range(36):
            words = []
            for _ in range(rng.integers(12, 16)):
                last = [last[1], after[*last, rng.integers(3)]]
                words.append(WORDS[last[1]])
            lines.append(" ".join([*words, "#", tag]) + "\n")
        (folder / f"{number:03}.txt").write_text("".join(lines))


@pytest.mark.slow
def test_longppl_separates_two_runs_of_equal_perplexity(tmp_path):
    """One run reads at most 9 positions, those of two layers with windows of 5, and the last tag is at least 14 back.

    The other run reads everything. Its checkpoint is chosen by validation loss alone, as the one closest to the first
    run's. The evaluator is a third run, of another seed."""
    write_distant_texts(tmp_path / "texts")
    args = ("--source=files", "--files=texts/*.txt", "--injection=none", "--val_fraction=0.15", "--name=far")
    result = cli("prepare.py", *args, "--bpe_vocab_size=450", "--chunk_content=96", cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    common = override(TINY, "--dataset=data/far", "--block_size=96", "--n_embd=48", "--position=rope", "--keep=100",
                      "--second_attention=none", "--optimizer=muon", "--learning_rate=1e-2", "--min_lr=4e-3",
                      "--warmup_steps=10", "--eval_windows=40", "--log_interval=100", "--max_steps=500")  # fmt: skip
    seldom = ("--eval_interval=100", "--save_interval=100")
    runs = {
        "window": ("--evict=window", "--eviction_window=5", *seldom),
        "reader": ("--seed=1", "--eval_interval=10", "--save_interval=10"),
        "judge": ("--seed=2", *seldom),
    }
    losses = {}
    for name, own in runs.items():
        result = cli("train.py", *override(common, f"--run_name={name}", *own), cwd=tmp_path)
        assert result.returncode == 0, result.stderr.decode()
        lines = map(json.loads, (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = {line["step"]: line["loss"] for line in lines if line["kind"] == "val" and line["step"]}
    step = min(losses["reader"], key=lambda step: abs(losses["reader"][step] - losses["window"][500]))
    found = []
    for checkpoint in ("window/step_00000500", f"reader/step_{step:08}"):
        result = cli("eval.py", "longppl", f"--run=out/{checkpoint}", "--evaluator=out/judge/step_00000500",
                     "--short_length=10", "--short_stride=3", "--output=found.jsonl", cwd=tmp_path)  # fmt: skip
        assert result.returncode == 0, result.stderr.decode()
        found.append(lines_of(tmp_path / "found.jsonl")[-3])
    window, reader = found
    assert window["alpha"] == 2 and abs(window["perplexity"] / reader["perplexity"] - 1) < 0.02
    assert window["key_tokens"] == reader["key_tokens"] > 100
    assert window["longppl"] > 3 * reader["longppl"] and window["longppl_interval"][0] > reader["longppl_interval"][1]
    nats = np.subtract(window["document_key_nats"], reader["document_key_nats"])
    assert clustered_ratio(nats, np.array(window["document_key_tokens"]))[0] > math.log(3)
