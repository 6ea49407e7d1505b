"""Reference for meta-attention: follows the paper's definition, one query and one key at a time."""

import math

import torch


def meta_attention(x, is_meta, c_attn, c_proj, n_head, window=None):
    """Returns the meta-attention output (B, T, C) of x (B, T, C), with the linear layers c_attn and c_proj.

    Query i attends to key j if and only if j <= i and both are meta positions, is_meta (B, T) bool. With a window it
    attends only to the last `window` of these keys. All other positions get 0.
    """
    B, T, C = x.shape
    D = C // n_head
    out = torch.zeros_like(x)
    for b in range(B):
        q, k, v = c_attn(x[b]).split(C, dim=-1)  # (T, C) each
        for i in range(T):
            if not is_meta[b, i]:
                continue
            keys = [j for j in range(i + 1) if is_meta[b, j]]
            keys = keys if window is None else keys[-window:]
            heads = []
            for h in range(n_head):
                cols = slice(h * D, (h + 1) * D)
                scores = torch.stack([q[i, cols] @ k[j, cols] / math.sqrt(D) for j in keys])
                weights = torch.exp(scores) / torch.exp(scores).sum()
                heads.append(sum(w * v[j, cols] for w, j in zip(weights, keys, strict=True)))
            out[b, i] = c_proj(torch.cat(heads))
    return out


def meta_index(is_meta):
    """Returns the increasing meta positions (B, M) of is_meta (B, T) bool, padded with T."""
    T = is_meta.shape[1]
    rows = [[j for j in range(T) if row[j]] for row in is_meta]
    M = max(map(len, rows))
    return torch.tensor([row + [T] * (M - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), M)
