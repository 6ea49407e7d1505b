"""Meta-attention: causal attention among the meta-tokens of a sequence ("Language Modeling with Learned
Meta-Tokens", arXiv 2509.16278, section 2). Needs torch and einops alone, so that the file can be copied.

The paper writes it as attention over all T positions under two masks, the causal one and P with P[i, j] = 0 where i
and j are both meta positions and -inf elsewhere. Only M of the T rows take part, so those rows are gathered, ordinary
causal attention runs over them, and the result is scattered back: gathered positions increase, hence causal order among
the rows is causal order in the sequence, and M^2 scores replace T^2. The other rows, for which a softmax over
nothing is undefined, get exactly 0.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, as in GPT-2. x (B, T, C) -> (B, T, C)."""

    def __init__(self, n_embd: int, n_head: int, bias: bool, dropout: float):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)  # q, k, v of all heads in one product
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x, rotate=None):
        """rotate: q or k (B, H, T, D) -> the same with its positions rotated in; None = no rotary positions."""
        q, k, v = rearrange(self.c_attn(x), "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(rearrange(y, "b h t d -> b t (h d)")))


class MetaAttention(CausalSelfAttention):
    """Causal self-attention among the meta-tokens only. x (B, T, C), meta_index (B, M) -> (B, T, C).

    meta_index holds each row's meta positions in increasing order; rows with fewer than M are padded at the end with T.
    All rows of the result that are no meta position are exactly 0. M may be 0."""

    def forward(self, x, meta_index, rotate=None):
        """rotate: as above, for the gathered rows (B, H, M, D)."""
        y = super().forward(gather_rows(x, meta_index), rotate)  # (B, M, C)
        return scatter_rows(y, meta_index, x.size(1))


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, T, C), index (B, M) in [0, T] -> (B, M, C); a pad, T, reads zeros.

    Pads come last, so no real row attends to them, but a weight of 0 would not silence what is not a number."""
    T = x.size(1)
    rows = x.gather(1, index.clamp(max=T - 1)[..., None].expand(-1, -1, x.size(2)))
    return torch.where((index < T)[..., None], rows, 0)


def scatter_rows(y: torch.Tensor, index: torch.Tensor, T: int) -> torch.Tensor:
    """y (B, M, C), index (B, M) in [0, T] -> (B, T, C) with y's rows at their index, 0 elsewhere, pads dropped."""
    out = y.new_zeros(y.size(0), T + 1, y.size(2))  # row T takes the pads
    return out.scatter(1, index[..., None].expand_as(y), y)[:, :T]
