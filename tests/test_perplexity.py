import json
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa import eval as evaluation
from nanometa.common.errors import UserError
from nanometa.common.statistics import clustered_ratio
from nanometa.data.inject import inject, marker_places, strip
from nanometa.data.layout import IGNORE, Draw
from nanometa.data.loader import Windows
from nanometa.data.shards import HEADER
from nanometa.evals import perplexity
from nanometa.evals.blocks import DISTANCES, BlockSums, intervals
from nanometa.evals.common import read_split
from nanometa.evals.perplexity import PerplexityEval, marked, measure_perplexity, streams, window, windows
from nanometa.train import evaluate
from nanometa.training.distributed import Dist
from tests.reference import perplexity as reference
from tests.reference.targets import stream_targets
from tests.runs import run_on, saved

ALONE = Dist(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("data", "second", "rule"),
    [("u", "meta", "ignore"), ("u", "meta", "skip"), ("p", "causal", "ignore"), ("n", "random", "ignore")],
)
def test_perplexity_in_training_windows_equals_evaluation_in_training(workdir, data, second, rule):
    folder = workdir / "data" / data
    run = run_on(folder, second_attention=second, rule=rule)
    length, cfg = run.config.model.block_size, run.config
    draw = Draw(cfg.model.random_fraction, cfg.seed, "val") if second == "random" else None
    expected = evaluate(run.model, Windows(folder, "val", length, rule, draw), cfg, ALONE)
    run.model.eval()
    found = measure_perplexity(run, [read_split(run, folder, None)], length, length, 64)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["perplexity"] == math.exp(found["loss"])


