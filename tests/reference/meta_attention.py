"""Reference for meta-attention: follows the paper's definition, one query and one key at a time."""

import math

import torch


def meta_attention(x, is_meta, c_attn, c_proj, n_head, window=None, others="nothing"):
    """Returns the meta-attention output (B, T, C) of x (B, T, C), with the linear layers c_attn and c_proj.

    Query i attends to key j if and only if j <= i and both are meta positions, is_meta (B, T) bool. With a window it
    attends only to the last `window` of these keys. All other positions get 0; with others="mean" the mean of the
    values of all positions up to theirs; with others="read" they attend to the same keys as a meta position would,
    and get 0 if there are none.
    """
    B, T, C = x.shape
    D = C // n_head
    out = torch.zeros_like(x)
    for b in range(B):
        q, k, v = c_attn(x[b]).split(C, dim=-1)  # (T, C) each
        for i in range(T):
            if not is_meta[b, i] and others == "mean":
                out[b, i] = c_proj(v[: i + 1].mean(0))
            keys = [j for j in range(i + 1) if is_meta[b, j]]
            if not keys or not (is_meta[b, i] or others == "read"):
                continue
            keys = keys if window is None else keys[-window:]
            heads = []
            for h in range(n_head):
                cols = slice(h * D, (h + 1) * D)
                scores = torch.stack([q[i, cols] @ k[j, cols] / math.sqrt(D) for j in keys])
                weights = torch.exp(scores) / torch.exp(scores).sum()
                heads.append(sum(w * v[j, cols] for w, j in zip(weights, keys, strict=True)))
            out[b, i] = c_proj(torch.cat(heads))
    return out


def finite_fill_attention(x, is_meta, c_attn, c_proj, n_head, fill=-1e9, absorbed=False):
    """Returns the attention output (B, T, C) of x (B, T, C) over all positions under two finite masks, in x's dtype.

    The causal mask adds `fill` to the score of a later key, and the mask P adds `fill` unless both positions are meta
    positions, is_meta (B, T) bool. In fp32, -1e9 absorbs scores within +-32: they do not affect the output. Yet their
    gradient is that of a sum, as if they did; with absorbed=True, the scores of other queries have no gradient."""
    B, T, C = x.shape
    q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in c_attn(x).split(C, dim=-1))
    scores = q @ k.mT / math.sqrt(C // n_head)
    if absorbed:
        scores = torch.where(is_meta[:, None, :, None], scores, scores.detach())
    scores = scores + fill * torch.ones(T, T, dtype=x.dtype).triu(1)
    scores = scores + fill * (~(is_meta[:, :, None] & is_meta[:, None, :]))[:, None].to(x.dtype)
    return c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


def meta_index(is_meta):
    """Returns the increasing meta positions (B, M) of is_meta (B, T) bool, padded with T."""
    T = is_meta.shape[1]
    rows = [[j for j in range(T) if row[j]] for row in is_meta]
    M = max(map(len, rows))
    return torch.tensor([row + [T] * (M - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), M)
