"""Tests eval.py perplexity --documents: pieces of single documents, and the loss by depth in them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanometa import eval as evaluation
from nanometa.common.errors import UserError
from nanometa.common.statistics import clustered_ratio
from nanometa.data.inject import strip
from nanometa.evals import perplexity
from nanometa.evals.common import read_split
from nanometa.evals.documents import pieces
from nanometa.evals.perplexity import PerplexityEval, long_pieces, measure_perplexity, streams, window
from tests.fast_cases import diagonal
from tests.reference import perplexity as reference
from tests.runs import run_on, saved
from tests.test_perplexity import double

EOT = 0


@settings(max_examples=300, deadline=None)
@example([1, 2, 3], 2)  # the split may end within a document
@example([EOT, EOT, 5, EOT], 1)
@given(st.lists(st.integers(0, 4)), st.integers(1, 7))
def test_every_document_is_cut_from_its_start(content, size):
    content = np.array(content, dtype=np.uint16)
    before = content.copy()
    found, owners, longest = pieces(content, EOT, size)
    assert found.shape == (len(owners), size) and found.dtype == content.dtype and (content == before).all()
    # all documents, each with the <|endoftext|> before it, split by another method
    documents = [[EOT, *map(ord, text)] for text in "".join(map(chr, content)).split(chr(EOT))]
    assert longest == max(map(len, documents))
    for number, document in enumerate(documents):
        mine = found[owners == number].reshape(-1).tolist()
        assert mine == document[: len(mine)] and len(document) - len(mine) < size
    assert (np.diff(owners) >= 0).all() and set(owners.tolist()) <= set(range(len(documents)))
    assert list(zip(owners.tolist(), found.tolist(), strict=True)) == reference.pieces(content.tolist(), EOT, size)


def cut(run, folder: Path, longest: int, markers: str):
    """Returns the pieces of a split in one draw of a condition, as main() cuts them, and the document of each piece."""
    content, owners = long_pieces(run, strip(read_split(run, folder, None), run.tokenizer.meta), longest, folder)
    (_, tokens), *_ = streams(run, None, content, markers, 3)
    width = window(run.state["data"], markers, longest, 1)[0]
    return np.split(tokens, range(width, len(tokens), width)), owners


@pytest.mark.parametrize(
    ("markers", "length", "stride", "bucket", "rule"),
    diagonal(
        [("trained", 96, 96, 1), ("none", 84, 84, 7), ("trained", 32, 16, 7), ("none", 28, 14, 1)], ("ignore", "skip")
    ),
)
def test_the_loss_equals_scoring_every_token_separately(workdir, rule, markers, length, stride, bucket):
    """Tests windows that are as long as a piece, and shorter windows that slide over the same pieces."""
    run = double(run_on(workdir / "data/u", rule=rule, position="rope"))
    texts, owners = cut(run, workdir / "data/u", 96, markers)
    # two pieces of the first document, and one piece each of two others
    picked = [1, *np.unique(owners, return_index=True)[1][:3]]
    texts, owners = [texts[i] for i in picked], owners[picked]
    assert owners.tolist() == [0, 0, 1, 2]
    slow = {}  # depth -> document -> list of nats
    for owner, text in zip(owners.tolist(), texts, strict=True):
        for source, _, nats in reference.token_nats(run, text.tolist(), length, stride):
            depth = sum(token != run.tokenizer.meta for token in text[: source + 1]) - 1
            slow.setdefault(depth // bucket * bucket, {}).setdefault(owner, []).append(nats)
    found = measure_perplexity(run, texts, length, stride, bucket, owners)
    assert [row[0] for row in found["by_depth"]] == sorted(slow) and found["document_pieces"] == [2, 1, 1]
    for number, (depth, n, mean, low, high) in enumerate(found["by_depth"]):
        sums, counts = (np.array([f(slow[depth][owner]) for owner in (0, 1, 2)]) for f in (sum, len))
        assert n == sum(counts) == 4 * (min(depth + bucket, 83) - depth)
        assert mean == pytest.approx(sum(sums) / n, abs=1e-4)
        assert [nats[number] for nats in found["document_nats"]] == pytest.approx(sums / counts, abs=1e-4)
        assert (low, high) == pytest.approx(clustered_ratio(sums, counts), abs=1e-3)
    rows = found["by_depth"]
    assert found["tokens"] == sum(row[1] for row in rows) == 4 * 83
    assert found["loss"] == pytest.approx(sum(row[1] * row[2] for row in rows) / (4 * 83))


def test_every_piece_has_its_own_draw_of_markers_at_the_trained_density(workdir):
    run = run_on(workdir / "data/u", position="rope")
    texts, _ = cut(run, workdir / "data/u", 64, "trained")
    plain, _ = cut(run, workdir / "data/u", 64, "none")
    is_meta = [text == run.tokenizer.meta for text in texts]
    assert all((text[~here] == bare).all() for text, here, bare in zip(texts, is_meta, plain, strict=True))
    assert all((here.reshape(2, 32).sum(axis=1) == 4).all() for here in is_meta[:-1])
    assert len({here.tobytes() for here in is_meta}) == len(texts) > 20


@pytest.mark.parametrize(("second", "differ"), [("random", True), ("causal", False)])
def test_every_piece_has_its_own_draw_of_random_positions(workdir, second, differ):
    run = run_on(workdir / "data/n", second_attention=second, position="rope")
    (text, *_), _ = cut(run, workdir / "data/n", 56, "none")
    (_, _, mean, low, high), *_ = measure_perplexity(run, [text, text], 56, 28, 56, np.array([3, 8]))["by_depth"]
    assert (low == pytest.approx(mean, abs=1e-6)) is not differ and low + high == pytest.approx(2 * mean)


@pytest.fixture(scope="module")
def runs(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    return {
        "meta": saved(run_on(workdir / "data/u", position="rope"), folder / "meta"),
        "plain": saved(run_on(workdir / "data/n", second_attention="none", position="rope"), folder / "plain"),
    }


def test_all_lengths_conditions_scalings_and_arms_score_the_same_text(runs, capsys):
    for name, *more in (("meta", "32", "128"), ("meta", "128", "--rope_scaling=yarn", "--rope_factor=4"),
                        ("plain", "28", "112")):  # fmt: skip
        evaluation.main(["perplexity", f"--run={runs[name]}", "--documents", "--lengths", *more])
    meta, plain = (list(map(json.loads, (runs[name] / "perplexity.jsonl").read_text().splitlines())) for name in runs)
    assert [(line["length"], line["markers"], line["scaling"]) for line in meta] == [
        (length, markers, scaling)
        for length, scaling in ((32, "none"), (128, "none"), (128, "yarn 4x"))
        for markers in ("trained",) * 3 + ("none",)
    ]
    assert {line["trained_scaling"] for line in meta} == {"none"} and {
        line["original_block_size"] for line in meta
    } == {32}
    lines = meta + plain
    for same in ("tokens", "bytes", "pieces", "documents", "content_sha256"):
        assert len({line[same] for line in lines}) == 1, same
    assert len({line["loss"] for line in lines}) == len(lines)
    first = lines[0]
    assert first["pieces"] > first["documents"] > 1 and first["tokens"] == 111 * first["pieces"]
    assert first["endoftext_loss"] is None
    assert {line["original_content"] for line in lines} == {28}
    for line in lines:
        assert [row[:2] for row in line["by_depth"]] == [[0, 64 * first["pieces"]], [64, 47 * first["pieces"]]]
        assert all(low < mean < high for _, _, mean, low, high in line["by_depth"])
        assert line["document_pieces"] == first["document_pieces"] and sum(line["document_pieces"]) == line["pieces"]
        assert np.shape(line["document_nats"]) == (line["documents"], 2)
    cut_into = f"{first['pieces']} pieces of {first['documents']} documents"
    assert capsys.readouterr().out.count(f"{first['tokens']:,} content tokens of {first['dataset']}, {cut_into}") == 2


@pytest.mark.parametrize(
    ("run", "given", "sentence"),
    [
        ("meta", {"stride": 16}, "stride=16 has no effect with --documents"),
        ("meta", {"markers": ("none", "stored")}, "markers=stored cannot be combined with --documents"),
        ("meta", {"markers": ("none_wide",)}, "markers=none_wide cannot be combined with --documents"),
        ("meta", {"lengths": (16, 40)}, "lengths=40 is not a whole number of the run's chunks of 32 positions"),
        ("meta", {"lengths": (64 * 32,)}, "prepare other text with --min_document_tokens=1792"),
        ("plain", {"lengths": (2000,)}, "prepare other text with --min_document_tokens=2000"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(runs, tmp_path, run, given, sentence):
    with pytest.raises(UserError) as error:
        cfg = PerplexityEval(run=str(runs[run]), output=str(tmp_path / "lines"), documents=True, **given)
        perplexity.main(cfg)
    assert sentence in str(error.value) and not (tmp_path / "lines").exists()


def test_the_refusal_names_the_longest_document_whose_length_is_accepted(workdir, runs, tmp_path):
    folder = workdir / "data/n"
    run = run_on(folder, second_attention="none", position="rope")
    content = read_split(run, folder, None)
    longest = max(len(document) for document in np.split(content, np.flatnonzero(content == run.tokenizer.eot) + 1))
    cfg = {"run": str(runs["plain"]), "output": str(tmp_path / "lines"), "documents": True}
    with pytest.raises(UserError, match=f"the longest has {longest:,}: "):
        perplexity.main(PerplexityEval(**cfg, lengths=(longest + 1,)))
    perplexity.main(PerplexityEval(**cfg, lengths=(longest,), bucket=10**4))
    (line,) = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert (line["pieces"], line["documents"], line["tokens"]) == (1, 1, longest - 1)
    assert line["by_depth"] == [[0, longest - 1, pytest.approx(line["loss"]), None, None]]
    assert math.isfinite(line["loss"])
