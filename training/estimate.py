"""Estimates the parameters, FLOPs and memory of a training run, without data or a GPU. dry_run.py prints them.

Parameters are counted on the model itself. FLOPs and memory are derived below, term by term, and
tests/test_estimate.py compares them with what PyTorch multiplies, saves and allocates on a CPU. Terms that are
different on a GPU (see `device` below) follow from PyTorch's source and have not been measured.
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, TrainConfig
from nanometa.data.shards import MANIFEST, read_manifest
from nanometa.data.tokenizer import MARKERS, Tokenizer, rows_of
from nanometa.layers.loss import SLICE, block_rows, chunk_rows
from nanometa.layers.weighting import ShortLengths
from nanometa.model import GPT
from nanometa.training.adapters import attach
from nanometa.training.dataset import recipe_of
from nanometa.training.optimizer import muon_dtype, muon_matrices, muon_transient, part_of

# Dense bfloat16 FLOP/s with fp32 accumulation. NVIDIA's data sheets give twice these numbers where they assume
# structured sparsity. Keys are the names of torch.cuda.get_device_name() without maker, form factor and memory size.
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

# Bytes of memory by the first word of PEAK's keys; for a device that is sold with several sizes, the largest.
MEMORY = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9, "L4": 24e9, "L40S": 48e9}


def peak_flops(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a device by its name, such as "NVIDIA A100-SXM4-80GB" or "A100"; None if unknown.

    The whole name must match: an "RTX 4090 Laptop GPU" and a MIG slice of an H100 are other devices."""
    noise = r"NVIDIA|GeForce|SXM\d?|HBM3e?|(?:40|80)GB"
    words = [word for word in re.split(r"[\s-]+", device_name) if not re.fullmatch(noise, word, re.IGNORECASE)]
    return {name.lower(): peak for name, peak in PEAK.items()}.get(" ".join(words).lower())


# ----------------------------------------------------------------------------- the dataset or its recipe


class Data(NamedTuple):
    """The sizes of a dataset that an estimate needs: content tokens and markers per chunk, rows of the embedding, and
    ids that can be predicted."""

    chunk_content: int
    chunk_markers: int
    n_vocab: int
    n_content: int
    origin: str  # where the sizes come from, in words


def data_of(dataset: str) -> Data:
    """Returns the sizes of a dataset, from its manifest if it is prepared, else from its recipe.

    Raises UserError if there is neither."""
    if (Path(dataset) / MANIFEST).exists():
        found = read_manifest(Path(dataset))
        sizes = (found["chunk_content"], found["chunk_markers"])
        sizes += (found["tokenizer"]["n_vocab"], found["tokenizer"]["n_content"])
        return Data(*sizes, origin=f"as prepared in {dataset}")
    recipe = recipe_of(dataset)
    if recipe is None:
        raise UserError(
            f"there is neither a dataset in {dataset} nor a recipe for it, so its chunks and vocabulary are unknown: "
            f"prepare it first, or name a dataset data/RECIPE_INJECTION after a recipe in config/, such as "
            f"data/c4_uniform."
        )
    markers = recipe.chunk_markers if recipe.injection != "none" else 0
    if recipe.tokenizer == "bpe":
        n_content = recipe.bpe_vocab_size
    else:
        n_content = 50257 if recipe.tokenizer == "gpt2" else Tokenizer.load(Path(recipe.tokenizer)).n_content
    n_vocab = rows_of(n_content + len(MARKERS))
    origin = f"according to config/{recipe.recipe}.py, since {dataset} is not prepared yet"
    return Data(recipe.chunk_content, markers, n_vocab, n_content, origin)


# ----------------------------------------------------------------------------- parameters and FLOPs


def skeleton(cfg: GPTConfig) -> GPT:
    """Returns the model on the "meta" device: it has names and shapes, but no memory."""
    with torch.device("meta"):
        return GPT(cfg)


