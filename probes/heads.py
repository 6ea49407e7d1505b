"""Observes the attention heads of a model while it runs. Hooks capture queries and keys, and the weights are recomputed
from them in fp32, because the model's own attention kernel never exposes its weights."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from einops import rearrange

from nanometa.common.errors import UserError
from nanometa.model import GPT

FIRST, SECOND = "causal", "second"  # names of a block's attentions in the output lines


class HeadInputs(NamedTuple):
    """Queries, keys and values of one attention at N positions of each of B texts. These are either all T positions or,
    in increasing order, the positions that a second attention gathers."""

    q: torch.Tensor  # (B, H, N, D) fp32, rotated as in the model; k too
    k: torch.Tensor
    v: torch.Tensor  # (B, H, N, D) fp32
    at: torch.Tensor  # (B, N): position in the text; T for padding, which comes last
    window: int | None = None  # number of most recent keys that a query sees; None: all keys up to its own position

    def logits(self) -> torch.Tensor:
        """Returns the logits q . k / sqrt(D) (B, H, N, N). They are -inf where the query does not see the key."""
        N = self.at.size(1)
        unseen = torch.ones(N, N, dtype=torch.bool, device=self.q.device).triu(1)
        if self.window is not None:
            unseen |= torch.ones_like(unseen).tril(-self.window)
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
                    one = _HeadHooks(see, layer, which, attention.n_head)
                    hooks.enter_context(attention.register_forward_pre_hook(one.before_attention))
                    hooks.enter_context(attention.c_attn.register_forward_hook(one.after_projection))
        yield


class _HeadHooks:
    """Two hooks on one attention: the first captures how q and k are rotated, the second captures q, k and v."""

    def __init__(self, see: Callable, layer: int, which: str, n_head: int):
        self.see, self.n_head = functools.partial(see, layer, which), n_head

    def before_attention(self, attention, inputs: tuple) -> None:
        x, *rest = inputs
        self.window = attention.window
        self.T, self.index = x.size(1), None
        if torch.is_tensor(rest[0]):  # MetaAttention gets x, meta_index (B, M), norm, rotate, ..
            self.index, _, *rest = rest
        self.rotate = rest[0]

    @torch.no_grad()
    def after_projection(self, c_attn, inputs: tuple, qkv: torch.Tensor) -> None:  # (B, N, 3C)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.n_head)
        if self.rotate is not None:
            q, k = self.rotate(q), self.rotate(k)
        at = self.index
        if at is None:
            at = torch.arange(self.T, device=qkv.device).expand(len(qkv), -1)
        self.see(HeadInputs(q.float(), k.float(), v.float(), at, self.window))
