"""Rotary position embeddings, and their extensions to windows longer than the trained one.

The base method is RoPE (Su et al., "RoFormer", arXiv 2104.09864) in the half-split layout of Llama and NeoX: pair d
consists of dimensions d and d + D/2 and rotates by a fixed angle per position. A model trained at length
L = block_size / rope_factor can read longer texts if the rotation is slowed down by a scale s. The scale is
rope_factor, or, with rope_dynamic, max(1, length read so far / L). rope_scaling selects how s changes the rotation:

none  no change
pi    position interpolation (arXiv 2306.15595): every pair rotates s times slower
ntk   NTK-aware: the base is multiplied by s^(D / (D - 2)), so the slowest pair rotates s times slower and the fastest
      is unchanged
yarn  YaRN (arXiv 2309.00071): pairs with fewer than yarn_beta_slow rotations in L are interpolated, pairs with more
      than yarn_beta_fast rotations are unchanged, with a linear ramp between them. Attention scores are multiplied by
      (0.1 ln s + 1)^2.

With s = 1 every method equals plain RoPE bit for bit. The ramp of YaRN is linear in the pair's index, as in YaRN's own
code and its ports; with yarn_ramp=paper it is linear in the number of rotations, as in equation 18 of the paper.
"""

import math

import torch
import torch.nn.functional as F

from nanometa.config import GPTConfig
from nanometa.meta_attention import gather_rows, recent, with_empty_key


def rope_speeds(cfg: GPTConfig, scale: torch.Tensor) -> torch.Tensor:
    """Returns the rotation of each pair of dimensions in radians per position, (..., D / 2) fp32, for scale (...)."""
    D = cfg.n_embd // cfg.n_head
    d = torch.arange(0, D, 2, device=scale.device, dtype=torch.float32)
    plain, s = cfg.rope_theta ** (-d / D), scale[..., None]
    if cfg.rope_scaling == "pi":
        return plain / s
    if cfg.rope_scaling == "ntk":
        return plain * s ** (-d / (D - 2))  # (theta s^(D / (D - 2)))^(-d / D)
    if cfg.rope_scaling == "yarn":
        return plain / s + _kept_share(cfg, plain) * (plain - plain / s)
    return plain


def _kept_share(cfg: GPTConfig, plain: torch.Tensor) -> torch.Tensor:
    """Returns YaRN's gamma (D / 2,): 0 where a pair is fully interpolated, 1 where it keeps its plain speed."""
    L, fast, slow, half = cfg.original_block_size, cfg.yarn_beta_fast, cfg.yarn_beta_slow, len(plain)
    if cfg.yarn_ramp == "paper":
        return ((L * plain / (2 * math.pi) - slow) / (fast - slow)).clamp(0, 1)

    def pair(turns: float) -> float:
        return half * math.log(L / (2 * math.pi * turns)) / math.log(cfg.rope_theta)

    # YaRN's code clamps the bounds to the head size D, although there are only D / 2 pairs; this code does the same
    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), 2 * half - 1)
    numbers = torch.arange(half, device=plain.device, dtype=torch.float32)
    return 1 - ((numbers - low) / max(high - low, 0.001)).clamp(0, 1)


def attention_factor(cfg: GPTConfig, scale: torch.Tensor) -> torch.Tensor:
    """Returns the factor (...) that multiplies q and also k, for scale (...). It is 1 except for YaRN.

    yarn_attention_factor replaces YaRN's 0.1 ln s + 1, as attention_factor does in Hugging Face transformers, so 1.0
    turns the temperature off. In YaRN's own code, attn_factor multiplies 0.1 ln s + 1 instead, so there 1.0 (also the
    paper's value) leaves the temperature on."""
    if cfg.rope_scaling != "yarn":
        return torch.ones_like(scale)
    if cfg.yarn_attention_factor is not None:
        return torch.full_like(scale, cfg.yarn_attention_factor)
    return 0.1 * scale.log() + 1


