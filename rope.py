"""Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864), in the half-split layout of Llama and NeoX."""

import torch


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (B, T) -> cos, sin (B, 1, T, head_dim / 2), always fp32: bf16 cannot count past 256.

    Pair d turns by position * theta^(-2d / head_dim)."""
    d = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * theta ** (-d / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D), cos and sin (B, 1, T, D / 2) -> x with dimensions d and d + D/2 turned as pairs, in x's dtype."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
