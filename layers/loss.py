"""The training loss, computed in slices so that the full logits are never in memory, and the figures reported of it."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanometa.meta_attention import gather_rows

SLICE = 8192  # rows of the head (vocabulary entries) whose gradient is computed at a time


def chunk_rows(device: str, weight: torch.Size) -> int:
    """Returns how many rows of logits to compute at a time, for a head (V, C) and a type of device.

    The figures were measured on 2 CPU cores. A head of (4160, 192) fits in the CPU cache, and so do its logits with 512
    rows. A head of (50304, 768) does not fit, and its products are faster with more rows, but the logits of 4096 rows
    would take a tenth of a step's memory."""
    if device != "cpu":
        return 4096
    return 512 if weight.numel() < 2**22 else 1024


def block_rows(device: str, vocabulary: int) -> int:
    """Returns how many rows of a chunk go through the softmax together.

    On a CPU a block takes some 3 MB in fp32, which stays in the cache between the passes of the softmax. A GPU is
    fastest with the whole chunk in one kernel."""
    return max(1, 800_000 // vocabulary) if device == "cpu" else 4096


def mask_unpredictable_(logits: torch.Tensor, n_content: int) -> torch.Tensor:
    """Sets the logits (..., V) of all ids >= n_content to -inf, in place: no arm may predict markers or spare ids."""
    logits[..., n_content:] = -math.inf
    return logits


def _log_probs(logits: torch.Tensor, n_content: int) -> torch.Tensor:
    """Returns the log-softmax (N, V) of logits (N, V) over the content ids, in fp32 or wider."""
    return torch.log_softmax(_predictable(logits, n_content), -1)


def _predictable(logits: torch.Tensor, n_content: int) -> torch.Tensor:
    """Returns a copy of logits (N, V) in fp32 or wider, with -inf at the ids that are never predicted."""
    return mask_unpredictable_(logits.to(_sum_dtype(logits.dtype), copy=True), n_content)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of softmax and sums: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Returns the dtype of matrix products: autocast's if it is enabled, else that of hidden."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _nats_and_slopes(logits, targets, n_content: int, weights=None) -> torch.Tensor:
    """Returns the weighted sum () of the nats of the scored targets (N,), and overwrites logits (N, V) with its slopes.

    weights (N,): None = all 1. The rows of logits without a scored target get slopes, too, which the caller must not
    use."""
    total = torch.zeros((), dtype=_sum_dtype(logits.dtype), device=logits.device)
    block = block_rows(logits.device.type, logits.size(1))
    parts = [None] * -(-len(logits) // block) if weights is None else weights.split(block)
    for part, t, w in zip(logits.split(block), targets.split(block), parts, strict=True):
        x = _predictable(part, n_content)
        p, scored, t = x.softmax(1), t >= 0, t.clamp(min=0)[:, None]
        # log p[t], also where p[t] is too small to be represented: take the normalizer from the largest entry
        logp = (x.gather(1, t) - x.amax(1, keepdim=True) + p.amax(1, keepdim=True).log()).squeeze(1)
        total -= torch.where(scored, logp if w is None else logp * w, 0).sum()
        # the gradient is softmax - onehot; subtract before rounding, since the difference is small for a likely target
        p.scatter_add_(1, t, -torch.ones_like(t, dtype=p.dtype))
        if w is not None:
            p *= w[:, None]
        part.copy_(p)
        del x, p  # free them before the next block allocates its own
    return total


def _add_head_gradient(d_weight: torch.Tensor, d: torch.Tensor, h: torch.Tensor, first: bool) -> None:
    """Adds d.T @ h to d_weight (V, C), or overwrites it if this is the first chunk. d (N, V), h (N, C)."""
    # one slice of the vocabulary at a time, to avoid a second tensor of the head's size
    for part, d_part in zip(d_weight.split(SLICE), d.split(SLICE, 1), strict=True):
        if first:
            part.copy_(d_part.T @ h)
        else:
            part += d_part.T @ h


class _SummedNats(torch.autograd.Function):
    """The weighted sum of cross-entropies of hidden @ weight.T. The forward also computes the gradients, in chunks;
    that of a frozen weight is left out."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, n_content, dtype, chunk):
        w, n = weight.to(dtype), hidden.size(0)
        total = torch.zeros((), dtype=_sum_dtype(dtype), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        if ctx.needs_input_grad[1]:  # the first chunk fills it
            d_weight = (torch.empty_like if n else torch.zeros_like)(weight, dtype=total.dtype)
        # on a CPU, mapping the memory pages of a new tensor of this size costs a third of the product's time
        buffer = torch.empty(min(n, chunk), w.size(0), dtype=dtype) if hidden.device.type == "cpu" else None
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            # zeros in rows that are not scored cost less here than in the larger gradient of the logits
            unscored = (targets[rows] < 0)[:, None]
            h = hidden[rows].to(dtype).masked_fill(unscored, 0)
            d = torch.mm(h, w.T, out=None if buffer is None else buffer[: h.size(0)])
            # not in place: under torch.compile, torch 2.11 gives zero gradients if the result was changed in place
            total = total + _nats_and_slopes(d, targets[rows], n_content, None if weights is None else weights[rows])
            d_hidden[rows] = (d @ w).masked_fill_(unscored, 0)
            if d_weight is not None:
                _add_head_gradient(d_weight, d, h, first=start == 0)
            del d  # free it before the next chunk allocates its own
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        if d_weight is None:  # the head is frozen
            return d_hidden * grad.to(d_hidden.dtype), None, None, None, None, None, None
        if d_weight.device.type == "cpu":  # in place, to save a tensor of the head's size when memory use is highest
            d_weight = d_weight.mul_(grad)  # a second backward pass through the same graph is an error
        else:  # torch.compile cannot do that
            d_weight = d_weight * grad.to(d_weight.dtype)
        return d_hidden * grad.to(d_hidden.dtype), d_weight, None, None, None, None, None


def summed_nats(hidden, weight, targets, n_content: int, chunk: int | None = None, weights=None) -> torch.Tensor:
    """Returns the summed nats of all scored targets, a scalar in fp32, with gradients.

    hidden (N, C); weight (V, C) of the head; targets (N,), negative where nothing is scored; weights (N,) that multiply
    the nats, in fp32 and without gradient (None = all 1). The matrix products run in autocast's dtype, softmax and sums
    in fp32 (in float64 for float64 inputs)."""
    dtype = _compute_dtype(hidden)
    chunk = chunk or chunk_rows(hidden.device.type, weight.shape)
    # torch.compile would unroll the loop over the many small blocks of a CPU
    apply = torch.compiler.disable(_SummedNats.apply) if hidden.device.type == "cpu" else _SummedNats.apply
    return apply(hidden, weight, targets, weights, n_content, dtype, chunk)


@torch.no_grad()
def token_scores(
    hidden, weight, targets, n_content: int, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the nats of every target (N,), and whether the target is the most likely id (N,).

    Arguments are those of summed_nats. Where nothing is scored, nats are 0 and the second value is False."""
    dtype, nats, hits = _compute_dtype(hidden), [], []
    chunk = chunk or chunk_rows(hidden.device.type, weight.shape)
    block, w = block_rows(hidden.device.type, weight.size(0)), weight.to(dtype)
    for rows, goals in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        for part, t in zip((rows.to(dtype) @ w.T).split(block), goals.split(block), strict=True):
            logp = _log_probs(part, n_content)
            nats.append(torch.where(t >= 0, -logp.gather(1, t.clamp(min=0)[:, None]).squeeze(1), 0))
            hits.append(logp.argmax(1) == t)
    return torch.cat(nats), torch.cat(hits)


def gather_values(values: torch.Tensor, scored_index: torch.Tensor, fill=0) -> torch.Tensor:
    """Selects values (B, T) at the scored positions (B, S), as gather_scored does; `fill` stands at the padding."""
    if scored_index.size(1) == values.size(1):
        return values
    return F.pad(values, (0, 1), value=fill).gather(1, scored_index)


def gather_scored(hidden, targets, scored_index) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects the scored positions, so that the head is computed only there.

    Takes hidden (B, T, C), targets (B, T) and scored_index (B, S), as in a Batch. Returns hidden (N, C) and targets
    (N,) with N = B * S, in the order of scored_index. If S = T, all positions are returned in their order."""
    if scored_index.size(1) < targets.size(1):
        hidden = gather_rows(hidden, scored_index)
    return hidden.flatten(0, 1), gather_values(targets, scored_index, -100).flatten()


def head_of(model: nn.Module) -> torch.Tensor:
    """Returns the weight (V, C) of a model's head for its training loss, detached if the head is frozen.

    The rows of markers, which may still be trained, get no gradient from the head in any case."""
    return model.wte.weight.detach() if model.frozen_head else model.wte.weight


class Objective(nn.Module):
    """A model and its loss as one module, for DDP and torch.compile. Maps the fields of a Batch to summed nats."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets, positions, meta_index, scored_index, reads_from=None, read_until=None):
        """Returns the summed nats () of the scored targets."""
        hidden = self.model(tokens, positions, meta_index, reads_from, read_until)
        hidden, targets = gather_scored(hidden, targets, scored_index)
        return summed_nats(hidden, head_of(self.model), targets, self.model.cfg.content_vocab_size)


class Tally:
    """Running sums of nats from which the reported figures are computed.

    The sums of several batches or processes can be added. `sums` (5,) float64 holds, in this order: the nats of targets
    that are text, their number, their bytes, the nats of <|endoftext|> targets, and their number."""

    def __init__(self, token_bytes: torch.Tensor, device: torch.device):
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.token_bytes = token_bytes.to(device)
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, nats: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds the nats of targets, two tensors of the same shape; negative targets are not scored."""
        nats, targets = nats.flatten().to(self.sums.device).double(), targets.flatten().to(self.sums.device)
        n_bytes = torch.where(targets >= 0, self.token_bytes[targets.clamp(min=0)], 0)
        text, end = n_bytes > 0, (targets >= 0) & (n_bytes == 0)
        for i, part in enumerate((nats * text, text, n_bytes, nats * end, end)):
            self.sums[i] += part.sum()

    def figures(self) -> dict[str, float]:
        """Returns the reported figures.

        loss: nats per scored content token.
        bits_per_byte: nats of the text targets / (ln 2 * bytes of the same targets); <|endoftext|> is not among them.
        endoftext_loss: nats per <|endoftext|> target; None if there was none.
        tokens, bytes: numbers of scored tokens and of their bytes."""
        text_nats, text, n_bytes, end_nats, end = self.sums.tolist()
        return {
            "loss": (text_nats + end_nats) / (text + end),
            "bits_per_byte": text_nats / (math.log(2) * n_bytes),
            "endoftext_loss": end_nats / end if end else None,
            "tokens": int(text + end),
            "bytes": int(n_bytes),
        }