def rope_tables(positions: torch.Tensor, cfg: GPTConfig, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tables cos and sin, (B, 1, T, D / 2) each, for positions (B, T) and a scale () or (B,).

    The tables are always fp32, because bf16 cannot represent every integer above 256. Both are multiplied by the
    attention factor, so that a score q . k is multiplied by its square."""
    angles = positions[:, None, :, None].float() * rope_speeds(cfg, scale)[..., None, None, :]
    factor = attention_factor(cfg, scale)[..., None, None, None]
    return angles.cos() * factor, angles.sin() * factor


def fixed_scale(cfg: GPTConfig, device: torch.device) -> torch.Tensor:
    """Returns the scale () fp32 of a model whose scale does not depend on the text."""
    return torch.full((), cfg.rope_factor, device=device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x (B, H, T, D) with each pair of dimensions d, d + D/2 rotated by cos and sin (B, 1, T, D / 2).

    The rotation is computed in fp32 and returned in x's dtype."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


# ------------------------------------------------------------------- dynamic scale: it grows with the text


def attend_dynamic(q, k, v, positions, lengths, cfg: GPTConfig, window: int | None = None):
    """Computes causal attention (B, H, T, D) in which each query sets the rotary scale of itself and of its keys.

    The scale depends on the length read up to and including the query's token. A text therefore gives the same result
    whether it is read at once or token by token, and no output depends on later tokens.

    q, k, v (B, H, T, D): not rotated.
    positions (B, T): the position by which each token is rotated.
    lengths (B, T): the length of the text up to and including each token.
    window: number of most recent keys that a query attends to, its own included; None for all previous keys."""
    T = q.size(2)
    # while no text of the batch exceeds the trained length, the scale is 1: plain RoPE, all queries at once
    early = int((lengths <= cfg.original_block_size).all(0).cumprod(0).sum())
    tables = rope_tables(positions[:, :early], cfg, torch.ones((), device=q.device))
    rotated = (rotate(x[:, :, :early], *tables) for x in (q, k))
    mask = recent(early, window, q.device)
    out = [F.scaled_dot_product_attention(*rotated, v[:, :, :early], attn_mask=mask, is_causal=mask is None)]
    for t in range(early, T):
        keys, own = slice(max(0, t + 1 - (window or T)), t + 1), slice(t, t + 1)
        places = (positions[:, own], positions[:, keys], lengths[:, t])
        out.append(attend_one(q[:, :, own], k[:, :, keys], v[:, :, keys], *places, cfg))
    return torch.cat(out, dim=2)


def read_dynamic(q, k, v, index, positions, lengths, cfg: GPTConfig):
    """Computes what meta_attention.read_sdpa does, with the rotary scale of attend_dynamic.

    q (B, H, T, D), k and v (B, H, M, D): not rotated; index (B, M): the positions of the keys in the window.
    positions, lengths (B, T): as in attend_dynamic, of all T rows."""
    k, v, mask, reads = with_empty_key(k, v, index, q.size(2))
    k_positions = F.pad(gather_rows(positions[..., None], index).squeeze(-1), (0, 1))
    out = []
    for t in range(q.size(2)):
        own = slice(t, t + 1)
        places = (positions[:, own], k_positions, lengths[:, t])
        out.append(attend_one(q[:, :, own], k, v, *places, cfg, mask[:, :, own]))
    return torch.cat(out, dim=2), reads


def attend_one(q, k, v, q_positions, k_positions, lengths, cfg: GPTConfig, mask=None):
    """Computes the attention output (B, H, 1, D) of one query per text, the last one, under that text's dynamic scale.

    q (B, H, 1, D), k and v (B, H, S, D): not rotated; their positions are q_positions (B, 1) and k_positions (B, S).
    lengths (B,): the length of each text up to and including the query's token.
    mask: as in F.scaled_dot_product_attention."""
    scale = (lengths / cfg.original_block_size).clamp(min=1)
    q, k = rotate(q, *rope_tables(q_positions, cfg, scale)), rotate(k, *rope_tables(k_positions, cfg, scale))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
