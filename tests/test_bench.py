"""Tests that bench.py measures what it claims to measure, but not how fast it is."""

import ctypes
import math
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from nanometa.benches import decoding, eviction, weighting
from nanometa.benches.timing import Contestant, alternate, contest, quartiles
from nanometa.benches.training import KEPT, DenseMeta, Step, ratios, training_step
from nanometa.common.errors import UserError
from nanometa.config import GPTConfig
from nanometa.data.markers import Row
from nanometa.meta_attention import MetaAttention
from nanometa.reports import bench_picture
from tests.conftest import ROOT
from tests.fast_cases import every

SMALL = (1, 2, 32, 40, 2)


@pytest.mark.parametrize("arm", ["none", "meta", "dense", "hf"])
def test_every_benchmarked_arm_lowers_its_loss(arm):
    markers = 4 if arm in ("meta", "dense") else 0
    step = training_step(Step(arm, "fp32", False, SMALL, markers, vocabulary=(128, 100), device="cpu"))
    losses = [step().item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5
    # at first, predictions are nearly uniform over the ids that this model can predict
    assert abs(losses[0] - math.log(128 if arm == "hf" else 100)) < 0.3


def test_the_dense_layer_equals_meta_attention():
    torch.manual_seed(0)
    gathered, dense = (kind(32, 2, bias=False, dropout=0.0) for kind in (MetaAttention, DenseMeta))
    dense.load_state_dict(gathered.state_dict())
    x, index, norm = torch.randn(2, 12, 32), torch.tensor([[0, 3, 11], [2, 5, 7]]), torch.nn.LayerNorm(32)
    torch.testing.assert_close(dense(x, index, norm), gathered(x, index, norm))


def test_ratios_name_only_the_implementations_that_took_part():
    rows = [
        {"shape": "tiny", "dtype": "fp32", "mode": "eager", "who": who, "positions/s": rate, "content/s": 0.9 * rate}
        | {"peak GB": memory}
        for who, rate, memory in (("none", 10.0, 1.0), ("meta", 9.0, 1.0), (KEPT, 4.0, 2.0))
    ]
    with_meta = "meta / none 0.900 in positions/s, 0.900 in content tokens/s; "
    with_peer = "none / nanogpt, memory kept 2.500, memory 0.50"
    assert ratios(rows) == [f"tiny fp32 eager: {with_meta}{with_peer}"]
    assert ratios(rows[::2]) == [f"tiny fp32 eager: {with_peer}"]
    assert ratios(rows[:1]) == []


def test_functions_take_turns_and_quartiles_are_in_order():
    called = []
    times = alternate({name: lambda name=name: called.append(name) for name in "ab"}, 3)
    assert "".join(called) == "ab" * 5 and [len(times[name]) for name in "ab"] == [3, 3]
    assert quartiles([3.0, 1.0, 2.0, 4.0]) == (1.25, 2.5, 3.75) and quartiles([2.0, 4.0]) == (2.0, 3.0, 4.0)


def _holding(megabytes: int):
    kept = []
    return lambda: kept.append(torch.ones(megabytes * 250_000)) if not kept else None


def test_peak_memory_is_that_of_a_contestants_own_process():
    ours = torch.ones(100_000_000)  # 400 MB of this process, which must not count
    _, peaks = contest({size: Contestant(_holding, size) for size in (1, 300)}, repeats=1)
    assert 250e6 < peaks[300] - peaks[1] < 350e6 and len(ours)


def _breaking():
    def fail(message="nothing"):
        raise ValueError(message)

    return fail


@pytest.mark.slow
def test_a_failing_contestant_ends_the_contest_with_its_message():
    for maker, message in (((_breaking,), "ValueError: nothing"), ((_holding, "x"), "TypeError")):
        contestants = {"fails": Contestant(*maker)}
        with pytest.raises(RuntimeError, match=message):
            contest(contestants, repeats=1)
        assert not contestants["fails"].process.is_alive()


def _faults(keep_freed: bool) -> int:
    contestant = Contestant(_counted_faults, keep_freed=keep_freed)
    try:
        for _ in range(3):
            contestant()
        with pytest.raises(RuntimeError) as told:
            contestant("report")
        return int(str(told.value).split()[-1])
    finally:
        contestant.close()


def _counted_faults():
    counts = []

    def call(report=""):
        if report:
            raise ValueError(counts[-1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(25_000_000)  # 100 MB, above glibc's default threshold
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    return call


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="only glibc has this setting")
def test_freed_memory_is_kept():
    """Without the setting, each tensor of 100 MB costs a page fault for every 4 kB (or 2 MB) of it."""
    assert _faults(keep_freed=True) < 100 < _faults(keep_freed=False)


def test_every_command_keeps_freed_memory():
    code = (
        "import sys; from nanometa.config import command_line as c; c.keep_freed_memory = lambda: print('kept'); "
        "c.run_cli(lambda argv: print('ran'))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["kept", "ran"]


def test_the_bench_picture_is_drawn(tmp_path):
    rows = [
        {"shape": "tiny", "dtype": "fp32", "mode": "eager", "who": who, "positions/s": rate, "peak GB": 1.0}
        for who, rate in (("none", 10.0), ("meta", 9.0))
    ]
    decoding = [
        {"batch": 8, "dtype": "bf16", "who": who, "content tokens/s": rate}
        for who, rate in (("none", 30.0), ("hf", 10.0), ("nanogpt", 1.0))
    ]
    lines = [
        {"T": T, "who": "meta", "markers": 0.1, "s a step": T / 99, "peak GB": 1.0, "s at the matmul peak": T / 999}
        for T in (256, 512)
    ]
    assert bench_picture.draw({"training": rows, "lengths": lines}, tmp_path) == [tmp_path / "details.png"]
    rows.append({**rows[0], "who": "nanogpt", "positions/s": 4.0})
    results = {"training": rows, "decoding": decoding}
    assert bench_picture.speedups(results) == [
        ("training, tiny, fp32, eager", "nanogpt", 2.5),
        ("decoding, batch 8, bf16", "hf", 3.0),
    ]
    for picture in bench_picture.draw(results, tmp_path):
        assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("method", every(3, [*eviction.METHODS, "plain"]))
def test_a_filled_cache_is_that_of_a_decoder_that_has_read_the_text(method):
    """The benchmark of eviction fills caches instead of reading long texts."""
    case = eviction.Case(method, 0.5 if method != "plain" else 0.0, 90, 2, "fp32", layers=1)
    ids = np.random.default_rng(0).integers(0, 50256, case.content)
    filled, scheme = eviction.open_decoder(case)
    eviction.fill(filled, scheme, ids)
    read, _ = eviction.open_decoder(case)
    rows = [Row(*map(int, values)) for values in zip(*scheme.lay_out(ids), strict=True)]
    read.read([rows] * 2, [len(rows) - 1] * 2)
    assert filled.places == read.places == [len(rows)] * 2
    if method == "plain":
        assert filled.causal.used == read.causal.used
        return
    for row in range(2):
        assert filled.causal.kept(row) == read.causal.kept(row)
        alive = read.causal.until[row] >= len(rows)
        assert filled.causal.until[row].tolist() == read.causal.until[row][alive].tolist()
        assert filled.causal.position_of[row].tolist() == read.causal.position_of[row][alive].tolist()
    assert eviction.cache_bytes(case) < 0.9 * eviction.cache_bytes(eviction.Case("plain", 0.0, 90, 2, "fp32", 1))


@pytest.mark.parametrize("second", ["none", "meta"])
def test_the_benchmark_of_decoding_writes_as_many_tokens_as_it_counts(second):
    cfg = GPTConfig(n_layer=1, vocab_size=50304, content_vocab_size=50257, second_attention=second)
    write = decoding.ours(second, cfg, 2, torch.float32, False, torch.device("cpu"))
    write(12)  # has an assertion of its own
    with pytest.raises(UserError, match="max_new_tokens=0"):
        write(0)


@pytest.mark.parametrize("scorer", ["stored", "self"])
def test_the_steps_of_a_weighted_loss_have_its_weights(scorer):
    plain = Step("meta", "fp32", False, SMALL, 4, vocabulary=(128, 100), device="cpu")
    losses = [[step().item() for _ in range(3)] for step in map(training_step, (plain, plain.scored_by(scorer)))]
    assert losses[1] == sorted(losses[1], reverse=True) and losses[0] != losses[1]
    # the model is the same, and its weights are 1 on average
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.05)


def test_the_cost_of_a_weighted_loss_is_compared_with_the_usual_one():
    rows = [{"shape": "tiny", "dtype": "fp32", "arm": "none", "scorer": scorer, "s a step": seconds}
            for scorer, seconds in (("none", 1.0), ("stored", 1.1), ("self", 1.4))]  # fmt: skip
    assert weighting.ratios(rows) == [
        "tiny fp32 none: the scorer stored adds +10 % to a step",
        "tiny fp32 none: the scorer self adds +40 % to a step",
    ]
