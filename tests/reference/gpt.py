"""Reference for the model: every attention computes all T x T pairs under a mask, with RoPE as complex numbers."""

import math

import torch
import torch.nn.functional as F

from tests.reference import rope


def attention(layer, x, allowed, rotation, uniform=None):
    """Returns the attention output (B, T, C) of x (B, T, C); a query that may see no key gets 0.

    allowed (B, T, T) bool: whether query i may see key j.
    uniform (B, T) bool: queries that weigh all keys that they may see equally; None for no such queries.
    rotation (B, T, T, D/2) complex: the factor of q_i conj(k_j); None for no rotary positions."""
    B, T, C = x.shape
    D = C // layer.n_head
    q, k, v = (part.reshape(B, T, layer.n_head, D) for part in layer.c_attn(x).split(C, dim=-1))
    if rotation is None:
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
    else:  # dimensions d and d + D/2 are the real and imaginary part of a complex number
        q, k = (torch.complex(part[..., : D // 2], part[..., D // 2 :]) for part in (q, k))
        scores = torch.einsum("bihd,bjhd,bijd->bhij", q, k.conj(), rotation).real
    if uniform is not None:
        scores = scores.masked_fill(uniform[:, None, :, None], 0)
    weights = torch.where(allowed[:, None], scores / math.sqrt(D), -math.inf).softmax(-1).nan_to_num(0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, T, C)
    return torch.where(allowed.any(-1)[..., None], layer.c_proj(out), 0)


def rotations(cfg, positions, places):
    """Returns the complex factor (B, T, T, D/2) of the product of each query and key.

    positions (B, T): where the tokens stand; the scale of a query depends on it.
    places (B, T): the positions by which the tokens are rotated."""
    pairs = range(cfg.n_embd // cfg.n_head // 2)
    scales = [[rope.scale(cfg, int(position) + 1) for position in row] for row in positions]
    speeds = [[[rope.speed(cfg, d, s) for d in pairs] for s in row] for row in scales]
    speeds = torch.tensor(speeds, dtype=torch.float64)
    stretch = torch.tensor([[rope.temperature(cfg, s) for s in row] for row in scales], dtype=torch.float64)
    distance = (places[:, :, None] - places[:, None, :]).double()
    return torch.polar(stretch[:, :, None, None].expand(*distance.shape, len(pairs)).contiguous(),
                       distance[..., None] * speeds[:, :, None])  # fmt: skip


def hidden_states(
    model,
    tokens,
    positions,
    members,
    visible=None,
    alter=lambda which, allowed: allowed,
    turn=lambda rotation: rotation,
):
    """Returns what model.forward returns. members (B, T) bool: the positions that the second attention connects.

    visible (B, T) bool: the tokens that other tokens may see; None = all. Every token sees itself.
    alter: function of "first" or "second" and of the mask (B, T, T) of that attention, which returns another mask.
    turn: function of the factors (B, T, T, D/2) of products q_i conj(k_j), which returns other factors."""
    cfg, T = model.cfg, tokens.size(1)
    zeroed = torch.where(members, 0, positions)
    first = positions if cfg.meta_position in ("same", "none_second") else zeroed
    second = positions if cfg.meta_position in ("same", "none_first") else zeroed
    x, rotation, rotation_second = model.wte(tokens), None, None
    if cfg.position == "learned":
        placed = ~members if cfg.meta_position == "none" else torch.ones_like(members)
        x = x + model.wpe(positions) * placed[..., None]
    else:
        rotation, rotation_second = (turn(rotations(cfg, positions, at)) for at in (first, second))
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(len(tokens), T, T)
    if visible is not None:
        causal = causal & (visible[:, None, :] | torch.eye(T, dtype=torch.bool))
    among_members = causal & members[:, :, None] & members[:, None, :]
    pairs = {  # for each arm, the pairs of positions that its second attention connects
        "meta": among_members,
        "diagonal": among_members & torch.eye(T, dtype=torch.bool),
        "random": among_members,
        "meta_mean": torch.where(members[:, :, None], among_members, causal),
        "read_meta": causal & members[:, None, :],
        "causal": causal,
        "none": None,
    }
    uniform = ~members if cfg.second_attention == "meta_mean" else None  # these average values
    if cfg.second_attention not in pairs:
        raise NotImplementedError(f"pairs lacks second_attention={cfg.second_attention}: add what it connects.")
    connected = pairs[cfg.second_attention]
    for block in model.h:
        x = x + attention(block.attn, block.ln_1(x), alter("first", causal), rotation)
        if connected is not None:
            seen = alter("second", connected)
            x = x + attention(block.second_attn, block.ln_second(x), seen, rotation_second, uniform)
        h = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
        x = x + block.mlp.c_proj(h)
    return model.ln_f(x)
