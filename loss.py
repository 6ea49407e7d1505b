"""The loss: nats of the scored targets, never holding more than a slice of the logits; and what is reported of it."""

import math

import torch
import torch.nn as nn


def chunk_rows(device: str) -> int:
    """Rows of logits at a time on a type of device. Measured on 2 cores, 8192 x 192 x 4160, bf16: 84 ms with 512 rows
    (they stay in the cache), 164 with 2048, 282 without chunks. GPUs want larger products; (4096, 50304) fp32 is
    0.8 GB."""
    return 512 if device == "cpu" else 4096


def _log_probs(h: torch.Tensor, w: torch.Tensor, n_content: int) -> torch.Tensor:
    """h (N, C), w (V, C) of one dtype -> log-softmax (N, V), at least fp32. Markers and spare ids (>= n_content) cannot
    be predicted, in any arm: their log-probability is -inf."""
    logits = h @ w.T
    logits[:, n_content:] = -math.inf
    return torch.log_softmax(logits, -1, dtype=_sum_dtype(h.dtype))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _SummedNats(torch.autograd.Function):
    """Sum of cross-entropies of hidden @ weight.T, with the gradients made in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, n_content, dtype, chunk):
        w = weight.to(dtype)
        total = torch.zeros((), dtype=_sum_dtype(dtype), device=hidden.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=_sum_dtype(dtype))
        for start in range(0, hidden.size(0), chunk):
            rows = slice(start, start + chunk)
            h, t = hidden[rows].to(dtype), targets[rows].clamp(min=0)[:, None]
            scored = (targets[rows] >= 0)[:, None]
            logp = _log_probs(h, w, n_content)
            total -= torch.where(scored, logp.gather(1, t), 0).sum()
            d = logp.exp_()  # d nats / d logits = softmax - onehot
            d.scatter_add_(1, t, -torch.ones_like(t, dtype=d.dtype))
            d = d.to(dtype)
            # rows without a target drop out of the narrow products, cheaper than out of d
            d_hidden[rows] = torch.where(scored, d @ w, 0).to(hidden.dtype)
            d_weight += d.T @ torch.where(scored, h, 0)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_weight * grad.to(d_weight.dtype), None, None, None, None


def summed_nats(hidden, weight, targets, n_content: int, chunk: int | None = None) -> torch.Tensor:
    """Nats of all scored targets, summed, with gradients.

    hidden (N, C), weight (V, C), targets (N,), negative where nothing is scored -> scalar, fp32. The products run in
    autocast's dtype, softmax and sums in fp32 (float64 stays float64)."""
    chunk = chunk or chunk_rows(hidden.device.type)
    return _SummedNats.apply(hidden, weight, targets, n_content, _compute_dtype(hidden), chunk)


@torch.no_grad()
def token_nats(hidden, weight, targets, n_content: int, chunk: int | None = None) -> torch.Tensor:
    """Nats of every target (N,), 0 where nothing is scored; shapes as in summed_nats."""
    dtype, chunk = _compute_dtype(hidden), chunk or chunk_rows(hidden.device.type)
    out = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        nats = -_log_probs(h.to(dtype), weight.to(dtype), n_content).gather(1, t.clamp(min=0)[:, None]).squeeze(1)
        out.append(torch.where(t >= 0, nats, 0))
    return torch.cat(out)


class Objective(nn.Module):
    """A model and its loss as one module, which is what DDP and torch.compile wrap -> summed nats."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets, positions, meta_index):
        hidden = self.model(tokens, positions, meta_index)
        n_content = self.model.cfg.content_vocab_size
        return summed_nats(hidden.flatten(0, 1), self.model.wte.weight, targets.flatten(), n_content)


class Tally:
    """Sums of nats that become the reported figures; tallies of batches and processes add up to the same figures.

    `sums` (5,) float64: nats and count of targets that have bytes, those bytes, nats and count of <|endoftext|>."""

    def __init__(self, token_bytes: torch.Tensor, device: torch.device):
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.token_bytes = token_bytes.to(device)
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, nats: torch.Tensor, targets: torch.Tensor) -> None:
        """nats and targets of one shape; a negative target is not scored."""
        nats, targets = nats.flatten().to(self.sums.device).double(), targets.flatten().to(self.sums.device)
        n_bytes = torch.where(targets >= 0, self.token_bytes[targets.clamp(min=0)], 0)
        text, end = n_bytes > 0, (targets >= 0) & (n_bytes == 0)
        for i, part in enumerate((nats * text, text, n_bytes, nats * end, end)):
            self.sums[i] += part.sum()

    def figures(self) -> dict[str, float]:
        """loss: nats per scored content token; bits_per_byte: nats of targets that have bytes / (ln 2 x exactly those
        bytes); endoftext_loss: nats per <|endoftext|> (None if there was none); tokens, bytes: what was scored."""
        text_nats, text, n_bytes, end_nats, end = self.sums.tolist()
        return {
            "loss": (text_nats + end_nats) / (text + end),
            "bits_per_byte": text_nats / (math.log(2) * n_bytes),
            "endoftext_loss": end_nats / end if end else None,
            "tokens": int(text + end),
            "bytes": int(n_bytes),
        }