@st.composite
def marked_streams(draw):
    """Draws a stream whose content ids all differ, so that a target identifies its token; 999 is the marker."""
    C, M, n = draw(st.integers(1, 12)), draw(st.integers(0, 5)), draw(st.integers(1, 6))
    places = marker_places("uniform" if M else "none", 0, n, C, M, draw(st.integers(0, 99)))
    tokens = inject(np.arange(n * C).reshape(n, C), places, 999).reshape(-1)
    length = draw(st.integers(1, len(tokens) + 3))
    return tokens, length, draw(st.integers(1, length)), draw(st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(marked_streams(), st.sampled_from(["ignore", "skip"]))
def test_every_content_token_is_scored_once_with_enough_context(case, rule):
    tokens, length, stride, size = case
    if (tokens != 999).sum() < 2:
        return
    expected, scored, seen = stream_targets(tokens.tolist(), 999, rule), [], 0
    for numbers, layouts, targets in windows(tokens, length, stride, rule, 999, size):
        ids = np.stack([layout.tokens for layout in layouts])
        assert ids.shape == targets.shape == (len(numbers), length) and len(numbers) <= size
        for number, row, goals in zip(numbers, ids, targets, strict=True):
            assert number == seen
            seen += 1
            here = tokens[number * stride : number * stride + length]
            assert (row[: len(here)] == here).all()
            for at in np.flatnonzero(goals != IGNORE):
                assert goals[at] == expected[number * stride + at]
                assert number == 0 or at >= length - stride
            scored += goals[goals != IGNORE].tolist()
    assert sorted(scored) == list(range(1, int((tokens != 999).sum())))


def double(run):
    return types.SimpleNamespace(**{**vars(run), "model": run.model.double()})


def compare_with_reference(run, tokens, length, stride):
    found = measure_perplexity(run, [tokens], length, stride, bucket=1)
    slow = reference.token_nats(run, tokens.tolist(), length, stride)
    assert found["tokens"] == len(slow)
    assert found["loss"] == pytest.approx(np.mean([nats for *_, nats in slow]), abs=1e-4)
    expected = [[place, *_count_and_mean([nats for _, at, nats in slow if at == place])] for place in range(length)]
    expected = [row for row in expected if row[1]]
    assert [row[:2] for row in found["by_position"]] == [row[:2] for row in expected]
    assert [row[2] for row in found["by_position"]] == pytest.approx([row[2] for row in expected], abs=1e-3)
    by_bin: dict = {}
    for source, at, nats in slow:
        by_bin.setdefault(first_distance(tokens.tolist(), source, at, run.tokenizer.meta), []).append(nats)
    assert [row[0] for row in found["by_distance"]] == [first for first in (*DISTANCES, None) if first in by_bin]
    for first, count, mean, *_ in found["by_distance"]:
        assert (count, mean) == (len(by_bin[first]), pytest.approx(np.mean(by_bin[first]), abs=1e-3))


def first_distance(stream: list[int], source: int, at: int, meta: int) -> int | None:
    """Returns the first distance of the bin of a predicting token at `source`, which is at position `at` of its
    window, by walking back to the last marker of the window. None if there is none."""
    distance = 0
    while stream[source - distance] != meta:
        distance += 1
        if distance > at:
            return None
    return max(first for first in (0, 1, 2, 3, 5, 9, 17, 33) if first <= distance)


def _count_and_mean(values):
    return len(values), sum(values) / max(1, len(values))


@pytest.mark.parametrize("rule", ["ignore", "skip"])
@pytest.mark.parametrize(("position", "length", "stride"), [("learned", 24, 7), ("rope", 40, 40), ("rope", 40, 9)])
def test_the_loss_equals_scoring_every_token_separately(workdir, rule, position, length, stride):
    """The trained window has 32 positions. With rotary positions, this also holds in longer windows."""
    run = double(run_on(workdir / "data/u", rule=rule, position=position))
    compare_with_reference(run, read_split(run, workdir / "data/u", None)[:110], length, stride)


def test_the_comparison_notices_a_model_that_sees_its_targets(workdir):
    run = double(run_on(workdir / "data/u"))
    tokens, honest = read_split(run, workdir / "data/u", None)[:90], run.model.forward

    def peeking(ids, positions, meta_index, *limits):
        return honest(ids, positions, meta_index, *limits) + 5 * run.model.wte(ids.roll(-1, dims=1))

    compare_with_reference(run, tokens, 32, 16)
    run.model.forward = peeking
    with pytest.raises(AssertionError):
        compare_with_reference(run, tokens, 32, 16)


@pytest.mark.parametrize("bucket", [1, 7, 64])
def test_the_loss_by_position_adds_up_to_the_loss(workdir, bucket):
    run = run_on(workdir / "data/u")
    found = measure_perplexity(run, [read_split(run, workdir / "data/u", 600)], 32, 10, bucket)
    firsts, counts, means = zip(*found["by_position"], strict=True)
    assert all(first % bucket == 0 and first < 32 for first in firsts) and sum(counts) == found["tokens"] == 600
    assert np.dot(counts, means) / 600 == pytest.approx(found["loss"], rel=1e-9)


def test_sums_by_block_add_up_and_give_the_intervals(workdir):
    run = run_on(workdir / "data/u")
    found = measure_perplexity(run, [read_split(run, workdir / "data/u", 900)], 32, 32, 8, blocks=5)
    for name in ("distance", "position"):
        nats, tokens = (np.array(found[f"block_{name}"][of]) for of in ("nats", "tokens"))
        assert nats.shape == tokens.shape == (5, 4 if name == "position" else 9) and tokens.sum() == 900
        assert nats.sum() / 900 == pytest.approx(found["loss"], abs=1e-5)
        rows = [(*row, *ends) for row, ends in zip(found["by_position"], found["by_position_interval"], strict=True)]
        rows = found["by_distance"] if name == "distance" else rows
        for (_, count, mean, low, high), part, n in zip(
            rows, nats.T[tokens.any(0)], tokens.T[tokens.any(0)], strict=True
        ):
            assert count == n.sum() and mean == pytest.approx(part.sum() / count, abs=1e-4)
            if (n > 0).sum() > 1:
                assert (low, high) == pytest.approx(clustered_ratio(part[n > 0], n[n > 0]), abs=1e-3)
                assert low < mean < high
    windows_of = -(-len(read_split(run, workdir / "data/u", 900)) // 32)
    sizes = np.array(found["block_position"]["tokens"]).sum(1)
    assert sizes.max() - sizes.min() <= 2 * 28 and 5 < windows_of  # blocks of nearly equal size


def test_fewer_windows_than_blocks_have_no_interval_over_one():
    few = measure_sums([3.0], [2])
    assert few == [[2, 1.5, None, None]]
    assert measure_sums([3.0, 1.0, 0.0], [2, 2, 0])[0][:2] == [4, 1.0]  # a block without tokens does not count
    assert measure_sums([0.0, 0.0], [0, 0]) == [[0, None, None, None]]


def measure_sums(nats: list[float], tokens: list[int]) -> list[list]:
    return intervals(np.array(nats)[:, None], np.array(tokens)[:, None])


def test_blocks_are_consecutive_windows_or_documents():
    sums = BlockSums(2)
    for start in (0, 3):  # 6 windows in two batches, with one token each in bin 1
        sums.add(np.arange(3), np.ones(3, dtype=int), np.arange(start, start + 3, dtype=float), 3)
    nats, tokens = sums.blocks(4)
    assert (
        nats[:, 1].tolist() == [0 + 1, 2, 3 + 4, 5] and tokens[:, 1].tolist() == [2, 1, 2, 1] and not nats[:, 0].any()
    )
    nats, tokens = sums.blocks(4, owners=np.array([7, 7, 9, 9, 9, 12]))
    assert nats[:, 1].tolist() == [1, 2 + 3 + 4, 5] and tokens[:, 1].tolist() == [2, 3, 1]
    assert sums.blocks(99)[0].shape == (6, 2)


def test_all_conditions_read_the_same_content(workdir):
    run = run_on(workdir / "data/u")
    stored, meta = read_split(run, workdir / "data/u", 700), run.tokenizer.meta
    content = strip(stored, meta)
    assert len(content) == 701 and (content == strip(read_split(run, workdir / "data/u", None), meta)[:701]).all()
    drawn = {}
    for markers, count in (
        ("trained", 3),
        ("uniform", 3),
        ("periodic", 1),
        ("none", 1),
        ("none_wide", 1),
        ("stored", 1),
    ):
        drawn[markers] = [tokens for _, tokens in streams(run, stored, content, markers, draws=3)]
        assert len(drawn[markers]) == count
        for tokens in drawn[markers]:
            assert (strip(tokens, meta) == content).all() and tokens[-1] != meta
            whole = (tokens[: len(tokens) // 32 * 32].reshape(-1, 32) == meta).sum(axis=1)
            assert (whole == (0 if markers.startswith("none") else 4)).all()
    assert (drawn["stored"][0] == stored).all()
    places = [tuple(np.flatnonzero(tokens == meta)) for tokens in [*drawn["trained"], stored]]
    assert len(set(places)) == 4
    rule = run.state["data"]
    assert window(rule, "none", 64, 32) == (56, 28) and window(rule, "none_wide", 64, 32) == (64, 32)
    assert window(rule, "trained", 64, 32) == (64, 32)


def test_markers_are_placed_as_in_prepared_data(workdir):
    run = run_on(workdir / "data/p")
    stored = read_split(run, workdir / "data/p", None)
    again = marked(strip(stored, run.tokenizer.meta), "periodic", 28, 4, 0, run.tokenizer.meta)
    assert (again == stored[: len(again)]).all() and (stored[len(again) :] == run.tokenizer.meta).all()


def test_context_is_the_mean_number_of_content_tokens_before_a_scored_one(workdir):
    run = run_on(workdir / "data/n", second_attention="none")
    tokens = read_split(run, workdir / "data/n", 200)
    assert measure_perplexity(run, [tokens], 20, 1, 64)["context"] == pytest.approx(
        (sum(range(1, 21)) + 180 * 20) / 200
    )
    assert measure_perplexity(run, [tokens], 20, 20, 64)["context"] == pytest.approx(10.5)


@pytest.fixture(scope="module")
def runs(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    return {
        "meta": saved(run_on(workdir / "data/u", position="rope"), folder / "meta"),
        "plain": saved(run_on(workdir / "data/n", second_attention="none"), folder / "plain"),
    }


def test_the_command_writes_a_line_per_length_condition_and_draw(workdir, runs, capsys):
    for name, lengths in (("meta", ("32", "64")), ("plain", ("28", "64"))):
        evaluation.main(["perplexity", f"--run={runs[name]}", "--lengths", *lengths, "--max_tokens=500"])
    lines = [json.loads(line) for line in (runs["meta"] / "perplexity.jsonl").read_text().splitlines()]
    said = [(line["length"], line["markers"], line["draw"]) for line in lines]
    assert said == [
        (T, *rest) for T in (32, 64) for rest in [("trained", 0), ("trained", 1), ("trained", 2), ("none", 0)]
    ]
    assert {line["tokens"] for line in lines} == {500} and len({line["bytes"] for line in lines}) == 1
    assert len({line["loss"] for line in lines}) == len(lines)
    assert all(line["run"] == "small" and line["weights_sha256"] and line["split"] == "val" for line in lines)
    assert len({line["content_sha256"] for line in lines}) == 1
    assert [line["window"] for line in lines if line["markers"] == "none"] == [28, 56]
    trained, none = (np.mean([line["context"] for line in lines if line["markers"] == m]) for m in ("trained", "none"))
    # about as much content before a scored token with markers as without
    assert trained == pytest.approx(none, rel=0.05)
    plain = [json.loads(line) for line in (runs["plain"] / "perplexity.jsonl").read_text().splitlines()]
    assert [line["markers"] for line in plain] == ["none", "none"] and plain[0]["tokens"] == 500
    assert (
        plain[1]["impossible"].startswith("64 positions do not fit into the learned position table, which has 28 rows")
        and "loss" not in plain[1]
    )
    out = capsys.readouterr().out
    losses = [line["loss"] for line in lines[:3]]
    assert f"loss {np.mean(losses):.4f} ({min(losses):.4f} .. {max(losses):.4f}, sd {np.std(losses, ddof=1):.4f}" in out
    assert "impossible: 64 positions" in out


@pytest.mark.parametrize(
    ("run", "settings", "sentence"),
    [
        ("meta", {"lengths": (4,)}, "lengths=(4,) is out of range"),
        ("meta", {"lengths": (32,), "stride": 33}, "stride=33 would skip text between windows of 32 positions"),
        ("meta", {"stride": 33}, "stride=33 would skip text between windows of 32 positions"),
        ("meta", {"stride": 0}, "stride=0 is out of range"),
        ("meta", {"draws": 2}, "draws=2 is out of range"),
        ("meta", {"max_tokens": 5}, "max_tokens=5 is out of range"),
        ("meta", {"bucket": 0}, "bucket=0 is out of range"),
        ("meta", {"markers": ("stored",), "dataset": "n"}, "n has no markers: use --markers none"),
        ("meta", {"lengths": (512,), "max_tokens": 300}, "512 positions is longer than the 301 content tokens"),
        ("meta", {"dataset": "nowhere"}, "there is no dataset in"),
        (
            "plain",
            {"markers": ("none", "trained")},
            "markers=trained needs a run that was trained on text with markers",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(workdir, runs, tmp_path, run, settings, sentence):
    if "dataset" in settings:
        settings = {**settings, "dataset": str(workdir / "data" / settings["dataset"])}
    with pytest.raises(UserError) as error:
        perplexity.main(PerplexityEval(run=str(runs[run]), output=str(tmp_path / "lines"), **settings))
    assert sentence in str(error.value) and not (tmp_path / "lines").exists()


def test_weights_that_are_not_finite_are_refused(workdir):
    run = run_on(workdir / "data/u")
    with torch.no_grad():
        run.model.ln_f.weight[3] = float("nan")
    with pytest.raises(UserError, match="the loss of .* is not finite, .*: use another checkpoint"):
        measure_perplexity(run, [read_split(run, workdir / "data/u", 100)], 32, 32, 64)


def test_a_loss_whose_perplexity_overflows_is_refused(workdir):
    run = run_on(workdir / "data/u")
    with torch.no_grad():
        run.model.ln_f.weight.mul_(1e6)
    with pytest.raises(UserError, match=r"the loss of .* is .*e\+\d\d nats per token, too large for a perplexity"):
        measure_perplexity(run, [read_split(run, workdir / "data/u", 100)], 32, 32, 64)


def test_another_tokenizer_and_damaged_text_are_refused(workdir, runs, tmp_path):
    run = run_on(workdir / "data/u")
    for change in ("other tokenizer", "other text", "no id"):
        folder = tmp_path / change
        folder.mkdir()
        for path in (workdir / "data/u").iterdir():
            if path.name.startswith((".", "train")):
                continue
            raw = bytearray(path.read_bytes())
            if change == "other tokenizer" and path.name == "manifest.json":
                raw = raw.replace(run.tokenizer.fingerprint.encode(), b"0" * 64)
            if change != "other tokenizer" and path.name == "val_000000.bin":
                at = HEADER.size + 2 * int(np.flatnonzero(read_split(run, workdir / "data/u", None) < 256)[5])
                raw[at : at + 2] = (raw[at] ^ 1, raw[at + 1]) if change == "other text" else (255, 255)
            (folder / path.name).write_bytes(raw)
        cause = (
            r"made with another tokenizer .*: prepare the dataset with --tokenizer="
            if change == "other tokenizer"
            else "do not match its manifest, .*: prepare the dataset again"
        )
        with pytest.raises(UserError, match=cause):
            read_split(run, folder, 300 if change == "no id" else None)  # the sha256 is that of the whole split
