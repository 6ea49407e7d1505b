"""Compares the estimates of --dry_run with the operations, saved tensors and memory of PyTorch."""

import dataclasses
import gc
import itertools
import json
from functools import partial
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nanometa import meta_attention
from nanometa.config import GPTConfig, TrainConfig, WeightConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.data.layout import IGNORE, places_of
from nanometa.layers.loss import Objective, gather_scored
from nanometa.layers.weighting import ShortLengths, WeightedObjective
from nanometa.model import GPT
from nanometa.training import estimate
from nanometa.training.adapters import attach
from nanometa.training.distributed import autocast, pick_dtype
from nanometa.training.optimizer import Optimizer
from tests.fast_cases import diagonal, slow

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NATIVE_BF16 = pytest.mark.skipif(
    pick_dtype("auto", torch.device("cpu"))[0] != torch.bfloat16,
    reason="this CPU emulates bfloat16, which would take minutes",
)
TINY = GPTConfig(n_layer=4, n_head=3, n_embd=192, block_size=512, vocab_size=4160, content_vocab_size=4096)
GPT2 = GPTConfig(vocab_size=50304, content_vocab_size=50257)


def arm(cfg: GPTConfig, second: str, **changes) -> tuple[GPTConfig, int]:
    """Returns the shape with this second attention, and the number of meta-tokens in its window (a tenth of it, or
    none)."""
    M = cfg.block_size // 10 if SECOND_ATTENTIONS[second].markers == "needed" else 0
    return dataclasses.replace(cfg, second_attention=second, block_size=cfg.block_size - (not M) * 51, **changes), M


def random_batch(cfg: GPTConfig, B: int, M: int) -> tuple[torch.Tensor, ...]:
    """Returns tokens, targets, positions (B, T), meta_index (B, M) and scored_index (B, S), as in a Batch."""
    T, meta = cfg.block_size, cfg.content_vocab_size
    tokens = torch.randint(0, meta, (B, T))
    rows = estimate.second_rows(cfg, M) if cfg.second.connects == "random" else M
    index = torch.stack([torch.randperm(T)[:rows].sort().values for _ in range(B)])
    if M:
        tokens.scatter_(1, index, meta)
    targets = torch.where(tokens.roll(-1, 1) == meta, IGNORE, tokens.roll(-1, 1))
    scored = torch.from_numpy(places_of((targets != IGNORE).numpy(), estimate.scored_rows(cfg, M)))
    return tokens, targets, torch.arange(T).expand(B, T).contiguous(), index, scored


def built(cfg: GPTConfig, M: int, train_only: str = "all") -> GPT:
    """Returns a model that trains a part, with factors of rank 4."""
    more = {"lora_r": 4} if train_only == "lora" else {}
    return attach(GPT(cfg), TrainConfig(model=cfg, train_only=train_only, **more), M)


# ----------------------------------------------------------------------------- measurements


def counted_flops(cfg: GPTConfig, B: int, M: int, dtype: torch.dtype, train_only: str = "all", weighted=None) -> int:
    """Counts the FLOPs of a forward and backward pass, with PyTorch's plain attention, because PyTorch counts neither
    those of the CPU's fused kernel nor those of blockwise_attention.

    weighted: function of a model that returns its WeightedObjective; None = the usual loss."""
    objective = (weighted or Objective)(built(cfg, M, train_only))
    beside = {"ties": torch.zeros(B, cfg.block_size, dtype=torch.long)} if weighted else {}
    plain = mock.patch.object(
        meta_attention, "blockwise_attention", partial(scaled_dot_product_attention, is_causal=True)
    )
    with plain, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with autocast(CPU, dtype):
            nats = objective(*random_batch(cfg, B, M), **beside)
        (nats[0] if weighted else nats).backward()
    return counter.get_total_flops()


def saved_bytes(cfg: GPTConfig, B: int, M: int, dtype: torch.dtype, train_only: str = "all") -> tuple[int, int]:
    """Returns the bytes that autograd saves in a forward pass: (activations, casts of weights).

    Parameters and the batch are not counted. Each storage is counted once, and is kept until the end so that no other
    tensor can get its address.
    """
    model = built(cfg, M, train_only)
    batch = random_batch(cfg, B, M)
    shapes = {p.shape for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch)}
    storages: dict[int, tuple] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = (storage, tensor.shape in shapes and tensor.dtype == torch.bfloat16)
        # Nothing runs backward. A saved output that refers to its own node would never be freed.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, dtype):
        tokens, targets, positions, index, scored = batch
        gather_scored(model(tokens, positions, index), targets, scored)
    sizes = [(storage.nbytes(), is_cast) for storage, is_cast in storages.values()]
    return sum(n for n, is_cast in sizes if not is_cast), sum(n for n, is_cast in sizes if is_cast)


