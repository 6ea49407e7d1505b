"""Observes the attention heads of a model while it runs. Hooks capture queries and keys, and the weights are recomputed
from them in fp32, because the model's own attention kernel never exposes its weights."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from nanometa.common.errors import UserError
from nanometa.meta_attention import MetaMeanAttention, ReadMetaAttention, gather_rows
from nanometa.model import GPT

FIRST, SECOND = "causal", "second"  # names of a block's attentions in the output lines


class HeadInputs(NamedTuple):
    """Queries, keys and values of one attention at N positions of each of B texts. These are either all T positions or,
    in increasing order, the positions that a second attention gathers. Of MetaMeanAttention, they are the meta-tokens:
    no head weighs what the other positions read."""

    q: torch.Tensor  # (B, H, N, D) fp32, rotated as in the model; k too
    k: torch.Tensor
    v: torch.Tensor  # (B, H, N, D) fp32
    at: torch.Tensor  # (B, N): position in the text; T for padding, which comes last
    window: int | None = None  # number of most recent keys that a query sees; None: all keys up to its own position
    keys: torch.Tensor | None = None  # (B, N) bool: the positions that can be read; None: all

    def logits(self) -> torch.Tensor:
        """Returns the logits q . k / sqrt(D) (B, H, N, N). They are -inf where the query does not see the key."""
        N = self.at.size(1)
        unseen = torch.ones(N, N, dtype=torch.bool, device=self.q.device).triu(1)
        if self.window is not None:
            unseen |= torch.ones_like(unseen).tril(-self.window)
        if self.keys is not None:
            unseen = unseen | ~self.keys[:, None, None]  # (B, 1, N, N)
        return (self.q @ self.k.mT / math.sqrt(self.q.size(-1))).masked_fill(unseen, -math.inf)


@contextlib.contextmanager
def observe_heads(model: GPT, see: Callable[[int, str, HeadInputs], None]) -> Iterator[None]:
    """Calls see(layer, FIRST or SECOND, HeadInputs) for each attention, in the order of the model, in every forward
    pass within the context. Raises UserError for a dynamic scale, which gives a key a different angle for each
    query."""
    if model.cfg.rope_dynamic:
        raise UserError("rope_dynamic rotates every key differently for each query, but this probe reads heads with "
                        "one angle for each key: leave --rope_dynamic out.")  # fmt: skip
    with contextlib.ExitStack() as hooks:
        for layer, block in enumerate(model.h):
            for which, attention in ((FIRST, block.attn), (SECOND, getattr(block, "second_attn", None))):
                if attention is not None:
                    one = _HeadHooks(see, layer, which)
                    hooks.enter_context(attention.register_forward_pre_hook(one.before_attention))
                    hooks.enter_context(attention.c_attn.register_forward_hook(one.after_projection))
        yield


class _HeadHooks:
    """Two hooks on one attention: the first captures how q and k are rotated, the second captures q, k and v."""

    def __init__(self, see: Callable, layer: int, which: str):
        self.see = functools.partial(see, layer, which)

    def before_attention(self, attention, inputs: tuple) -> None:
        x, *rest = inputs
        self.window = attention.window
        self.attention, self.T, self.index = attention, x.size(1), None
        if torch.is_tensor(rest[0]):  # layers among meta-tokens get x, meta_index (B, M), norm, rotate, ..
            self.index, _, *rest = rest
        self.rotate = rest[0]

    @torch.no_grad()
    def after_projection(self, c_attn, inputs: tuple, qkv: torch.Tensor) -> None:  # (B, N, 3C)
        at, keys = self.index, None
        if isinstance(self.attention, MetaMeanAttention):
            qkv = gather_rows(qkv, at)
        elif isinstance(self.attention, ReadMetaAttention):
            at, keys = None, listed(at, self.T)
        if at is None:
            at = torch.arange(self.T, device=qkv.device).expand(len(qkv), -1)
        q, k, v = self.attention.heads(qkv, self.rotate)
        self.see(HeadInputs(q.float(), k.float(), v.float(), at, self.window, keys))


def listed(index: torch.Tensor, T: int) -> torch.Tensor:
    """Returns whether each of T positions is listed in index (B, M), as bools (B, T); the padding T is not."""
    there = torch.zeros(len(index), T + 1, dtype=torch.bool, device=index.device)
    return there.scatter(1, index, True)[:, :T]
