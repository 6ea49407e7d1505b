"""The loss: nats of the scored targets, never holding more than a slice of the logits; and what is reported of it."""

import math

import torch
import torch.nn as nn

CHUNK = 2048  # rows of logits at a time: (2048, 50304) fp32 is 0.4 GB


def _chunk_logits(h: torch.Tensor, weight: torch.Tensor, n_content: int) -> torch.Tensor:
    """h (N, C), weight (V, C) in one dtype -> logits (N, V) fp32; markers and spare ids (>= n_content) cannot be
    predicted in any arm, so theirs are -inf."""
    logits = (h @ weight.T).float() if h.dtype != torch.float64 else h @ weight.T
    logits[:, n_content:] = -math.inf
    return logits


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _SummedNats(torch.autograd.Function):
    """Sum of cross-entropies of hidden @ weight.T, with the gradients made in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, n_content, dtype, chunk):
        w = weight.to(dtype)
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        grads = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if grads else None
        d_weight = torch.zeros_like(weight, dtype=sum_dtype) if grads else None
        for start in range(0, hidden.size(0), chunk):
            rows = slice(start, start + chunk)
            h, t = hidden[rows].to(dtype), targets[rows].clamp(min=0)[:, None]
            scored = (targets[rows] >= 0)[:, None]
            logits = _chunk_logits(h, w, n_content)
            lse = logits.logsumexp(-1, keepdim=True)
            total += torch.where(scored, lse - logits.gather(1, t), 0).sum()
            if grads:  # d nats / d logits = softmax - onehot
                d = (logits - lse).exp_()
                d.scatter_add_(1, t, torch.full_like(lse, -1))
                d = torch.where(scored, d, 0).to(dtype)
                d_hidden[rows] = (d @ w).to(hidden.dtype)
                d_weight += d.T @ h
        if grads:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_weight * grad.to(d_weight.dtype), None, None, None, None


def summed_nats(hidden, weight, targets, n_content: int, chunk: int = CHUNK) -> torch.Tensor:
    """Nats of all scored targets, summed, with gradients.

    hidden (N, C), weight (V, C), targets (N,), negative where nothing is scored -> scalar, fp32. The products run in
    autocast's dtype, softmax and sums in fp32 (float64 stays float64)."""
    return _SummedNats.apply(hidden, weight, targets, n_content, _compute_dtype(hidden), chunk)


@torch.no_grad()
def token_nats(hidden, weight, targets, n_content: int, chunk: int = CHUNK) -> torch.Tensor:
    """Nats of every target (N,), 0 where nothing is scored; shapes as in summed_nats."""
    dtype = _compute_dtype(hidden)
    out = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = _chunk_logits(h.to(dtype), weight.to(dtype), n_content)
        nats = logits.logsumexp(-1) - logits.gather(1, t.clamp(min=0)[:, None]).squeeze(1)
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
        self.token_bytes = token_bytes.to(device)
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, nats: torch.Tensor, targets: torch.Tensor) -> None:
        """nats and targets of one shape; a negative target is not scored."""
        nats, targets = nats.flatten().double(), targets.flatten()
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
