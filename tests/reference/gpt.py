"""The model from its definition: every attention over all T x T pairs under a mask, rotations as complex numbers."""

import math

import torch
import torch.nn.functional as F


def attention(layer, x, allowed, turn):
    """x (B, T, C); allowed (B, T, T) bool, may query i see key j; turn (B, T, D/2) complex or None -> (B, T, C).

    A query that may see nothing gets 0."""
    B, T, C = x.shape
    D = C // layer.n_head
    heads = [part.reshape(B, T, layer.n_head, D) for part in layer.c_attn(x).split(C, dim=-1)]
    if turn is not None:  # q and k alone
        heads[:2] = [_turned(part, turn) for part in heads[:2]]
    q, k, v = heads
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D)
    weights = torch.where(allowed[:, None], scores, -math.inf).softmax(-1).nan_to_num(0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, T, C)
    return torch.where(allowed.any(-1)[..., None], layer.c_proj(out), 0)


def _turned(x, turn):
    """x (B, T, H, D): dimensions d and d + D/2 are the parts of a complex number."""
    D = x.size(-1)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn[:, :, None]
    return torch.cat((z.real, z.imag), dim=-1)


def hidden_states(model, tokens, positions, members):
    """model.forward with members (B, T) bool, the positions of the second attention, in place of their list."""
    cfg, T = model.cfg, tokens.size(1)
    placed = ~members if cfg.meta_position == "none" else torch.ones_like(members)
    x, turn = model.wte(tokens), None
    if cfg.position == "learned":
        x = x + model.wpe(positions) * placed[..., None]
    else:
        D = cfg.n_embd // cfg.n_head
        speed = torch.tensor([cfg.rope_theta ** (-2 * d / D) for d in range(D // 2)], dtype=torch.float64)
        angle = positions[..., None] * speed
        turn = torch.where(placed[..., None], torch.polar(torch.ones_like(angle), angle), 1)
    before = torch.ones(T, T, dtype=torch.bool).tril().expand(len(tokens), T, T)
    second = before
    if cfg.second_attention in ("meta", "random"):
        second = before & members[:, :, None] & members[:, None, :]
    for block in model.h:
        x = x + attention(block.attn, block.ln_1(x), before, turn)
        if cfg.second_attention != "none":
            x = x + attention(block.second_attn, block.ln_second(x), second, turn)
        h = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
        x = x + block.mlp.c_proj(h)
    return model.ln_f(x)