def allocated_peak(prepare, tmp_path) -> int:
    """Returns the most that torch's CPU allocator holds during prepare()(), counted from the start of the profiler.

    Every allocation writes the total of the process into the trace. That total still contains memory that an earlier
    profile saw allocated but not freed, so the total at the start is subtracted.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        measured = prepare()
        with torch.profiler.record_function("measured"):
            measured()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    span = next(e for e in events if e.get("name") == "measured" and e.get("ph") == "X")
    totals = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    before = totals[0]["args"]["Total Allocated"] - totals[0]["args"]["Bytes"]
    inside = [e["args"]["Total Allocated"] for e in totals if 0 <= e["ts"] - span["ts"] <= span["dur"]]
    return max(inside) - before


def step_peak(cfg: TrainConfig, M: int, dtype: torch.dtype, accumulation: int, tmp_path) -> int:
    """Returns the peak memory of the second update, in which the optimizer has its state, computed as in train_step."""

    def prepare():
        model = attach(GPT(cfg.model), cfg, M)
        model.recompute = cfg.activation_checkpointing
        objective, optimizer = Objective(model), Optimizer(model, cfg)

        def step():
            for _ in range(accumulation):
                batch = random_batch(cfg.model, cfg.micro_batch_size, M)
                with autocast(CPU, dtype):
                    nats = objective(*batch)
                (nats / 1000).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(1e-4)

        step()
        return step

    return allocated_peak(prepare, tmp_path)


@pytest.mark.parametrize("again", [False, True])
def test_the_allocators_peak_is_measured_correctly(again, tmp_path):
    """80 MB are held and 40 MB of them freed; then 20 and 8 MB are allocated in turn. A second profile must agree."""

    def prepare():
        held = [torch.empty(10_000_000), torch.empty(10_000_000)]

        def measured():
            held.pop()
            for n in (5_000_000, 2_000_000):
                torch.empty(n)

        return measured

    assert allocated_peak(prepare, tmp_path) == pytest.approx(60e6, rel=1e-3)


def compare(what: str, predicted: int, measured: int, unit: float, within: float) -> None:
    print(
        f"\n{what}: predicted {predicted / unit:.4f}, measured {measured / unit:.4f}, {predicted / measured - 1:+.1%}"
    )
    assert predicted == pytest.approx(measured, rel=within), what


# ----------------------------------------------------------------------------- small models


@pytest.mark.parametrize(
    ("second", "n_inner", "dtype"),
    [
        *diagonal([*((name, None) for name in SECOND_ATTENTIONS), ("none", 6 * 192)], ("fp32",)),
        slow(("meta", None, "bf16")),
    ],
)
def test_flops_equal_those_that_pytorch_counts(second, n_inner, dtype):
    cfg, M = arm(TINY, second, n_inner=n_inner)
    assert 2 * estimate.flops_per_window(cfg, M) == counted_flops(cfg, 2, M, DTYPES[dtype])


PARTS = [("lora", "meta"), ("lora", "none"), ("markers", "meta")]


@pytest.mark.parametrize(("train_only", "second"), PARTS)
def test_flops_of_training_a_part_equal_those_that_pytorch_counts(train_only, second):
    """The product of LoRA's factors, which the estimate leaves out, is added here: once for both windows."""
    cfg, M = arm(TINY, second)
    factors = 3 * 2 * 4 * estimate.adapted_matrices(cfg) * (train_only == "lora")
    estimated = 2 * estimate.flops_per_window(cfg, M, train_only) + factors
    assert estimated == counted_flops(cfg, 2, M, torch.float32, train_only)
    assert estimated < 0.85 * 2 * estimate.flops_per_window(cfg, M)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("train_only", "second"), PARTS)
def test_activations_of_training_a_part_equal_those_that_autograd_saves(train_only, second, dtype):
    cfg, M = arm(dataclasses.replace(TINY, n_layer=2, position="rope"), second)
    measured, _ = saved_bytes(cfg, 2, M, DTYPES[dtype], train_only)
    estimated = estimate.activations(cfg, 2, M, DTYPES[dtype].itemsize, "cpu", train_only)
    assert estimated == pytest.approx(measured, rel=1e-3)
    assert estimated < 0.9 * estimate.activations(cfg, 2, M, DTYPES[dtype].itemsize, "cpu")


