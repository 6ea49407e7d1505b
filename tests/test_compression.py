"""Tests eval.py compression: its figures against training's evaluation, a mask, and slow definitions."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
import torch

from nanometa.config import MarkerConfig
from nanometa.data.loader import Windows
from nanometa.evals.compression import METHODS, CompressionEval, bits, kept, open_windows
from nanometa.evals.forgotten import continuation, recall, rouge_l, token_f1
from nanometa.inference.generation import MarkerPlan
from nanometa.training.checkpoint import load_run
from nanometa.training.evaluation import evaluate
from tests.conftest import cli, refusal
from tests.test_limited_cache import masked_logits
from tests.test_perplexity import ALONE
from tests.test_sentinels import settings
from tests.training_runs import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clcr(workdir):
    run(workdir, "clcr", "--max_steps=4", *settings("clcr"))
    return load_run(str(workdir / "out/clcr"), CPU)


def opened(run, workdir, method: str, ratio: float | None) -> Windows:
    return open_windows(CompressionEval(sinks=2), run, workdir / "data/n", method, ratio)


def test_the_loss_is_that_of_training_on_the_same_windows(clcr, workdir):
    """Read with its own mixture of ratios, and as plain text; all methods score the same bytes."""
    cfg = dataclasses.replace(clcr.config, micro_batch_size=5, dtype="float32")
    mixed = dataclasses.replace(cfg, markers=clcr.config.markers)
    plain = Windows(workdir / "data/n", "val", 28, "skip")
    expected = evaluate(clcr.model, plain, mixed, ALONE, None)
    found = bits(clcr, opened(clcr, workdir, "full", None), None)
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert (found["realised"], found["cache"]) == (0, 1)
    for method, ratio in (("trained", 0.5), ("drop", 0.5), ("local", 0.5), ("scattered", 0.25), ("window", 0.25)):
        data = opened(clcr, workdir, method, ratio)
        figures = bits(clcr, data, None)
        assert figures["bits_per_byte"] == pytest.approx(evaluate(clcr.model, data, cfg, ALONE)["bits_per_byte"], 1e-6)
        assert figures["bytes"] == found["bytes"] and figures["bits_per_byte"] != found["bits_per_byte"]
        low, high = figures["interval"]
        assert low < figures["bits_per_byte"] < high


CELLS = [*itertools.product(("trained", "drop", "local", "scattered"), (0.25, 0.7)), ("window", 0.5), ("full", None)]


@pytest.mark.parametrize(("method", "ratio"), CELLS)
def test_the_cache_is_what_the_mask_lets_later_positions_read(clcr, workdir, method, ratio):
    data = opened(clcr, workdir, method, ratio)
    for window in (0, 3):
        found = kept(data, window)
        batch = data.batch(np.array([window]))
        T = int((batch.tokens[0] != data.tokenizer.eot).nonzero()[-1]) + 1 if data.scheme.marks else 28
        until = batch.read_until[0][:T] if data.hides.after else torch.full((T,), T)
        held = [int((until[: place + 1] > place).sum()) for place in range(T)]
        content = [place for place in range(T) if batch.tokens[0][place] < data.tokenizer.n_content]
        after = [*(place - 1 for place in content[1:]), T - 1]  # the last place before the next content token
        assert found.tolist() == [held[place] for place in after]
    if method == "trained":
        assert 1 - kept(data, 5)[-1] / 28 == round(ratio * 28) / 28


def test_forgotten_words_have_no_influence(clcr, workdir, monkeypatch):
    """Without a summary, other words in the forgotten span change no prediction of its repetition's first word."""
    from nanometa.evals import forgotten

    texts, original = [], forgotten._recall_text

    def swapped(data, number, size):
        ids = original(data, number, size)
        if texts:
            ids[3 : 3 + size] = (ids[3 : 3 + size] + 1) % 250
        return ids

    monkeypatch.setattr(forgotten, "_recall_text", swapped)
    for method, same in (("drop", True), ("full", False), ("trained", False)):
        scores = []
        score = forgotten.score_batch
        monkeypatch.setattr(forgotten, "score_batch", lambda *args, s=scores, of=score: s.append(of(*args)) or s[-1])
        texts.clear()
        recall(clcr, opened(clcr, workdir, method, 0.5 if method != "full" else None), 4, 6)
        texts.append(True)
        recall(clcr, opened(clcr, workdir, method, 0.5 if method != "full" else None), 4, 6)
        monkeypatch.setattr(forgotten, "score_batch", score)
        first, second = (torch.cat([one.nats for one in part]) for part in (scores[:1], scores[1:]))
        assert torch.allclose(first, second, atol=1e-5) == same, method


