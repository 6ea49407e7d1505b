"""The model from its definition: every attention over all T x T pairs under a mask, scores as complex numbers."""

import math

import torch
import torch.nn.functional as F

from tests.reference import rope


def attention(layer, x, allowed, turn):
    """x (B, T, C); allowed (B, T, T) bool, may query i see key j; turn (B, T, T, D/2) complex or None: what
    q_i conj(k_j) is multiplied by -> (B, T, C).

    A query that may see nothing gets 0."""
    B, T, C = x.shape
    D = C // layer.n_head
    q, k, v = (part.reshape(B, T, layer.n_head, D) for part in layer.c_attn(x).split(C, dim=-1))
    if turn is None:
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
    else:  # dimensions d and d + D/2 are the parts of a complex number
        q, k = (torch.complex(part[..., : D // 2], part[..., D // 2 :]) for part in (q, k))
        scores = torch.einsum("bihd,bjhd,bijd->bhij", q, k.conj(), turn).real
    weights = torch.where(allowed[:, None], scores / math.sqrt(D), -math.inf).softmax(-1).nan_to_num(0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, T, C)
    return torch.where(allowed.any(-1)[..., None], layer.c_proj(out), 0)


def turns(cfg, positions, places):
    """positions, places (B, T), where tokens are and where they are said to be -> (B, T, T, D/2) complex: how far
    the product of each query and key is turned and stretched, under the scale that the query reads with."""
    pairs = range(cfg.n_embd // cfg.n_head // 2)
    scales = [[rope.scale(cfg, int(position) + 1) for position in row] for row in positions]
    speeds = [[[rope.speed(cfg, d, s) for d in pairs] for s in row] for row in scales]
    speeds = torch.tensor(speeds, dtype=torch.float64)
    stretch = torch.tensor([[rope.temperature(cfg, s) for s in row] for row in scales], dtype=torch.float64)
    distance = (places[:, :, None] - places[:, None, :]).double()
    return torch.polar(stretch[:, :, None, None].expand(*distance.shape, len(pairs)).contiguous(),
                       distance[..., None] * speeds[:, :, None])  # fmt: skip


def hidden_states(model, tokens, positions, members):
    """model.forward with members (B, T) bool, the positions of the second attention, in place of their list."""
    cfg, T = model.cfg, tokens.size(1)
    nowhere = torch.where(members, 0, positions)
    first = positions if cfg.meta_position in ("same", "none_second") else nowhere
    second = positions if cfg.meta_position in ("same", "none_first") else nowhere
    x, turn, turn_second = model.wte(tokens), None, None
    if cfg.position == "learned":
        placed = ~members if cfg.meta_position == "none" else torch.ones_like(members)
        x = x + model.wpe(positions) * placed[..., None]
    else:
        turn, turn_second = (turns(cfg, positions, places) for places in (first, second))
    before = torch.ones(T, T, dtype=torch.bool).tril().expand(len(tokens), T, T)
    among_members = before & members[:, :, None] & members[:, None, :]
    pairs = {  # by arm, which pairs of positions its second attention connects
        "meta": among_members,
        "diagonal": among_members & torch.eye(T, dtype=torch.bool),
        "random": among_members,
        "causal": before,
        "none": None,
    }
    if cfg.second_attention not in pairs:
        raise NotImplementedError(f"define here which pairs second_attention={cfg.second_attention} connects")
    connected = pairs[cfg.second_attention]
    for block in model.h:
        x = x + attention(block.attn, block.ln_1(x), before, turn)
        if connected is not None:
            x = x + attention(block.second_attn, block.ln_second(x), connected, turn_second)
        h = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
        x = x + block.mlp.c_proj(h)
    return model.ln_f(x)
