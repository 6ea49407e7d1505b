"""Tests that bench.py measures what it claims to measure, but not how fast it is."""

import math

import pytest
import torch

from nanometa.benches.timing import alternate, in_fresh_process, quartiles
from nanometa.benches.training import DenseMeta, Step, training_step
from nanometa.meta_attention import MetaAttention
from nanometa.reports import bench_picture

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


def test_functions_take_turns_and_quartiles_are_in_order():
    called = []
    times = alternate({name: lambda name=name: called.append(name) for name in "ab"}, 3)
    assert "".join(called) == "ab" * 5 and [len(times[name]) for name in "ab"] == [3, 3]
    assert quartiles([3.0, 1.0, 2.0, 4.0]) == (1.25, 2.5, 3.75) and quartiles([2.0, 4.0]) == (2.0, 3.0, 4.0)


def _holding(megabytes: int):
    kept = []
    return lambda: kept.append(torch.ones(megabytes * 250_000)) if not kept else None


def test_peak_memory_is_measured_in_a_fresh_process():
    ours = torch.ones(100_000_000)  # 400 MB of this process, which must not count
    small, large = (in_fresh_process(_holding, size, repeats=1)[1] for size in (1, 300))
    assert 250e6 < large - small < 350e6 and len(ours)


def test_the_bench_picture_is_drawn(tmp_path):
    rows = [
        {"shape": "tiny", "dtype": "fp32", "mode": "eager", "who": who, "positions/s": rate, "peak GB": 1.0}
        for who, rate in (("none", 10.0), ("meta", 9.0))
    ]
    lines = [
        {"T": T, "who": "meta", "markers": 0.1, "s a step": T / 99, "peak GB": 1.0, "s at the matmul peak": T / 999}
        for T in (256, 512)
    ]
    bench_picture.draw({"training": rows, "lengths": lines}, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000
