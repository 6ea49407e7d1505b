"""The attention layers of a block: causal self-attention, meta-attention among the meta-tokens of a sequence, and two
controls for it.

Meta-attention is the second attention of "Language Modeling with Learned Meta-Tokens" (arXiv 2509.16278, section 2).
This file needs only torch and einops, so you can copy it into another project.

The paper defines meta-attention over all T positions under two additive masks: the causal mask, and a mask P with
P[i, j] = 0 if i and j are both meta positions and -inf otherwise. Only M of the T rows take part. This implementation
therefore gathers those M rows, runs ordinary causal attention over them, and adds the result back to the same rows:
1. Meta positions are sorted, so causal order among the gathered rows is causal order in the sequence.
2. The layer computes M^2 scores instead of T^2.
3. The softmax of a row that may attend to nothing is undefined; here such a row gets exactly 0 added.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, as in GPT-2. Maps x (B, T, C) to (B, T, C)."""

    def __init__(self, n_embd: int, n_head: int, bias: bool, dropout: float, window: int | None = None):
        """window: number of most recent keys that a query attends to, its own included; None for all previous keys."""
        super().__init__()
        self.n_head, self.dropout, self.window = n_head, dropout, window
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)  # query, key, value projections of all heads, batched
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)  # output projection
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x, rotate=None, attend=None):
        """Returns the attention output (B, T, C) for x (B, T, C).

        rotate: function that applies rotary positions to q or k (B, H, T, D); None for no rotary positions.
        attend: function of q, k, v (B, H, T, D) that replaces causal attention, for example to read a KV cache."""
        return self.resid_dropout(self.c_proj(self.mix(self.c_attn(x), rotate, attend)))

    def mix(self, qkv, rotate=None, attend=None):
        """Returns the outputs of all heads (B, T, C) for the projections qkv (B, T, 3C), as `forward` does."""
        q, k, v = self.heads(qkv, rotate)
        if attend is not None:
            y = attend(q, k, v)
        else:
            y = causal_sdpa(q, k, v, dropout_p=self.dropout if self.training else 0.0, window=self.window)
        return rearrange(y, "b h t d -> b t (h d)")  # concatenate the heads

    def heads(self, qkv, rotate=None):
        """Returns q, k and v (B, H, T, D), q and k rotated, of the projections qkv (B, T, 3C)."""
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        return (q, k, v) if rotate is None else (rotate(q), rotate(k), v)


class MetaAttention(CausalSelfAttention):
    """Causal self-attention among the meta-tokens only, with its residual connection: x + attention(norm(x)).

    All other rows of x are returned unchanged."""

    def forward(self, x, meta_index, norm, rotate=None, attend=None):
        """Returns x (B, T, C) with the attention output added to the rows listed in meta_index (B, M).

        meta_index: the meta positions of each sequence in increasing order. A sequence with fewer than M of them is
            padded at the end with T. M may be 0.
        norm: a LayerNorm, or any module that normalizes each row independently.
        rotate, attend: as in CausalSelfAttention, for the gathered rows (B, H, M, D)."""
        rows = gather_rows(x, meta_index)  # (B, M, C); everything below costs O(M) rows, not O(T)
        return add_rows(x, super().forward(norm(rows), rotate, attend), meta_index)


class MetaMeanAttention(CausalSelfAttention):
    """Meta-attention in which every other row gets the mean of the values up to its own, with a residual connection.

    A dense implementation computes this if its causal mask and its mask P add -1e9 each, where the paper has -inf. A
    row of P that is not a meta position then adds the same -1e9 to all scores. In fp32, where neighboring numbers near
    1e9 differ by 64, scores within +-32 vanish in the sum, so the softmax is uniform over all positions up to the row's
    own; the future has -2e9 and weight 0. Rows of meta positions have scores without -1e9 and are those of
    MetaAttention. Only the output is the same: automatic differentiation of the dense implementation also sends a
    gradient through the scores that vanished. Here, only the values of such a row get a gradient."""

    def forward(self, x, meta_index, norm, rotate=None, attend=None, mean=None):
        """Returns x (B, T, C) with the output of attention or of the mean added to every row.

        meta_index, norm, rotate, attend: as in MetaAttention.
        mean: function of the values (B, T, C) that replaces running_mean, to continue sequences whose start it has
            read before."""
        qkv = self.c_attn(norm(x))
        y = running_mean(qkv.chunk(3, dim=-1)[2]) if mean is None else mean(qkv.chunk(3, dim=-1)[2])
        y = replace_rows(y, self.mix(gather_rows(qkv, meta_index), rotate, attend), meta_index)
        return x + self.resid_dropout(self.c_proj(y))


