"""Meta-attention: causal attention among the meta-tokens of a sequence ("Language Modeling with Learned
Meta-Tokens", arXiv 2509.16278, section 2). Needs torch and einops alone, so that the file can be copied.

The paper writes it as attention over all T positions under two masks, the causal one and P with P[i, j] = 0 where i
and j are both meta positions and -inf elsewhere. Only M of the T rows take part, so those rows are gathered, ordinary
causal attention runs over them, and the result is added back in place: gathered positions increase, hence causal order
among the rows is causal order in the sequence, and M^2 scores replace T^2. The other rows, for which a softmax over
nothing is undefined, get exactly 0 added.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, as in GPT-2. x (B, T, C) -> (B, T, C)."""

    def __init__(self, n_embd: int, n_head: int, bias: bool, dropout: float, window: int | None = None):
        """window: how many keys a query reads, the last ones, its own included; None: all up to its own."""
        super().__init__()
        self.n_head, self.dropout, self.window = n_head, dropout, window
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)  # q, k, v of all heads in one product
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x, rotate=None, attend=None):
        """rotate: q or k (B, H, T, D) -> the same with its positions rotated in; None = no rotary positions.
        attend: q, k, v (B, H, T, D) -> (B, H, T, D) in place of causal attention, for a cache that has more keys."""
        q, k, v = rearrange(self.c_attn(x), "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if attend is not None:
            y = attend(q, k, v)
        else:
            y = causal_sdpa(q, k, v, dropout_p=self.dropout if self.training else 0.0, window=self.window)
        return self.resid_dropout(self.c_proj(rearrange(y, "b h t d -> b t (h d)")))


class MetaAttention(CausalSelfAttention):
    """The residual sub-layer x + attention(norm(x)) among the meta-tokens only; all other rows of x stay as they are.

    x (B, T, C), meta_index (B, M) -> (B, T, C). meta_index holds each row's meta positions in increasing order; a row
    with fewer than M is padded at the end with T. M may be 0."""

    def forward(self, x, meta_index, norm, rotate=None, attend=None):
        """norm: a LayerNorm or the like, which works row by row; rotate and attend: as above, for the gathered rows
        (B, H, M, D)."""
        rows = gather_rows(x, meta_index)  # (B, M, C): nothing below touches more than these
        return add_rows(x, super().forward(norm(rows), rotate, attend), meta_index)


def causal_sdpa(q, k, v, dropout_p, window=None):
    """Causal scaled dot-product attention: q, k, v (B, H, T, D) -> (B, H, T, D).

    window: each query reads the last `window` keys up to its own; None: all of them."""
    mask = recent(q.size(2), window, q.device)
    how = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout_p}
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) < 256:
        # with few rows, as the meta-tokens are, the bf16 kernel of torch 2.13 takes 1.5 to 4 times as long as fp32's
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **how)
    return F.scaled_dot_product_attention(q, k, v, **how)


def recent(T: int, window: int | None, device) -> torch.Tensor | None:
    """Returns which of T keys (columns) each of T queries reads, (T, T) bool; None: all up to its own."""
    if window is None or T <= window:
        return None
    return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - window)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, T, C), index (B, M) in [0, T] -> (B, M, C); a pad, T, reads zeros.

    Pads come last, so no real row attends to them, but a weight of 0 would not silence what is not a number."""
    B, T, C = x.shape
    flat = index.clamp(max=T - 1) + T * torch.arange(B, device=index.device)[:, None]
    # torch.gather would save all of x for its backward, index_select saves its shape
    rows = x.flatten(0, 1).index_select(0, flat.flatten()).view(B, -1, C)
    return torch.where((index < T)[..., None], rows, 0)


def add_rows(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, T, C), y (B, M, C), index (B, M) in [0, T] -> x with y's rows added at their index, pads dropped."""
    T = x.size(1)
    y = torch.where((index < T)[..., None], y, 0).to(x.dtype)
    return x.scatter_add(1, index.clamp(max=T - 1)[..., None].expand_as(y), y)
