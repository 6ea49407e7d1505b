"""Computes which positions a position may read, and attention that obeys this rule. Needs only torch.

Every position has two limits, so that

    visible(q, k)  =  reads_from[q] <= k <= q <= read_until[k]

reads_from[q] is the first place that q may read, and read_until[k] the last place that may read k. `limited_attention`
takes the fastest way that is exact. On a CPU, closing markers that read only their own segment are computed apart,
after causal attention for all other positions, in time that is linear in T; if positions are forgotten, a dense mask is
used. On a GPU, FlexAttention skips the blocks of pairs that are hidden.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanometa.meta_attention import blockwise_attention, causal_sdpa


def visible(reads_from: torch.Tensor | None, read_until: torch.Tensor | None, T: int) -> torch.Tensor:
    """Returns which keys each query may read (B, 1, T, T), bool, with queries in rows.

    reads_from, read_until (B, T): as in a Batch; None = no limit."""
    given = reads_from if reads_from is not None else read_until
    place = torch.arange(T, device=given.device)
    query, key = place[:, None], place
    seen = (key <= query).expand(len(given), T, T)
    if reads_from is not None:
        seen = seen & (reads_from[:, :, None] <= key)
    if read_until is not None:
        seen = seen & (query <= read_until[:, None, :])
    return seen[:, None]


def limited_attention(
    reads_from: torch.Tensor | None,
    read_until: torch.Tensor | None,
    T: int,
    dropout_p: float,
    means_at: torch.Tensor | None = None,
) -> Callable | None:
    """Returns a function of q, k, v (B, H, T, D) that computes attention within the limits, or None if there are none.

    It prepares once what all layers share. reads_from, read_until (B, T): as in a Batch; None = no limit. Without
    read_until, the positions that have a limit must have segments reads_from .. own place that do not overlap.
    means_at (B, M): closing positions whose keys and values are replaced by the means of their spans; None = none."""
    if read_until is None and reads_from is None:
        return None
    if means_at is not None:
        return SpanMeans(limited_attention(reads_from, read_until, T, dropout_p), reads_from, means_at)
    device = (reads_from if reads_from is not None else read_until).device.type
    if read_until is None and device == "cpu":
        # scatter_add is not deterministic on a GPU, and a resumed run must repeat exactly
        return SegmentAttention(reads_from, T, dropout_p)
    if device == "cuda" and dropout_p == 0:  # FlexAttention has neither dropout nor, on a CPU, a backward pass
        return BlockAttention(reads_from, read_until, T)
    return DenseAttention(visible(reads_from, read_until, T), dropout_p)


class BlockAttention:
    """Attention by FlexAttention, which computes only the blocks of 128 x 128 pairs that are not all hidden."""

    def __init__(self, reads_from: torch.Tensor | None, read_until: torch.Tensor | None, T: int):
        def may_read(b, h, q, k):
            seen = k <= q
            if reads_from is not None:
                seen = seen & (reads_from[b, q] <= k)
            return seen if read_until is None else seen & (q <= read_until[b, k])

        given = reads_from if reads_from is not None else read_until
        self.mask = create_block_mask(may_read, len(given), None, T, T, device=given.device)

    def __call__(self, q, k, v):
        """Returns the outputs (B, H, T, D)."""
        on_gpu = q.device.type == "cuda" and not torch.compiler.is_compiling()
        return (_compiled_flex() if on_gpu else flex_attention)(q, k, v, block_mask=self.mask)


@functools.cache
def _compiled_flex() -> Callable:
    """Returns the compiled FlexAttention; the eager one would compute all scores."""
    return torch.compile(flex_attention)


class SpanMeans:
    """Attention in which a closing position offers the mean of its span's keys and values in place of its own."""

    def __init__(self, attention: Callable, reads_from: torch.Tensor, closing: torch.Tensor):
        """closing (B, M): places of closing positions, then pads (= T). A span ends before the opening marker, which
        stands directly before the closing one."""
        T = reads_from.size(1)
        first, place = F.pad(reads_from, (0, 1)).gather(1, closing), torch.arange(T, device=closing.device)
        inside = (first[..., None] <= place) & (place < closing[..., None] - 1)  # (B, M, T)
        self.attention, self.closing = attention, closing[:, None, :, None]
        self.shares = (inside / inside.sum(-1, keepdim=True).clamp(min=1))[:, None]  # (B, 1, M, T)

    def __call__(self, q, k, v):
        """Returns the outputs (B, H, T, D)."""
        return self.attention(q, self._replaced(k), self._replaced(v))

    def _replaced(self, x):
        means = (self.shares.to(x.dtype) @ x).to(x.dtype)  # (B, H, M, D)
        longer = F.pad(x, (0, 0, 0, 1))  # the padding index T falls into the extra row
        return longer.scatter(2, self.closing.expand_as(means), means)[:, :, :-1]


class DenseAttention:
    """Attention under a mask of all pairs."""

    def __init__(self, mask: torch.Tensor, dropout_p: float):
        """mask (B, 1, T, T): True where a query (row) may read a key (column)."""
        self.mask, self.dropout_p = mask, dropout_p

    def __call__(self, q, k, v):
        """Returns the outputs (B, H, T, D)."""
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and self.dropout_p == 0:
            return blockwise_attention(q.contiguous(), k.contiguous(), v.contiguous(), self.mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=self.dropout_p)


class SegmentAttention:
    """Causal attention in which some positions, the closing ones, read only their own segment.

    Segments do not overlap, so each place belongs to the segment of at most one closing position. The softmax of all
    closing positions together therefore runs over T scores."""

    def __init__(self, reads_from: torch.Tensor, T: int, dropout_p: float):
        """reads_from (B, T): 0 for a position that reads everything before it."""
        place = torch.arange(T, device=reads_from.device)
        closing = reads_from > 0  # a segment that starts at place 0 hides nothing
        # the closing position of each place is the next one, if its segment reaches back to the place
        following = torch.where(closing, place, T).flip(1).cummin(1).values.flip(1)
        owner = following.clamp(max=T - 1)
        inside = (following < T) & (reads_from.gather(1, owner) <= place)
        self.closing, self.dropout_p = closing[:, None, :, None], dropout_p
        self.owner, self.outside = owner[:, None, :, None], ~inside[:, None, :, None]

    def __call__(self, q, k, v):
        """Returns the outputs (B, H, T, D)."""
        y = causal_sdpa(q, k, v, dropout_p=self.dropout_p)
        D, dtype = q.size(-1), torch.promote_types(q.dtype, torch.float32)
        index = self.owner.expand(*q.shape[:2], -1, -1)  # (B, H, T, 1)
        reader = q.gather(2, index.expand_as(q))  # the query of each place's closing position
        scores = (reader.to(dtype) * k).sum(-1, keepdim=True) / math.sqrt(D)
        scores = scores.masked_fill(self.outside, -math.inf)
        with torch.no_grad():  # the largest score of a segment only keeps the exponentials in range
            largest = torch.full_like(scores, -math.inf).scatter_reduce(2, index, scores, "amax")
            largest = largest.gather(2, index).nan_to_num(neginf=0.0)
        weights = (scores - largest).exp()
        total = torch.zeros_like(weights).scatter_add(2, index, weights)
        shares = weights / total.gather(2, index).masked_fill(self.outside, 1)
        shares = F.dropout(shares, self.dropout_p)
        mixed = torch.zeros_like(v, dtype=dtype).scatter_add(2, index.expand_as(v), shares * v)
        return torch.where(self.closing, mixed.to(y.dtype), y)