@pytest.mark.parametrize(("train_only", "second"), PARTS)
def test_peak_memory_of_training_a_part_is_estimated_within_4_percent(train_only, second, tmp_path):
    model, M = arm(TINY, second, position="rope")
    more = {"lora_r": 4} if train_only == "lora" else {}
    cfg = TrainConfig(model=model, micro_batch_size=4, n_accelerators=1, train_only=train_only, **more)
    found = estimate.memory(cfg, M, torch.float32, "cpu", 1)
    predicted = max(found["phases"].values())
    compare(f"{train_only} {second}, MB", predicted, step_peak(cfg, M, torch.float32, 1, tmp_path), 1e6, within=0.04)
    trained = sum(p.numel() for p in built(model, M, train_only).parameters() if p.requires_grad)
    assert found["parts"]["optimizer"] == 2 * found["parts"]["gradients"] == 2 * 4 * trained
    whole = dataclasses.replace(cfg, train_only="all")
    assert predicted < 0.8 * max(estimate.memory(whole, M, torch.float32, "cpu", 1)["phases"].values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dropout", "T"), [(0.0, 512), (0.1, 512), slow((0.0, 2600))])
def test_the_mask_of_a_window_is_estimated_exactly(dropout, T, dtype):
    """Diagonal saves what meta saves and also a mask, which is too small for the tolerance of the test of all
    activations."""
    shape = dataclasses.replace(TINY, n_layer=2, block_size=T, dropout=dropout)
    cfgs = [arm(shape, second) for second in ("diagonal", "meta")]
    (ours, _), (theirs, _) = (saved_bytes(cfg, 2, M, DTYPES[dtype]) for cfg, M in cfgs)
    estimated = [estimate.activations(cfg, 2, M, DTYPES[dtype].itemsize, "cpu") for cfg, M in cfgs]
    assert ours - theirs == estimated[0] - estimated[1]


@pytest.mark.parametrize(
    ("second", "T", "dtype", "dropout", "position"),
    [
        *diagonal([(second, 512) for second in SECOND_ATTENTIONS], DTYPES, (0.0, 0.1), ("rope", "learned")),
        # more than 256 rows, the most with which bfloat16 attention runs in fp32 on a CPU
        *diagonal([("meta", 2600), ("diagonal", 2600)], ("fp32",), (0.0,), ("rope", "learned")),
        *map(slow, itertools.product(("meta", "diagonal"), (2600,), ("bf16",), (0.0,), ("rope", "learned"))),
    ],
)
def test_activations_equal_those_that_autograd_saves(second, T, dtype, dropout, position):
    shape = dataclasses.replace(TINY, n_layer=2, block_size=T, position=position, dropout=dropout)
    cfg, M = arm(shape, second)
    measured, casts = saved_bytes(cfg, 2, M, DTYPES[dtype])
    assert estimate.activations(cfg, 2, M, DTYPES[dtype].itemsize, "cpu") == pytest.approx(measured, rel=1e-3)
    parts = estimate.memory(TrainConfig(model=cfg), M, DTYPES[dtype], "cpu", 1)["parts"]
    assert parts.get("casts of weights", 0) == casts


# a shape whose peak is at the end of the backward pass
WIDE = dataclasses.replace(TINY, n_layer=8, n_head=4, n_embd=256, block_size=20)


@pytest.mark.parametrize(
    ("shape", "second", "position", "dtype", "micro", "accumulation", "optimizer"),
    [
        (TINY, "meta", "rope", "fp32", 4, 1, "adamw"),  # config/tiny_meta.py
        pytest.param(TINY, "meta", "rope", "bf16", 4, 1, "adamw", marks=NATIVE_BF16),
        slow((TINY, "none", "rope", "fp32", 4, 1, "adamw")),
        pytest.param(TINY, "none", "rope", "bf16", 4, 1, "adamw", marks=NATIVE_BF16),
        pytest.param(TINY, "causal", "learned", "bf16", 1, 2, "adamw", marks=NATIVE_BF16),
        (TINY, "meta", "learned", "fp32", 1, 3, "muon"),
        slow((TINY, "diagonal", "rope", "fp32", 4, 1, "muon")),
        (WIDE, "meta", "learned", "fp32", 1, 1, "muon"),
        pytest.param(WIDE, "meta", "learned", "bf16", 1, 1, "adamw", marks=NATIVE_BF16),
        pytest.param(WIDE, "meta", "learned", "bf16", 1, 2, "adamw", marks=NATIVE_BF16),
    ],
)
def test_peak_memory_of_a_tiny_step_is_estimated_within_2_percent(
    shape, second, position, dtype, micro, accumulation, optimizer, tmp_path
):
    model, M = arm(shape, second, position=position)
    cfg = TrainConfig(model=model, micro_batch_size=micro, optimizer=optimizer, n_accelerators=1)
    predicted = max(estimate.memory(cfg, M, DTYPES[dtype], "cpu", accumulation)["phases"].values())
    measured = step_peak(cfg, M, DTYPES[dtype], accumulation, tmp_path)
    name = f"{model.n_embd} wide, {second} {position} {dtype} {optimizer}, {accumulation} micro-batches of {micro}, MB"
    compare(name, predicted, measured, 1e6, within=0.02)


@pytest.mark.parametrize(
    ("T", "dtype"),
    [
        (512, "fp32"),
        pytest.param(4096, "fp32", marks=pytest.mark.slow),
        pytest.param(4096, "bf16", marks=[NATIVE_BF16, pytest.mark.slow]),
    ],
)
def test_peak_memory_with_activation_checkpointing_is_within_6_percent(T, dtype, tmp_path):
    """In a short window the peak is at the end of the forward pass, in a long one in the backward pass of the last
    block."""
    model, M = arm(dataclasses.replace(TINY, n_layer=3, block_size=T), "meta")
    cfg = TrainConfig(model=model, micro_batch_size=2, n_accelerators=1, activation_checkpointing=True)
    predicted = max(estimate.memory(cfg, M, DTYPES[dtype], "cpu", 1)["phases"].values())
    compare(f"T={T} {dtype}, MB", predicted, step_peak(cfg, M, DTYPES[dtype], 1, tmp_path), 1e6, within=0.06)
    kept = dataclasses.replace(cfg, activation_checkpointing=False)
    assert max(estimate.memory(kept, M, DTYPES[dtype], "cpu", 1)["phases"].values()) > 1.1 * predicted


# ----------------------------------------------------------------------------- GPT-2 124M (make test-slow)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=NATIVE_BF16)])
@pytest.mark.parametrize(("second", "micro"), [("meta", 1), ("none", 2)])
def test_flops_and_peak_memory_of_gpt2_are_as_estimated(second, micro, dtype, tmp_path):
    model, M = (
        (GPT2, 102) if second == "meta" else (dataclasses.replace(GPT2, block_size=922, second_attention="none"), 0)
    )
    cfg = TrainConfig(model=model, micro_batch_size=micro, n_accelerators=1)
    name = f"GPT-2 {second} {dtype} micro {micro}"
    flops = estimate.flops_per_window(model, M)
    compare(f"{name}, TFLOP a window", flops, counted_flops(model, 1, M, DTYPES[dtype]), 1e12, within=1e-9)
    predicted = max(estimate.memory(cfg, M, DTYPES[dtype], "cpu", 1)["phases"].values())
    compare(f"{name}, GB", predicted, step_peak(cfg, M, DTYPES[dtype], 1, tmp_path), 1e9, within=0.02)


# ----------------------------------------------------------------------------- weights of the loss


@pytest.mark.parametrize(("second", "frozen"), [("none", False), ("meta", False), ("meta", True)])
def test_the_scoring_of_targets_is_counted_product_by_product(second, frozen):
    """The usual loss is subtracted from the weighted one, whose rule needs no products."""
    cfg, M = arm(dataclasses.replace(TINY, n_layer=2, n_head=2, n_embd=32), second)
    T = cfg.block_size
    content, scorer = T - M, dataclasses.replace(cfg, second_attention="none", n_embd=cfg.n_embd // 2, n_head=1)
    lengths = ShortLengths(content // 4, content // 5, content, T)

    def weighted(model: GPT) -> WeightedObjective:
        return WeightedObjective(model, WeightConfig(weighting="dense"), lengths, GPT(scorer) if frozen else None)

    counted = counted_flops(cfg, 2, M, torch.float32, weighted=weighted) - counted_flops(cfg, 2, M, torch.float32)
    assert counted == 2 * estimate.scoring_flops(cfg, M, lengths, scorer if frozen else None)
