"""Changes the attention of a trained model around its markers through hooks, so that model.py needs no code for it.

    off             the second attention adds nothing
    diagonal        in the second attention, each marker attends only to itself; other positions attend as trained
    hidden_markers  in the causal attention, positions that are not markers do not see the markers

A marker that attends only to itself has one attention weight, which is 1. Its heads return its own value W_v LN(x),
whatever the rotary positions are. The hooks read the markers from the ids of the input."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from nanometa.config import GPTConfig
from nanometa.meta_attention import MetaAttention, gather_rows
from nanometa.model import GPT, Block

INTACT = "intact"
CONDITIONS = ("off", "diagonal", "hidden_markers")


def inapplicable(condition: str, m: GPTConfig, has_markers: bool) -> str:
    """Returns the reason why a condition cannot change what a model reads, or "" if it can.

    has_markers: whether the texts that the model reads have markers. The reason continues "the run"."""
    if condition != "hidden_markers" and not m.second.has_layer:
        return "has no second attention"
    if condition != "off" and not has_markers:
        return "reads texts without markers"
    if condition == "diagonal" and m.second.window == 1:
        return "has a second attention in which each position already attends only to itself"
    if condition == "hidden_markers" and m.rope_dynamic:
        return "has a dynamic rotary scale, which rotates each key differently for each query"
    return ""


@contextlib.contextmanager
def changed_attention(model: GPT, meta: int, condition: str) -> Iterator[None]:
    """Lets the model read under a condition, or intact, within the context.

    meta: id of <|meta|>. The condition must be applicable (see `inapplicable`)."""
    with contextlib.ExitStack() as hooks:
        if condition != INTACT:
            install = {"off": _off, "diagonal": _diagonal, "hidden_markers": _hidden_markers}[condition]
            inputs = _Inputs(meta)
            hooks.enter_context(model.register_forward_pre_hook(inputs.note))
            for block in model.h:
                install(block, inputs, hooks)
        yield


class _Inputs:
    """The markers and the connected positions of the forward pass that is running."""

    def __init__(self, meta: int):
        self.meta = meta

    def note(self, model: GPT, args: tuple) -> None:
        tokens, _, self.meta_index, *_ = args
        self.is_marker = tokens == self.meta  # (B, T)


def _off(block: Block, inputs: _Inputs, hooks: contextlib.ExitStack) -> None:
    """Replaces the output of the second attention by zeros, its bias included."""
    hooks.enter_context(block.second_attn.c_proj.register_forward_hook(lambda layer, args, y: torch.zeros_like(y)))


def _diagonal(block: Block, inputs: _Inputs, hooks: contextlib.ExitStack) -> None:
    """Replaces what the heads of the second attention return at each marker by the marker's own value."""
    before = _ResidualBefore(block, hooks)
    qkv = block.second_attn.c_attn

    def own_values(c_proj, args):
        (y,) = args  # (B, M, C) of the gathered rows, or (B, T, C)
        C = y.size(-1)
        bias = None if qkv.bias is None else qkv.bias[2 * C :]
        values = F.linear(block.ln_second(before.x), qkv.weight[2 * C :], bias).to(y.dtype)  # (B, T, C)
        if isinstance(block.second_attn, MetaAttention):  # projects only the rows that it gathers
            return (gather_rows(values, inputs.meta_index),)
        return (torch.where(inputs.is_marker[..., None], values, y),)

    hooks.enter_context(block.second_attn.c_proj.register_forward_pre_hook(own_values))


def _hidden_markers(block: Block, inputs: _Inputs, hooks: contextlib.ExitStack) -> None:
    """Hides the keys of markers from all queries of the causal attention that are not markers themselves."""

    def attend(q, k, v):
        query, key = inputs.is_marker[:, :, None], inputs.is_marker[:, None, :]
        visible = torch.ones_like(query & key).tril() & (query | ~key)  # (B, T, T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])

    def replace_attention(attention, args):
        x, rotate, _ = args
        return x, rotate, attend

    hooks.enter_context(block.attn.register_forward_pre_hook(replace_attention))


class _ResidualBefore:
    """The residual stream x (B, T, C) between the causal and the second attention of a block, as last computed."""

    def __init__(self, block: Block, hooks: contextlib.ExitStack):
        hooks.enter_context(block.register_forward_pre_hook(self._enter))
        hooks.enter_context(block.attn.register_forward_hook(self._add))

    def _enter(self, block: Block, args: tuple) -> None:
        self.x = args[0].detach()

    def _add(self, attention, args: tuple, y: torch.Tensor) -> None:
        self.x = self.x + y.detach()  # as the block adds it, so that rows that nothing changes agree to the bit


@contextlib.contextmanager
def record_norms(model: GPT) -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, after every forward within the context, for each block the norm (B, T) fp32 of what its
    second attention added to the residual stream, divided by the norm of the residual stream before it."""
    ratios: list[torch.Tensor] = []

    def record(number: int, before: _ResidualBefore, ln_2, args: tuple) -> None:
        added = args[0].detach() - before.x
        ratios[number:] = [added.float().norm(dim=-1) / before.x.float().norm(dim=-1)]

    with contextlib.ExitStack() as hooks:
        for number, block in enumerate(model.h):
            before = _ResidualBefore(block, hooks)
            hooks.enter_context(block.ln_2.register_forward_pre_hook(functools.partial(record, number, before)))
        yield ratios