class ReadMetaAttention(CausalSelfAttention):
    """Attention of every row to the meta-tokens up to its own, with a residual connection: the mask P hides columns.

    Rows before the first meta-token have nothing to read. They get exactly 0 added, also if c_proj has a bias."""

    def forward(self, x, meta_index, norm, rotate=None, attend=None):
        """Returns x (B, T, C) with the attention output added to every row that has a meta-token at or before it.

        meta_index, norm: as in MetaAttention.
        rotate: as in CausalSelfAttention, for all rows (B, H, T, D).
        attend: function of q (B, H, T, D), k and v (B, H, M, D) that replaces read_sdpa."""
        q, k, v = self.heads(self.c_attn(norm(x)), rotate)
        k, v = (gather_heads(part, meta_index) for part in (k, v))
        if attend is not None:
            y, reads = attend(q, k, v)
        else:
            y, reads = read_sdpa(q, k, v, meta_index, dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(rearrange(y, "b h t d -> b t (h d)"))
        return x + self.resid_dropout(torch.where(reads[..., None], y, 0))


def running_mean(values: torch.Tensor) -> torch.Tensor:
    """Returns for each row the mean of the rows of values (B, T, C) up to and including it, in at least fp32."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    counts = torch.arange(1, values.size(1) + 1, device=values.device, dtype=dtype)
    return values.cumsum(1, dtype=dtype) / counts[:, None]


def read_sdpa(q, k, v, index, dropout_p):
    """Computes attention of all T queries (B, H, T, D) to the keys k, v (B, H, M, D) at the positions index (B, M).

    Returns the outputs (B, H, T, D), and whether a query has a key to read (B, T)."""
    k, v, mask, reads = with_empty_key(k, v, index, q.size(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p), reads


def with_empty_key(k, v, index, T):
    """Appends one key and value of zeros to k and v (B, H, M, D), for the queries that have nothing else to read.

    The softmax of such a query would be undefined, and its gradient NaN.
    Returns the longer k and v, which keys each of T queries reads (B, 1, T, M + 1), and whether it reads any of the
    given ones (B, T), whose positions are index (B, M)."""
    seen = index[:, None] <= torch.arange(T, device=index.device)[:, None]  # (B, T, M); the padding T is never seen
    reads = seen.any(-1)
    mask = torch.cat((seen, ~reads[..., None]), dim=-1)
    return F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), mask[:, None], reads


def causal_sdpa(q, k, v, dropout_p, window=None):
    """Computes causal scaled dot-product attention of q, k, v (B, H, T, D). Returns (B, H, T, D).

    window: number of most recent keys that a query attends to, its own included; None for all previous keys."""
    mask = recent(q.size(2), window, q.device)
    bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if bf16_on_cpu and torch.is_grad_enabled() and mask is None and dropout_p == 0:
        # contiguous here, so that the backward pass keeps these and not the projection's output, and copies nothing
        return blockwise_attention(q.contiguous(), k.contiguous(), v.contiguous())
    options = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout_p}
    if bf16_on_cpu and q.size(2) < 256:
        # on few rows, such as the meta-tokens, torch 2.13's bf16 kernel takes 1.5 to 4 times as long as its fp32 kernel
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    return F.scaled_dot_product_attention(q, k, v, **options)


# ------------------------------------------------------- causal attention in plain products, for bf16 on a CPU

BLOCK = 128  # queries at a time: more would compute more hidden scores, and fewer would make the products slow


# an operator of its own, because torch.compile miscompiles the loop over the blocks (seen with torch 2.13)
@torch.library.custom_op("nanometa::blockwise_attention", mutates_args=())
def blockwise_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes causal attention of q, k, v (B, H, T, D), block by block of queries. Returns (B, H, T, D).

    mask (B, 1, T, T): True where a query (row) may read a key; it must not show the future. None = all earlier keys.

    In bf16 on a CPU, forward and backward together take 0.5 to 0.8 times as long as torch's kernel, whose backward does
    not use the processor's bf16 instructions (bench.py --only layer). Like the kernel, this function keeps no attention
    weights for the backward pass. Unlike the kernel, it rounds the scores to bf16 before the softmax."""
    shape, scale = q.shape, q.size(3) ** -0.5
    q, k, v = (x.flatten(0, 1) for x in (q * scale, k, v))  # (N, T, D) with N = B * H
    out = torch.empty_like(q)
    for rows, keys, weights in _blocks(q, k, mask):
        torch.bmm(weights, v[:, keys], out=out[:, rows])
    return out.view(shape)


@torch.library.custom_op("nanometa::blockwise_attention_backward", mutates_args=())
def _blockwise_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of q, k and v for the gradient (B, H, T, D) of the output."""
    shape, scale = q.shape, q.size(3) ** -0.5
    q, k, v, grad = (x.flatten(0, 1) for x in (q * scale, k, v, grad))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, weights in _blocks(q, k, mask):
        d_weights = grad[:, rows] @ v[:, keys].mT
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        torch.bmm(d_scores, k[:, keys], out=dq[:, rows])
        dk[:, keys].baddbmm_(d_scores.mT, q[:, rows])
        dv[:, keys].baddbmm_(weights.mT, grad[:, rows])
    return tuple(x.view(shape) for x in (dq.mul_(scale), dk, dv))


def _blocks(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None):
    """Yields for each block of queries the slice of its rows, the slice of the keys that they may see, and the
    attention weights (N, rows, keys) of scaled q (N, T, D) and k (N, T, D), under mask (B, 1, T, T)."""
    future = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    for start in range(0, q.size(1), BLOCK):
        rows, keys = slice(start, start + BLOCK), slice(start + BLOCK)
        scores = q[:, rows] @ k[:, keys].mT
        n = scores.size(1)
        if mask is None:
            scores[:, :, start:] += future[:n, :n]
        else:
            by_head = scores.view(mask.size(0), -1, n, scores.size(2))  # (B, H, rows, keys)
            by_head.masked_fill_(~mask[:, :, rows, keys], -math.inf)
        yield rows, keys, scores.softmax(-1)


blockwise_attention.register_fake(lambda q, k, v, mask=None: q.new_empty(q.shape))
_blockwise_attention_backward.register_fake(
    lambda grad, q, k, v, mask=None: tuple(x.new_empty(x.shape) for x in (q, k, v))
)
blockwise_attention.register_autograd(
    lambda ctx, grad: (*_blockwise_attention_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def recent(T: int, window: int | None, device) -> torch.Tensor | None:
    """Returns the sliding-window causal mask (T, T) of T queries (rows) and T keys (columns); True means visible.

    Returns None if the window hides nothing, so that the caller can use the faster is_causal path."""
    if window is None or T <= window:
        return None
    return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - window)


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the rows (B, M, C) of x (B, T, C) at index (B, M), with values in [0, T]; the padding index T reads 0.

    No real row attends to the padding, which comes last. Yet it must be finite: an attention weight of 0 does not
    cancel a NaN."""
    B, T, C = x.shape
    flat = index.clamp(max=T - 1) + T * torch.arange(B, device=index.device)[:, None]
    # index_select saves only the shape of x for its backward; torch.gather would save all of x
    rows = x.flatten(0, 1).index_select(0, flat.flatten()).view(B, -1, C)
    return torch.where((index < T)[..., None], rows, 0)


def gather_heads(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the rows (B, H, M, D) of x (B, H, T, D) at index (B, M), as gather_rows does."""
    rows = gather_rows(rearrange(x, "b h t d -> b t (h d)"), index)
    return rearrange(rows, "b m (h d) -> b h m d", h=x.size(1))


def replace_rows(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns x (B, T, C), in y's dtype, with the rows at index (B, M) replaced by those of y (B, M, C)."""
    longer = F.pad(x.to(y.dtype), (0, 0, 0, 1))  # the padding index T falls into the extra row
    return longer.scatter(1, index[..., None].expand_as(y), y)[:, :-1]


def add_rows(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns x (B, T, C) with the rows of y (B, M, C) added at index (B, M), except at the padding index T."""
    T = x.size(1)
    y = torch.where((index < T)[..., None], y, 0).to(x.dtype)
    return x.scatter_add(1, index.clamp(max=T - 1)[..., None].expand_as(y), y)
