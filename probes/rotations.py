"""Removes the rotary position of markers through hooks, in two ways that differ from setting it to 0.

A rotation by angle 0 at a marker does not remove the position from a product q . k of a marker and another token: the
angle of the product becomes that of the other token's position. Two other readings of "no position" do:

    pairs  neither q nor k is rotated in a product with a marker; products of two other tokens are as trained
    zeros  cos = sin = 0 at a marker, so its q and k are zero, and so are all products with it

Both apply to both attentions. YaRN's factor on q and k stays in `pairs`."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch

from nanometa.layers.rope import attention_factor, fixed_scale
from nanometa.meta_attention import recent
from nanometa.model import GPT, Block

READINGS = ("pairs", "zeros")


@contextlib.contextmanager
def without_rotation(model: GPT, meta: int, reading: str) -> Iterator[None]:
    """Lets the model read without the rotary position of its markers within the context. meta: id of <|meta|>; reading:
    pairs or zeros. The model must have rotary positions with a fixed scale."""
    tokens: dict[str, torch.Tensor] = {}

    def note(model: GPT, args: tuple) -> None:
        tokens["is_marker"] = args[0] == meta  # (B, T)

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(note))
        for block in model.h:
            for name in ("attn", "second_attn"):
                if hasattr(block, name):
                    change = functools.partial(_change, _only_markers(block, name), tokens, model, reading)
                    hooks.enter_context(getattr(block, name).register_forward_pre_hook(change))
        yield


def _only_markers(block: Block, name: str) -> bool:
    """Returns whether each product of an attention has a marker in it, as key or query."""
    return name == "second_attn" and block.second.connects == "markers"


def _change(only_markers: bool, tokens: dict, model: GPT, reading: str, layer, args: tuple) -> tuple:
    """Returns the arguments of an attention's forward with another `rotate`, and if needed another `attend`."""
    first = 1 if not torch.is_tensor(args[1]) else 3  # layers among markers get x, meta_index, norm, rotate, attend, ..
    rotate, is_marker = args[first], tokens["is_marker"]
    if reading == "zeros":
        gathered = only_markers and model.cfg.second.gathers  # all rows are markers
        return *args[:first], functools.partial(_zeroed, rotate, None if gathered else is_marker), *args[first + 1 :]
    factor = attention_factor(model.cfg, fixed_scale(model.cfg, is_marker.device))
    if only_markers:
        return *args[:first], lambda x: x * factor, *args[first + 1 :]
    attend = functools.partial(_attend_pairs, rotate, factor, is_marker, layer.window)
    return *args[:first], None, attend, *args[first + 2 :]


def _zeroed(rotate: Callable, is_marker: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Returns rotated x (B, H, T, D) with zeros at the markers (B, T), or everywhere if these are None."""
    x = rotate(x)
    return torch.zeros_like(x) if is_marker is None else x.masked_fill(is_marker[:, None, :, None], 0)


def _attend_pairs(rotate: Callable, factor, is_marker: torch.Tensor, window: int | None, q, k, v) -> torch.Tensor:
    """Computes causal attention (B, H, T, D) of q, k, v without rotation in the products with a marker.

    The scores of one text at a time are in memory."""
    T, turned_q, turned_k = q.size(2), rotate(q), rotate(k)
    seen = recent(T, window, q.device)
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril() if seen is None else seen
    out = []
    for b in range(len(q)):
        with_marker = is_marker[b, :, None] | is_marker[b, None, :]
        plain = (q[b] * factor) @ (k[b] * factor).mT
        scores = torch.where(with_marker, plain, turned_q[b] @ turned_k[b].mT) / math.sqrt(q.size(-1))
        out.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[b])
    return torch.stack(out)
