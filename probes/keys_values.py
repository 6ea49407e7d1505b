"""Records and replaces keys and values of attentions at places of a text, through hooks on the joint projection c_attn.

Keys are taken before rotation, so a key that comes from another text is rotated by its new position. Only what other
positions see of a place is replaced: its queries and its residual stream stay its own."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from nanometa.data.layout import Batch
from nanometa.meta_attention import CausalSelfAttention, MetaAttention
from nanometa.model import GPT


class Projection:
    """The projection c_attn of one attention layer, whose output rows are all positions or the gathered ones."""

    def __init__(self, layer: CausalSelfAttention):
        self.c_attn, self.gathers = layer.c_attn, isinstance(layer, MetaAttention)

    def rows(self, places: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the indices of the places (B, k) among the output's rows, as pairs for indexing (B, N, ..)."""
        text = torch.arange(len(places), device=places.device)[:, None]
        if not self.gathers:
            return text, places
        found = batch.meta_index[:, None, :] == places[..., None]  # (B, k, M)
        assert found.any(-1).all(), "a place is not among the positions that the second attention gathers"
        return text, found.int().argmax(-1)


def projections(model: GPT, names: tuple[str, ...]) -> list[Projection]:
    """Returns the projections of all blocks, for attentions by the names of their modules: attn, second_attn."""
    return [Projection(getattr(block, name)) for block in model.h for name in names]


@contextlib.contextmanager
def record_keys_values(
    model: GPT, names: tuple[str, ...], places: torch.Tensor, batch: Batch
) -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, after the forward of a Batch within the context, the keys and values (B, k, 2C) at the
    places (B, k), in the order of `projections`."""
    recorded: list[torch.Tensor] = []

    def record(one: Projection, c_attn, args: tuple, qkv: torch.Tensor) -> None:
        recorded.append(qkv.detach()[one.rows(places, batch)][..., qkv.size(-1) // 3 :])

    with contextlib.ExitStack() as hooks:
        for one in projections(model, names):
            hooks.enter_context(one.c_attn.register_forward_hook(functools.partial(record, one)))
        yield recorded


@contextlib.contextmanager
def replace_keys_values(
    model: GPT, names: tuple[str, ...], places: torch.Tensor, batch: Batch, values: list[torch.Tensor]
) -> Iterator[None]:
    """Replaces keys and values at the places (B, k) in the forward of a Batch within the context. values: as
    `record_keys_values` records them."""

    def substitute(one: Projection, value: torch.Tensor, c_attn, args: tuple, qkv: torch.Tensor) -> torch.Tensor:
        at, changed = one.rows(places, batch), qkv.clone()
        C = qkv.size(-1) // 3
        changed[at] = torch.cat([qkv[at][..., :C], value.to(qkv)], dim=-1)
        return changed

    with contextlib.ExitStack() as hooks:
        for one, value in zip(projections(model, names), values, strict=True):
            hooks.enter_context(one.c_attn.register_forward_hook(functools.partial(substitute, one, value)))
        yield
