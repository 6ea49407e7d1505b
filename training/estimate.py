"""What a training run will take, before there is data or a GPU: parameters, tokens, FLOPs, memory, hours, cost.

    python train.py config/meta_gpt2.py --dry_run
    python train.py config/meta_gpt2.py --dry_run --accelerator=A100 --n_accelerators=4 --price=1.5 --micro_batch_size=8

Parameters are counted on the model itself; FLOPs and memory are derived below, term by term, and
tests/test_estimate.py holds them against what PyTorch really multiplies, saves and allocates, on a CPU: where a GPU
differs (`device` below), the terms follow from PyTorch's source and are not measured yet.
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, TrainConfig
from nanometa.config.checks import nearest_multiples
from nanometa.data.shards import MANIFEST, read_manifest
from nanometa.data.tokenizer import Tokenizer
from nanometa.layers.loss import SLICE, block_rows, chunk_rows
from nanometa.model import GPT
from nanometa.training.dataset import check_arm, recipe_of, with_vocabulary
from nanometa.training.distributed import pick_dtype
from nanometa.training.optimizer import part_of

# Dense bfloat16 FLOP/s with fp32 accumulation, from NVIDIA's data sheets (which print twice as much where they count
# structured sparsity). Keys are what torch.cuda.get_device_name() says, less maker, form and size of the memory.
PEAK = {
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "H100": 989e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,  # SXM
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
}

# bytes of memory, by the first word of the key; of those that are sold with several sizes the largest
MEMORY = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9, "L4": 24e9, "L40S": 48e9}


def peak_flops(device_name: str) -> float | None:
    """Peak of a device by its name ("NVIDIA A100-SXM4-80GB", or just "A100"), None if it is not in the table.

    The whole name has to fit: an "RTX 4090 Laptop GPU" and a MIG slice of an H100 are other devices."""
    noise = r"NVIDIA|GeForce|SXM\d?|HBM3e?|(?:40|80)GB"
    words = [word for word in re.split(r"[\s-]+", device_name) if not re.fullmatch(noise, word, re.IGNORECASE)]
    return {name.lower(): peak for name, peak in PEAK.items()}.get(" ".join(words).lower())


# ----------------------------------------------------------------------------- the dataset, or its recipe


class Data(NamedTuple):
    """What a run's size depends on: content tokens and markers of a chunk, rows of the embedding, predictable ids."""

    chunk_content: int
    chunk_markers: int
    n_vocab: int
    n_content: int
    origin: str  # where these come from, in words