def test_overlaps_of_texts_are_those_of_slow_definitions():
    def longest(a, b):
        if not a or not b:
            return 0
        return 1 + longest(a[1:], b[1:]) if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))

    draws = random.Random(1)
    for _ in range(40):
        a, b = ([draws.randrange(4) for _ in range(draws.randrange(8))] for _ in range(2))
        common = sum(min(a.count(x), b.count(x)) for x in set(a))
        assert token_f1(a, b) == (2 * common / (len(a) + len(b)) if a or b else 1)
        assert rouge_l(a, b) == (2 * longest(a, b) / (len(a) + len(b)) if a or b else 1)


def test_the_command_measures_every_method_and_writes_lines(clcr, workdir):
    args = ("--methods", *(name for name in METHODS if name != "segment"), "--ratios", "0.25", "0.5", "--windows=6",
            "--measure", "bits", "recall", "continuation", "--n=4", "--spans", "2", "3", "--new_tokens=5")  # fmt: skip
    result = cli("eval.py", "compression", "--run=out/clcr", *args, "--output=lines.jsonl", cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    lines = [json.loads(line) for line in (workdir / "lines.jsonl").read_text().splitlines()]
    cells = {(line["measure"], line["method"], line["ratio"], line.get("size")) for line in lines}
    assert len(cells) == len(lines) and ("bits", "full", None, None) in cells
    assert {("bits", name, 0.5, None) for name in METHODS if name not in ("segment", "full")} < cells
    assert ("recall", "trained", None, 3) in cells and ("recall", "local", 0.25, 2) in cells
    full = next(line for line in lines if (line["measure"], line["method"]) == ("continuation", "full"))
    assert full["agreement"] == full["f1_full"] == full["rouge_full"] == 1


@pytest.mark.parametrize("method", ["trained", "full", "local"])
def test_the_loss_of_the_true_continuation_is_that_of_one_token_after_the_other(clcr, workdir, method):
    data, n = opened(clcr, workdir, method, 0.5 if method != "full" else None), 3
    found = continuation(clcr, data, n=2, new_tokens=n)
    expected, first = {"loss_text": [], "loss_text_of_full": []}, data.content_per_window // 2
    for window in data.sample(2).tolist():
        ids = data.stream.read(window * data.step, (window + 1) * data.step)
        for name, cfg in (("loss_text", data.scheme.cfg), ("loss_text_of_full", MarkerConfig())):
            plan = MarkerPlan("none", 28, 0, data.scheme.key + window, cfg)
            for last in range(first, first + n):
                text = [clcr.tokenizer.eot, *ids[:last].tolist()]
                logits = masked_logits(clcr, text, plan, 0)
                expected[name].append(-torch.log_softmax(logits.double(), -1)[ids[last]].item())
    for name, losses in expected.items():
        assert found[name] == pytest.approx(np.mean(losses), rel=1e-5)
    assert (found["loss_text"] == found["loss_text_of_full"]) == (method == "full")


def test_a_continuation_must_fit_into_the_window(clcr, workdir):
    args = ("--run=out/clcr", "--measure", "continuation", "--new_tokens=14", "--output=long.jsonl")
    assert "use at most 13" in refusal(cli("eval.py", "compression", *args, cwd=workdir))
    assert not (workdir / "long.jsonl").exists()


def test_a_run_with_a_sliding_window_is_read_with_its_own_window(workdir):
    """The window of training counts, not one that a ratio of compression would give."""
    run(workdir, "window", "--max_steps=1", *settings("window"))
    args = ("--run=out/window", "--methods", "trained", "window", "--ratios", "0.25", "--windows=4")
    result = cli("eval.py", "compression", *args, "--output=window.jsonl", cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    trained, other = map(json.loads, (workdir / "window.jsonl").read_text().splitlines())
    assert (trained["ratio"], other["ratio"]) == (None, 0.25)
    assert trained["realised"] == pytest.approx(1 - (13 + 4) / 28)  # 14 positions, less one for the next, and 4 sinks
    cfg, loaded = CompressionEval(), load_run(str(workdir / "out/window"), CPU)
    assert open_windows(cfg, loaded, workdir / "data/n", "trained", None).scheme.cfg == loaded.config.markers


def test_a_run_with_stored_markers_is_read_with_its_text_forgotten(workdir):
    run(workdir, "stored", "--max_steps=2", "--dataset=data/u", "--block_size=32")
    assert "the data of out/stored" in refusal(
        cli("eval.py", "compression", "--run=out/stored", "--methods", "drop", "--ratios", "0.5", cwd=workdir)
    )
    result = cli("eval.py", "compression", "--run=out/stored", "--methods", "full", "segment", "--windows=8",
                 "--output=stored.jsonl", cwd=workdir)  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    full, segment = map(json.loads, (workdir / "stored.jsonl").read_text().splitlines())
    assert full["bytes"] == segment["bytes"] and segment["cache"] < full["cache"] == pytest.approx(32 / 28, abs=0.1)
    assert MarkerConfig(evict="segment").label == "evict"
