"""Records and replaces states of a model's residual stream through hooks, so that model.py needs no code for probes.

State number i (B, T, C) enters block i: 0 is the embedding, i the output of block i - 1, and n_layer is the input of
ln_f. Under autocast a state has the dtype that it has inside the model."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from nanometa.common.errors import UserError
from nanometa.model import GPT


def stream_modules(model: GPT) -> list[torch.nn.Module]:
    """Returns the n_layer + 1 modules that the residual stream enters, in order."""
    return [*model.h, model.ln_f]


@contextlib.contextmanager
def record_states(model: GPT) -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, after every forward within the context, its n_layer + 1 states (B, T, C), detached.

    A state that `replace_state` replaces is recorded after the replacement if the context of `replace_state` is the
    outer one, and before it otherwise."""
    recorded: list[torch.Tensor] = []

    def record(number: int, site: torch.nn.Module, inputs: tuple) -> None:
        recorded[number:] = [inputs[0].detach()]  # a forward pass starts at 0, which discards the previous states

    with contextlib.ExitStack() as hooks:
        for number, site in enumerate(stream_modules(model)):
            hooks.enter_context(site.register_forward_pre_hook(functools.partial(record, number)))
        yield recorded


@contextlib.contextmanager
def replace_state(model: GPT, layer: int, places: torch.Tensor, values: torch.Tensor) -> Iterator[None]:
    """Replaces state `layer` of every forward pass within the context by `values` (B, k, C), at `places` (B, k). Raises
    UserError for a layer that the model does not have."""
    check_layer(model, layer)

    def substitute(module, inputs):
        x, *rest = inputs  # (B, T, C)
        at = torch.arange(len(x), device=x.device)[:, None], places.to(x.device)
        return x.index_put(at, values.to(x)), *rest

    with stream_modules(model)[layer].register_forward_pre_hook(substitute):
        yield


def check_layer(model: GPT, layer: int) -> None:
    """Raises UserError for a layer that the model does not have."""
    if not 0 <= layer <= model.cfg.n_layer:
        raise UserError(
            f"there is no layer {layer}: this model has states 0 (the embedding) to {model.cfg.n_layer} (the input of "
            f"the last LayerNorm); take one of these."
        )