def data_of(dataset: str) -> Data:
    """From the dataset's manifest if it is prepared, else from its recipe. Raises UserError if there is neither."""
    if (Path(dataset) / MANIFEST).exists():
        found = read_manifest(Path(dataset))
        sizes = (found["chunk_content"], found["chunk_markers"])
        sizes += (found["tokenizer"]["n_vocab"], found["tokenizer"]["n_content"])
        return Data(*sizes, origin=f"as prepared in {dataset}")
    recipe = recipe_of(dataset)
    if recipe is None:
        raise UserError(
            f"there is neither a dataset in {dataset} nor a recipe for it, so chunks and vocabulary are unknown: "
            f"prepare it first, or name it data/RECIPE_INJECTION after a recipe in config/, such as data/c4_uniform."
        )
    markers = recipe.chunk_markers if recipe.injection != "none" else 0
    if recipe.tokenizer == "bpe":
        n_content = recipe.bpe_vocab_size
    else:
        n_content = 50257 if recipe.tokenizer == "gpt2" else Tokenizer.load(Path(recipe.tokenizer)).n_content
    n_vocab = -(-(n_content + 1) // 64) * 64  # a marker's id, and spare rows as data/tokenizer.py adds them
    origin = f"by recipe, config/{recipe.recipe}.py: {dataset} is not prepared yet"
    return Data(recipe.chunk_content, markers, n_vocab, n_content, origin)


# ----------------------------------------------------------------------------- parameters and FLOPs


def skeleton(cfg: GPTConfig) -> GPT:
    """The model with shapes and names but without numbers."""
    with torch.device("meta"):
        return GPT(cfg)


def parameters(model: GPT) -> dict[str, int]:
    """Parameters by part of the model."""
    words = {"attn": "attention", "second_attn": "second attention", "mlp": "MLP"}
    counts: dict[str, int] = {}
    for name, p in model.named_parameters():
        part = "position table" if name == "wpe.weight" else part_of(name)
        counts[words.get(part, part)] = counts.get(words.get(part, part), 0) + p.numel()
    return counts


def second_rows(cfg: GPTConfig, M: int) -> int:
    """Rows of a window that the second attention connects, M of them being meta-tokens."""
    return cfg.second.rows(cfg.block_size, M, cfg.random_fraction)


def scored_rows(cfg: GPTConfig, M: int) -> int:
    """Rows of a window with M meta-tokens that the head is computed at, as data/loader.py pads them."""
    return min(cfg.block_size, cfg.block_size - M + 1)


def flops_by_part(cfg: GPTConfig, M: int) -> dict[str, int]:
    """FLOPs of forward and backward on one window with M meta-tokens, in matrix products only.

    A product of (n, k) with (k, m) is 2 n k m, and the backward has two of its size for every one of the forward.
    Attention is counted over all keys (as PaLM, arXiv 2204.02311, appendix B, and nanoGPT do): a causal kernel does
    about half of it."""
    T, C, L = cfg.block_size, cfg.n_embd, cfg.n_layer
    inner = cfg.n_inner or 4 * C

    def attention(rows: int) -> int:
        projections = 2 * rows * C * (3 * C + C)  # q, k, v and the output
        return projections + 2 * 2 * rows * rows * C  # scores, and the weighted sum of values

    forward = {
        "attention": L * attention(T),
        "second attention": L * attention(second_rows(cfg, M)),
        "MLP": L * 2 * T * 2 * C * inner,
        "head": 2 * scored_rows(cfg, M) * C * cfg.vocab_size,
    }
    return {part: 3 * flops for part, flops in forward.items() if flops}


def flops_per_window(cfg: GPTConfig, M: int) -> int:
    return sum(flops_by_part(cfg, M).values())


# ----------------------------------------------------------------------------- memory
# Bytes of tensors in one process in eager mode. Weights, their gradients and the optimizer's state are fp32; `size` is
# the bytes of autocast's dtype (4 without autocast), in which the products of the blocks and the head are made.


def activations(cfg: GPTConfig, B: int, M: int, size: int, device: str) -> int:
    """What autograd saves for the backward of B windows, each tensor once. device: cuda | mps | cpu."""
    T, C, H = cfg.block_size, cfg.n_embd, cfg.n_head
    inner, rope = cfg.n_inner or 4 * C, cfg.position == "rope"

    def norm(rows: int) -> int:
        return B * rows * (4 * C + 4 + 4)  # input, which the residual keeps in fp32; mean and 1/deviation of each row

    def dropout(rows: int, width: int) -> int:  # a mask: booleans on CUDA, elsewhere numbers of the input's dtype
        return B * rows * C * (1 if device == "cuda" else width) if cfg.dropout else 0

    def attention(rows: int) -> int:
        n = B * rows
        saved = norm(rows) + n * C * size + dropout(rows, size)  # the second: c_attn's input
        if device == "cpu" and cfg.dropout:
            # torch has no fused kernel for it: q, k, v and three matrices of rows x rows in fp32; c_proj's input
            return saved + 4 * (3 * n * C + 3 * B * H * rows * rows) + n * C * size
        saved += 4 * n * H  # the softmax's log-sums
        if device == "cpu" and size == 2 and rows < 256:
            return saved + 4 * 4 * n * C + n * C * size  # causal_sdpa's fp32 q, k, v and output; c_proj's bf16 input
        saved += (3 + 1) * n * C * size  # q, k, v as one tensor; the output
        # turned copies of q and k, while v keeps their old ones alive; the kernel's output takes the copies' layout,
        # heads before positions, so that c_proj's input is a copy, too
        return saved + (2 + 1) * n * C * size * rope

    mlp = norm(T) + B * T * (C * size + 2 * inner * size) + dropout(T, size)  # c_fc's input, GELU's input and output
    block = attention(T) + mlp
    rows = second_rows(cfg, M)
    tables = T
    if cfg.second.gathers:
        block += attention(rows) + B * rows * (2 * 8 + 2 * 1)  # the indices of gather and scatter; which rows are pads
        if cfg.second.window is not None and rows > cfg.second.window and not (device == "cpu" and cfg.dropout):
            # the mask, as numbers, the same for all windows of a batch; in what causal_sdpa computes in
            block += rows * rows * (4 if device == "cpu" and rows < 256 else size)
        tables += rows
    elif cfg.second.has_layer:
        block += attention(rows)
    cos_sin = 2 * 4 * B * tables * (C // H // 2) if rope else 0
    scored = scored_rows(cfg, M)
    gather = B * scored * (8 + 1) if scored < T else 0
    return cfg.n_layer * block + norm(T) + cos_sin + dropout(T, 4) + gather


def loss_transient(cfg: GPTConfig, B: int, M: int, size: int, device: str) -> int:
    """The most that loss._SummedNats holds at once in its forward, its input included."""
    n, C, V = B * scored_rows(cfg, M), cfg.n_embd, cfg.vocab_size
    chunk = min(n, chunk_rows(device, torch.Size((V, C))))
    block = min(chunk, block_rows(device, V))
    # a block's logits in fp32 and their log-softmax, or a product: the gradient of hidden, or a slice of the head's,
    # of which under autocast there is an fp32 copy
    most = max(2 * 4 * block * V, chunk * C * size, min(V, SLICE) * C * (size + (4 if size == 2 else 0)))
    casts = (V + chunk) * C * size if size == 2 else 0  # of the head's weight and hidden
    return chunk * V * size + most + casts + 4 * V * C + 4 * n * C + 4 * n * C  # the gradients of both; hidden


def memory(cfg: TrainConfig, M: int, dtype: torch.dtype, device: str, accumulation: int) -> dict[str, dict[str, int]]:
    """{"parts": bytes by name, "phases": bytes held in each phase of a step, the peak being the largest}.

    cfg.model has a vocabulary; cfg.n_accelerators is the number of processes."""
    model, size = skeleton(cfg.model), dtype.itemsize
    B, wte, L = cfg.micro_batch_size, cfg.model.vocab_size * cfg.model.n_embd, cfg.model.n_layer
    P = model.num_params()
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2)
    saved = activations(cfg.model, B, M, size, device)
    if cfg.activation_checkpointing:
        block = activations(dataclasses.replace(cfg.model, n_layer=L + 1), B, M, size, device) - saved
        saved += L * (4 * B * cfg.model.block_size * cfg.model.n_embd - block)  # only what goes into the blocks
    parts = {
        "weights": 4 * P,
        "gradients": 4 * P if cfg.n_accelerators == 1 else 0,  # else they are views of DDP's buckets
        "optimizer": 4 * (2 * P - (matrices if cfg.optimizer == "muon" else 0)),  # Muon has one moment, AdamW two
        "DDP's buckets": 4 * P if cfg.n_accelerators > 1 else 0,  # kept from step to step
        # autocast casts a block's matrices once a forward, and their backward needs the casts
        "casts of weights": 2 * matrices if size == 2 else 0,
        "activations": saved,
        "loss, while it is made": loss_transient(cfg.model, B, M, size, device),
    }
    kept = parts["weights"] + parts["optimizer"] + parts["DDP's buckets"]
    forward = kept + parts["casts of weights"] + parts["activations"]
    if accumulation > 1:  # those of the micro-batches before
        forward += parts["gradients"]
    phases = {
        "forward's end": forward + parts["loss, while it is made"],
        # the gradients of the head and hidden, as saved and as scaled by that of the sum
        "backward's start": forward + 2 * 4 * (wte + B * scored_rows(cfg.model, M) * cfg.model.n_embd),
        # in between, activations go as gradients come; here the embedding's gradient is made, dense, beside the head's,
        # and with earlier micro-batches' it is the third. AdamW's fused update needs nothing of its own
        "backward's end": kept + parts["gradients"] + 4 * wte * (2 if accumulation > 1 else 1),
    }
    if cfg.activation_checkpointing:
        # the last block's activations and casts, made again, beside the gradients of the head, of the residual stream
        # and of the MLP's ends
        rows = B * cfg.model.block_size * cfg.model.n_embd
        again = block + (2 * matrices // L if size == 2 else 0) + 4 * wte + rows * (4 + 2 * size)
        phases["block made again"] = forward - parts["casts of weights"] + again
    return {"parts": {name: n_bytes for name, n_bytes in parts.items() if n_bytes}, "phases": phases}


# ----------------------------------------------------------------------------- the report


def describe_estimate(cfg: TrainConfig, accumulation: int) -> str:
    """Text for --dry_run; accumulation = micro-batches a step in each of cfg.n_accelerators processes."""
    peak = peak_flops(cfg.accelerator)
    if peak is None:
        raise UserError(f"accelerator={cfg.accelerator!r} is not one whose peak is known: take {', '.join(PEAK)}.")
    data = data_of(cfg.dataset)
    check_arm(cfg, data.chunk_markers)
    chunk = data.chunk_content + data.chunk_markers
    if cfg.model.block_size % chunk:
        raise UserError(
            f"block_size={cfg.model.block_size} is not a whole number of the {chunk}-position chunks of {cfg.dataset}: "
            f"take --block_size={nearest_multiples(cfg.model.block_size, chunk)}."
        )
    cfg = with_vocabulary(cfg, data.n_vocab, data.n_content)
    T, n = cfg.model.block_size, cfg.n_accelerators
    C = T // chunk * data.chunk_content
    device = cfg.device if cfg.device != "auto" else "cuda"
    if cfg.dtype == "auto" and device == "cuda":
        dtype = torch.bfloat16  # every accelerator of the table computes it
    else:
        dtype = pick_dtype(cfg.dtype, torch.device(device))[0]

    def lines(title: str, rows: dict[str, str], notes: str = "") -> str:
        return f"\n{title}\n" + "\n".join(f"  {name:<32}{value}" for name, value in rows.items()) + "\n" + notes

    counts = parameters(skeleton(cfg.model))
    total, table = sum(counts.values()), counts.get("position table", 0)
    out = f"{cfg.run_name or 'a run'} on {n} x {cfg.accelerator}: an estimate, nothing is trained\n"
    out += f"\ndataset, {data.origin}\n  chunks of {data.chunk_content} content tokens + {data.chunk_markers} markers; "
    out += f"embedding of {data.n_vocab:,} rows, {data.n_content:,} of them predictable\n"
    sums = {"total": total, "total without position table": total - table}
    out += lines("parameters", {name: f"{count / 1e6:9.3f} M" for name, count in {**counts, **sums}.items()})

    windows = cfg.max_steps * cfg.batch_size
    tokens = {
        "a window": f"{C:,} content tokens in {T:,} positions",
        "a step": f"{cfg.batch_size * C:,} content tokens in {cfg.batch_size * T:,} positions",
        "": f"{cfg.batch_size} windows = {n} processes x {accumulation} micro-batches x {cfg.micro_batch_size} windows",
        f"{cfg.max_steps:,} steps": f"{windows * C:.3e} content tokens in {windows * T:.3e} positions",
    }
    out += lines("tokens", tokens)

    flops = flops_by_part(cfg.model, T - C)
    window, all_flops = sum(flops.values()), sum(flops.values()) * windows
    rows = {name: f"{f / T:.3e}  a position  {100 * f / window:5.1f} %" for name, f in flops.items()}
    rows |= {"total": f"{window / T:.3e}  a position, {window / C:.3e} a content token"}
    if T > C:
        rows |= {"markers": f"{100 * (T - C) / T:.1f} % of the positions: their share of projections, MLP and head"}
    rows |= {"a step": f"{window * cfg.batch_size:.3e}", "the run": f"{all_flops:.3e}"}
    if cfg.activation_checkpointing:
        again = (window - flops["head"]) // 3 * windows  # the blocks' forward; no useful work, but it takes its time
        rows |= {"made again, on top": f"{again:.3e}"}
        all_flops += again
    out += lines("FLOPs, forward and backward", rows, "  (matrix products; attention over all keys, as PaLM counts)\n")

    bytes_of = memory(cfg, T - C, dtype, device, accumulation)
    rows = {name: f"{n_bytes / 1e9:9.3f} GB" for name, n_bytes in bytes_of["parts"].items()}
    phases = {f"held at the {name}": f"{n_bytes / 1e9:9.3f} GB" for name, n_bytes in bytes_of["phases"].items()}
    name = str(dtype).removeprefix("torch.")
    title = f"memory of a process on {device}, {name}, micro-batches of {cfg.micro_batch_size}"
    rows |= phases | {"peak": f"{max(bytes_of['phases'].values()) / 1e9:9.3f} GB"}
    room = MEMORY.get(cfg.accelerator.upper().split()[0]) if device == "cuda" else None
    if room and max(bytes_of["phases"].values()) > room:
        rows |= {"IT DOES NOT FIT": f"{room / 1e9:9.0f} GB is what a {cfg.accelerator} has: lower --micro_batch_size"}
    notes = (
        "  (tensors in eager mode; torch.compile usually saves some of the activations; the CUDA context, NCCL and\n"
    )
    out += lines(title, rows, notes + "  the allocator's rounding come on top; GB = 1e9 bytes)\n")

    if dtype != torch.bfloat16 or device != "cuda":
        return out + f"\nhours and cost: not estimated: the peaks known are of GPUs in bfloat16, not {device}, {name}"
    hours = all_flops / (n * peak * cfg.mfu) / 3600
    out += (
        f"\nassumed: {peak:.3e} dense bfloat16 FLOP/s a {cfg.accelerator}, MFU {cfg.mfu:g}, {cfg.price:g} USD for an "
    )
    out += "hour of one; no time for evaluation and saving\n"
    time = f"{hours:,.2f} hours" if hours >= 0.1 else f"{hours * 60:.2g} minutes"
    return out + f"hours and cost: {time} on {n} x {cfg.accelerator}, {hours * n * cfg.price:,.2f} USD"
