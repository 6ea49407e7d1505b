"""Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864), in the half-split layout of Llama and NeoX, and
four ways to read windows longer than those that a model was trained on: its trained length L = block_size / rope_factor
is stretched by a scale s, which is rope_factor, or with rope_dynamic the length read so far over L, at least 1.

pi    position interpolation (arXiv 2306.15595): all pairs turn 1 / s as fast
ntk   NTK-aware: the base grows by s^(D / (D - 2)), so that the slowest pair turns 1 / s as fast, the fastest as before
yarn  YaRN (arXiv 2309.00071): pairs that turn less than yarn_beta_slow times in L are interpolated, those that turn
      more than yarn_beta_fast times are left, with a ramp between; and scores are multiplied by (0.1 ln s + 1)^2

With s = 1 each is plain RoPE, to the bit. The ramp is linear in the number of the pair, as in YaRN's own code and what
follows it, or with yarn_ramp=paper in the number of turns, as its equation 18 says.
"""

import math

import torch
import torch.nn.functional as F

from nanometa.config import GPTConfig
from nanometa.meta_attention import recent


def rope_speeds(cfg: GPTConfig, scale: torch.Tensor) -> torch.Tensor:
    """scale (...) -> radians a position of each pair of dimensions (..., D / 2), fp32."""
    D = cfg.n_embd // cfg.n_head
    d = torch.arange(0, D, 2, device=scale.device, dtype=torch.float32)
    plain, s = cfg.rope_theta ** (-d / D), scale[..., None]
    if cfg.rope_scaling == "pi":
        return plain / s
    if cfg.rope_scaling == "ntk":
        return plain * s ** (-d / (D - 2))  # (theta s^(D / (D - 2)))^(-d / D)
    if cfg.rope_scaling == "yarn":
        return plain / s + _untouched(cfg, plain) * (plain - plain / s)
    return plain


def _untouched(cfg: GPTConfig, plain: torch.Tensor) -> torch.Tensor:
    """How much of YaRN's interpolation each pair is spared: 0 .. 1, (D / 2,)."""
    L, fast, slow, half = cfg.original_block_size, cfg.yarn_beta_fast, cfg.yarn_beta_slow, len(plain)
    if cfg.yarn_ramp == "paper":
        return ((L * plain / (2 * math.pi) - slow) / (fast - slow)).clamp(0, 1)

    def pair(turns: float) -> float:
        return half * math.log(L / (2 * math.pi * turns)) / math.log(cfg.rope_theta)

    # bounds as in YaRN's code, which cuts them at the head's size, not at half of it
    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), 2 * half - 1)
    numbers = torch.arange(half, device=plain.device, dtype=torch.float32)
    return 1 - ((numbers - low) / max(high - low, 0.001)).clamp(0, 1)


def attention_factor(cfg: GPTConfig, scale: torch.Tensor) -> torch.Tensor:
    """scale (...) -> what q and k are multiplied by, each: 1 but for YaRN. yarn_attention_factor replaces YaRN's
    0.1 ln s + 1, as Hugging Face's attention_factor does: 1.0 switches the temperature off. (In YaRN's own code
    attn_factor multiplies it: there 1.0, which the paper names too, leaves it on.)"""
    if cfg.rope_scaling != "yarn":
        return torch.ones_like(scale)
    if cfg.yarn_attention_factor is not None:
        return torch.full_like(scale, cfg.yarn_attention_factor)
    return 0.1 * scale.log() + 1


def rope_tables(positions: torch.Tensor, cfg: GPTConfig, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (B, T), scale () or (B,) -> cos, sin (B, 1, T, D / 2), always fp32: bf16 cannot count past 256. The
    attention factor is in both, so q . k gets its square once."""
    angles = positions[:, None, :, None].float() * rope_speeds(cfg, scale)[..., None, None, :]
    factor = attention_factor(cfg, scale)[..., None, None, None]
    return angles.cos() * factor, angles.sin() * factor


def fixed_scale(cfg: GPTConfig, device: torch.device) -> torch.Tensor:
    """() fp32, for a scale that does not depend on the text."""
    return torch.full((), cfg.rope_factor, device=device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D), cos and sin (B, 1, T, D / 2) -> x with dimensions d and d + D/2 turned as pairs, in x's dtype."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


# ------------------------------------------------------------------- a scale that grows with the text


def attend_dynamic(q, k, v, positions, lengths, cfg: GPTConfig, window: int | None = None):
    """Causal attention under a scale that each query takes from what has been read when it comes, its own token
    included: so a text gives the same whole as token by token, and nothing depends on what follows.

    q, k, v (B, H, T, D), not rotated; positions (B, T), where each is turned to; lengths (B, T), positions of the text
    up to each; window: how many keys a query sees, None: all before it. -> (B, H, T, D)"""
    T = q.size(2)
    # the queries before any row has outgrown its training see what plain RoPE shows them
    early = int((lengths <= cfg.original_block_size).all(0).cumprod(0).sum())
    tables = rope_tables(positions[:, :early], cfg, torch.ones((), device=q.device))
    turned = (rotate(x[:, :, :early], *tables) for x in (q, k))
    mask = recent(early, window, q.device)
    out = [F.scaled_dot_product_attention(*turned, v[:, :, :early], attn_mask=mask, is_causal=mask is None)]
    for t in range(early, T):
        seen, own = slice(max(0, t + 1 - (window or T)), t + 1), slice(t, t + 1)
        at = (positions[:, own], positions[:, seen], lengths[:, t])
        out.append(attend_one(q[:, :, own], k[:, :, seen], v[:, :, seen], *at, cfg))
    return torch.cat(out, dim=2)


def attend_one(q, k, v, q_positions, k_positions, lengths, cfg: GPTConfig, mask=None):
    """The last query of each text: q (B, H, 1, D), k and v (B, H, S, D), not rotated, their positions (B, 1), (B, S),
    lengths (B,) of the texts, mask as scaled_dot_product_attention takes it -> (B, H, 1, D)."""
    scale = (lengths / cfg.original_block_size).clamp(min=1)
    q, k = rotate(q, *rope_tables(q_positions, cfg, scale)), rotate(k, *rope_tables(k_positions, cfg, scale))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