def adapted_skeleton(cfg: TrainConfig, M: int) -> GPT:
    """Returns a skeleton with the adapters of a run whose windows have M markers."""
    return attach(skeleton(cfg.model), cfg, M)


def trained_parameters(model: GPT) -> int:
    """Returns the number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameters(model: GPT) -> dict[str, int]:
    """Returns the number of parameters by part of the model."""
    words = {"attn": "attention", "second_attn": "second attention", "mlp": "MLP"}
    counts: dict[str, int] = {}
    for name, p in model.named_parameters():
        part = "position table" if name == "wpe.weight" else part_of(name)
        counts[words.get(part, part)] = counts.get(words.get(part, part), 0) + p.numel()
    return counts


def second_rows(cfg: GPTConfig, M: int) -> int:
    """Returns the number of rows that the second attention connects in a window with M meta-tokens."""
    return cfg.second.rows(cfg.block_size, M, cfg.random_fraction)


def scored_rows(cfg: GPTConfig, M: int) -> int:
    """Returns the number of rows, including data/loader.py's padding, for which the head is computed in a window with M
    meta-tokens."""
    return min(cfg.block_size, cfg.block_size - M + 1)


def flops_by_part(cfg: GPTConfig, M: int, train_only: str = "all", backward: bool = True) -> dict[str, int]:
    """Returns the FLOPs of the forward and backward pass on one window with M meta-tokens, by part of the model.

    Only matrix products count. A product of (n, k) with (k, m) takes 2 n k m FLOPs. For each product in the forward
    pass the backward pass has two of the same size, or one if a factor is a frozen weight. Attention is counted over
    all keys, as PaLM (arXiv 2204.02311, appendix B) and nanoGPT do; a causal kernel does about half of that. The
    product of LoRA's factors is left out, because it is made once for all windows of a micro-batch.

    train_only: as in TrainConfig. backward=False counts the forward pass alone."""
    T, C, L = cfg.block_size, cfg.n_embd, cfg.n_layer
    inner = cfg.n_inner or 4 * C
    # the number of products for each one in the forward pass
    moving = 3 if backward else 1  # of two activations
    adapted = moving - (backward and train_only == "markers")  # with the attentions' matrices
    fixed = moving - (backward and train_only != "all")  # with the MLP's matrices and the head

    def attention(rows: int, queries: int, keys: int) -> int:
        projections = 2 * rows * C * (3 * C + C)  # the products for queries, keys, values and the output
        return adapted * projections + moving * 2 * 2 * queries * keys * C  # the scores, the weighted sum of the values

    n = second_rows(cfg, M)
    second = {
        "nothing": (n, n, n),  # only the connected rows are computed
        "mean": (T, n, n),  # the values of all rows, and for simplicity also their queries and keys, are computed
        "read": (T, T, n + 1),  # the key of zeros for rows that have nothing to read counts as well
    }[cfg.second.others]
    # if no embedding is trained, no gradient passes the first matrix of the first block
    unneeded = 2 * T * C * 3 * C * (backward and train_only == "lora" and not M)
    parts = {
        "attention": L * attention(T, T, T) - unneeded,
        "second attention": L * attention(*second) * cfg.second.has_layer,
        "MLP": fixed * L * 2 * T * 2 * C * inner,
        "head": fixed * 2 * scored_rows(cfg, M) * C * cfg.vocab_size,
    }
    return {part: flops for part, flops in parts.items() if flops}


def flops_per_window(cfg: GPTConfig, M: int, train_only: str = "all") -> int:
    """Returns the FLOPs of the forward and backward pass on one window with M meta-tokens. train_only: as in
    TrainConfig."""
    return sum(flops_by_part(cfg, M, train_only).values())


def scoring_flops(cfg: GPTConfig, M: int, lengths: ShortLengths | None, scorer: GPTConfig | None = None) -> int:
    """Returns the FLOPs of computing the weights of the loss for a window with M meta-tokens: forward passes alone.

    lengths: the short contexts; None if none is computed, so that only the head runs once more. scorer: the model of a
    frozen scorer; None = the model scores itself."""
    T, head = cfg.block_size, flops_by_part(cfg, M)["head"] // 3
    if lengths is None:
        return head
    if scorer is None:
        (K, stride), model, markers = lengths.in_positions(), cfg, M
        windows, rows = -(-(T - K) // stride), T - K
    else:
        K, T, model, markers = lengths.length, lengths.content, scorer, 0
        windows, rows = 1 - (-(T - K) // lengths.stride), T
    # a short window has room for all markers, because their number differs between windows
    parts = flops_by_part(dataclasses.replace(model, block_size=K), min(markers, K))
    blocks = sum(flops for part, flops in parts.items() if part != "head") // 3
    return head + windows * blocks + 2 * rows * model.n_embd * model.vocab_size


def utilization(cfg: TrainConfig, T: int, M: int, seconds: float, peak: float) -> float:
    """Returns the MFU (model FLOPs utilization) of a step on windows of T positions, M of them markers.

    seconds: the time of the step; peak: FLOP/s of all devices together."""
    flops = cfg.batch_size * flops_per_window(dataclasses.replace(cfg.model, block_size=T), M, cfg.train_only)
    return flops / seconds / peak


# ----------------------------------------------------------------------------- memory
# Bytes of the tensors of one process in eager mode. Weights, gradients and the optimizer's state are fp32. `size` is
# the bytes per number of autocast's dtype (4 without autocast), which the products of the blocks and the head have.


def activations(cfg: GPTConfig, B: int, M: int, size: int, device: str, train_only: str = "all") -> int:
    """Returns the bytes that autograd saves for the backward pass of B windows, counting each tensor once.

    device: cuda | mps | cpu. train_only: as in TrainConfig; the input of a product with a frozen matrix is not
    saved."""
    T, C, H = cfg.block_size, cfg.n_embd, cfg.n_head
    inner, rope = cfg.n_inner or 4 * C, cfg.position == "rope"
    adapted, full = train_only != "markers", train_only == "all"  # are the attentions' matrices trained, and the MLP's?

    def norm(rows: int) -> int:
        # the input, which is in fp32 like the residual stream, and the mean and 1/deviation of each row
        return B * rows * (4 * C + 4 + 4)

    def dropout(rows: int, width: int) -> int:  # the mask: booleans on CUDA, elsewhere numbers of the input's dtype
        return B * rows * C * (1 if device == "cuda" else width) if cfg.dropout else 0

    def around(rows: int) -> int:  # an attention without its softmax: the norm, c_attn's input, dropout
        return norm(rows) + B * rows * C * size * adapted + dropout(rows, size)

    def softmax(rows: int, masked: bool = False, reused: bool = True) -> int:
        # reused: c_proj's input counts here, and is the output of the softmax where no copy is needed
        n = B * rows
        c_proj = n * C * size * reused * adapted
        if device == "cpu" and cfg.dropout:
            # With dropout, torch has no fused kernel on a CPU: it saves q, k, v and three matrices of rows x rows in
            # fp32.
            return 4 * (3 * n * C + 3 * B * H * rows * rows) + c_proj
        if device == "cpu" and size == 2 and not masked:
            return 3 * n * C * size + c_proj  # blockwise_attention's q, k and v
        saved = 4 * n * H  # the log-sum-exp of each softmax
        if device == "cpu" and size == 2 and rows < 256:
            return saved + 4 * 4 * n * C + c_proj  # causal_sdpa's fp32 q, k, v and output; c_proj's bf16 input
        saved += (3 + 1) * n * C * size  # q, k and v as one tensor, and the output
        # RoPE saves rotated copies of q and k, while v keeps the tensor of the unrotated ones alive. The kernel's
        # output has the copies' layout, heads before positions, so c_proj's input is another copy.
        return saved + (2 * n * C * size + c_proj) * rope

    def reading(keys: int) -> int:  # read_sdpa with c_proj's input
        n, scores = B * T, B * T * keys
        if device == "cpu" and cfg.dropout:  # the last terms: c_proj's input, and which rows read anything
            return 4 * (n * C + 2 * B * keys * C + 3 * H * scores) + n * C * size + n
        saved = 4 * n * H + scores * size + n * C * size + n  # log-sum-exps; the mask as numbers; the output
        saved += 2 * B * keys * C * size  # k and v with the key of zeros
        # RoPE saves a rotated copy of q, else q keeps the tensor of all keys and values alive; c_proj's input as above
        return saved + n * C * size * (2 if rope else 3)

    # c_fc's input, and GELU's input and output
    mlp = norm(T) + B * T * (C * size * full + (1 + full) * inner * size) + dropout(T, size)
    block = around(T) + softmax(T) + mlp
    rows = second_rows(cfg, M)
    tables = T
    if cfg.second.others == "read":
        block += around(T) + reading(rows + 1) + B * rows * (2 * 8 + 2 * 1)  # indices and pad masks of both gathers
    elif cfg.second.others == "mean":
        block += around(T) + softmax(rows, reused=False) + B * T * C * size  # c_proj's input
        block += B * rows * (8 + 1) + T * 4  # index and pad mask of the gather; the divisors of the mean
        tables += rows
    elif cfg.second.gathers:
        masked = cfg.second.window is not None and rows > cfg.second.window
        block += around(rows) + softmax(rows, masked)
        block += B * rows * (2 * 8 + 2 * 1)  # indices of gather and scatter, and pad masks
        if masked and not (device == "cpu" and cfg.dropout):
            # one mask for all windows of a batch, as numbers of the dtype in which causal_sdpa computes
            block += rows * rows * (4 if device == "cpu" and rows < 256 else size)
        tables += rows
    elif cfg.second.has_layer:
        block += around(rows) + softmax(rows)
    cos_sin = 2 * 4 * B * tables * (C // H // 2) if rope else 0
    scored = scored_rows(cfg, M)
    gather = B * scored * (8 + 1) if scored < T else 0
    below = norm(T) + dropout(T, 4)  # the first norm and the dropout of the embedding
    unneeded = below * (train_only == "lora" and not M)  # no gradient passes there if no embedding is trained
    # without autocast, the products need the matrices that LoRA computes; with autocast, they need the casts of these
    low_rank = 4 * (adapted_matrices(cfg) - 3 * C * C * (not M)) * (train_only == "lora" and size == 4)
    return cfg.n_layer * block + norm(T) + cos_sin + dropout(T, 4) + gather + low_rank - unneeded


def adapted_matrices(cfg: GPTConfig) -> int:
    """Returns how many numbers the matrices have that LoRA adapts."""
    return cfg.n_layer * 4 * cfg.n_embd**2 * (1 + cfg.second.has_layer)


def loss_transient(cfg: GPTConfig, B: int, M: int, size: int, device: str, train_only: str = "all") -> int:
    """Returns the largest number of bytes that the forward pass of loss._SummedNats holds at once, including its
    input."""
    full = train_only == "all"  # else the head is frozen, and is joined with the trained rows of the markers
    n, C, V = B * scored_rows(cfg, M), cfg.n_embd, cfg.vocab_size
    chunk = min(n, chunk_rows(device, torch.Size((V, C))))
    block = min(chunk, block_rows(device, V))
    # The largest of: a block's fp32 logits with their softmax; the gradient of the hidden states; and a slice of the
    # head's gradient, which from the second chunk on has an fp32 copy under autocast.
    fp32_copy = 4 if size == 2 and n > chunk else 0
    most = max(2 * 4 * block * V, chunk * C * size, min(V, SLICE) * C * (size + fp32_copy) * full)
    casts = (V if size == 2 else 0) * C * size + chunk * C * size  # the head's weight; the hidden states
    head = 4 * V * C * (full or M > 0)
    # the last three terms: the gradients of the head and of the hidden states, and the hidden states themselves
    return chunk * V * size + most + casts + head + 4 * n * C + 4 * n * C


def memory(cfg: TrainConfig, M: int, dtype: torch.dtype, device: str, accumulation: int) -> dict[str, dict[str, int]]:
    """Returns {"parts": bytes by name, "phases": bytes held in each phase of a step}. The peak is the largest phase.

    cfg.model must have a vocabulary; cfg.n_accelerators is the number of processes."""
    plain, model, size = skeleton(cfg.model), adapted_skeleton(cfg, M), dtype.itemsize
    B, wte, L = cfg.micro_batch_size, cfg.model.vocab_size * cfg.model.n_embd, cfg.model.n_layer
    full = cfg.train_only == "all"
    P, trained = model.num_params(), trained_parameters(model)
    matrices = sum(p.numel() for name, p in plain.named_parameters() if name.startswith("h.") and p.dim() == 2)
    of_muon = muon_matrices(model) if cfg.optimizer == "muon" else []
    saved = activations(cfg.model, B, M, size, device, cfg.train_only)
    if cfg.activation_checkpointing:
        longer = dataclasses.replace(cfg.model, n_layer=L + 1)
        block = activations(longer, B, M, size, device, cfg.train_only) - saved
        saved += L * (4 * B * cfg.model.block_size * cfg.model.n_embd - block)  # keeps only the inputs of the blocks
    parts = {
        "weights": 4 * P,
        # with several processes, gradients are views of DDP's buckets
        "gradients": 4 * trained if cfg.n_accelerators == 1 else 0,
        "optimizer": 4 * (2 * trained - sum(p.numel() for p in of_muon)),  # Muon has one moment, AdamW two
        "DDP's buckets": 4 * trained if cfg.n_accelerators > 1 else 0,  # kept from step to step
        # autocast casts the blocks' matrices once per forward pass, and the backward pass needs the casts
        "casts of weights": 2 * matrices if size == 2 else 0,
        "activations": saved,
        "temporary, for the loss": loss_transient(cfg.model, B, M, size, device, cfg.train_only),
    }
    kept = parts["weights"] + parts["optimizer"] + parts["DDP's buckets"]
    forward = kept + parts["casts of weights"] + parts["activations"]
    if accumulation > 1:  # the gradients of the earlier micro-batches
        forward += parts["gradients"]
    phases = {
        "end of forward pass": forward + parts["temporary, for the loss"],
        # the gradients of the head and of the hidden states, as saved and as scaled by the loss's gradient; on a CPU
        # the gradient of the head is scaled in place
        "start of backward pass": forward
        + 4 * ((1 if device == "cpu" else 2) * wte * full + 2 * B * scored_rows(cfg.model, M) * cfg.model.n_embd),
        # In between, activations are freed while gradients are made. At the end, the dense gradient of the embedding
        # is made beside that of the head; the gradient of earlier micro-batches is the third of this size. AdamW's
        # fused update needs no further memory.
        "end of backward pass": kept
        + parts["gradients"]
        + 4 * wte * (M > 0 if not full else 2 if accumulation > 1 else 1),
    }
    if of_muon:
        # every GPU that --dry_run knows computes bfloat16
        muon = torch.bfloat16 if device == "cuda" else muon_dtype(torch.device(device))
        phases["update"] = kept + parts["gradients"] + muon_transient(of_muon, muon)
    if cfg.activation_checkpointing:
        # the recomputed activations and casts of the last block, and the gradients of the head, of the residual stream
        # and of the MLP's input and output
        rows = B * cfg.model.block_size * cfg.model.n_embd
        again = block + (2 * matrices // L if size == 2 else 0) + 4 * wte * full + rows * (4 + 2 * size)
        phases["recomputing a block"] = forward - parts["casts of weights"] + again
    return {"parts": {name: n_bytes for name, n_bytes in parts.items() if n_bytes}, "phases": phases}
