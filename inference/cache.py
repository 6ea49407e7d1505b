"""Decoding with a cache: what a sequence has read is kept as keys and values, and only new tokens are computed.

Every block has two caches: of causal attention, all positions; of the second attention, the positions that it connects
(the markers, so it is small; or those drawn, or all). The new tokens of all sequences are packed into one row (1, N) of
the model's own forward, whether they are a prompt or one token, so no layer ever sees padding; only attention knows
which token is whose.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanometa.config import GPTConfig
from nanometa.layers.rope import attend_dynamic, attend_one
from nanometa.meta_attention import causal_sdpa
from nanometa.model import GPT


class Store:
    """Keys and values that one attention of every block has seen, for B sequences: (n_layer, B, S, H, D) each. Keys are
    kept rotated, but for a dynamic scale, which turns all of them anew for every token."""

    def __init__(
        self, cfg: GPTConfig, B: int, S: int, dtype: torch.dtype, device: torch.device, window: int | None = None
    ):
        """window: how many keys a query sees, the last ones; None: all that there are."""
        size = (cfg.n_layer, B, S, cfg.n_head, cfg.n_embd // cfg.n_head)
        # zeros, not empty: a masked key has weight 0, and 0 x NaN is NaN
        self.k, self.v = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.used, self.window = [0] * B, window
        self.cfg, self.positions = cfg, torch.zeros(B, S, dtype=torch.long, device=device)

    def place(self, rows: list[int], positions: list[int], lengths: list[int]) -> None:
        """Gives a slot to every token of a packed row, and decides what it will look at. rows: whose each token is;
        positions: where rope turns it to; lengths: positions of its text up to it.

        calls: (start, end, of which sequence or sequences, keys each has, mask) for the tokens start .. end - 1; a
        prompt's are (start, end, None, 0, None). One sequence has several tokens in a call, several have one each."""
        B, S = self.k.shape[1:3]
        self.calls: list[tuple[int, int, slice | None, int, torch.Tensor | None]] = []
        slots, n = [], 0
        for row, group in itertools.groupby(rows):
            count, used = len(list(group)), self.used[row]
            slots += range(row * S + used, row * S + used + count)
            if used == 0:
                self.calls.append((n, n + count, None, 0, None))
            elif self.cfg.rope_dynamic:  # each token has a scale of its own
                for i in range(count):
                    mask = self._mask([used + i + 1])
                    mask = None if mask is None else mask[None, None]  # (1, 1, 1, keys)
                    self.calls.append((n + i, n + i + 1, slice(row, row + 1), used + i + 1, mask))
            else:
                mask = self._mask(list(range(used + 1, used + count + 1)))
                mask = None if mask is None else mask[None, None]  # (1, 1, count, keys)
                self.calls.append((n, n + count, slice(row, row + 1), used + count, mask))
            self.used[row] += count
            n += count
        self.slots = torch.tensor(slots, device=self.k.device, dtype=torch.long)
        if self.cfg.rope_dynamic:
            self.at = torch.tensor([positions, lengths], device=self.k.device, dtype=torch.long)  # (2, N)
            self.positions.flatten().index_copy_(0, self.slots, self.at[0])
        whose = [(call[1] - call[0], call[2]) for call in self.calls[:B]]
        if B > 1 and whose == [(1, slice(row, row + 1)) for row in range(B)]:  # a token for each: all at once
            lengths = [call[3] for call in self.calls[:B]]
            mask = self._mask(lengths)
            mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, keys)
            self.calls[:B] = [(0, B, slice(0, B), max(lengths), mask)]

    def _mask(self, lengths: list[int]) -> torch.Tensor | None:
        """For queries that see the first lengths[i] keys, of these the last `window`: what to add to their scores
        (len(lengths), max(lengths))."""
        longest = max(lengths)
        if min(lengths) == longest and (self.window is None or longest <= self.window):
            return None
        keys, lengths = torch.arange(longest), torch.tensor(lengths)[:, None]
        beyond = keys >= lengths
        if self.window is not None:
            beyond |= keys < lengths - self.window
        return torch.zeros(beyond.shape, dtype=self.k.dtype).masked_fill(beyond, -math.inf).to(self.k.device)

    def attend(self, layer: int, q, k, v):
        """q, k, v (1, H, N, D) of the placed tokens -> (1, H, N, D). What attention calls in place of causal_sdpa."""
        for cache, new in ((self.k[layer], k), (self.v[layer], v)):
            cache.flatten(0, 1).index_copy_(0, self.slots, new[0].transpose(0, 1))
        out = []
        for start, end, rows, keys, mask in self.calls:
            part = q[:, :, start:end]
            if rows is None:
                own = (part, k[:, :, start:end], v[:, :, start:end])
                if self.cfg.rope_dynamic:
                    y = attend_dynamic(*own, *self.at[:, None, start:end], self.cfg, self.window)
                else:
                    y = causal_sdpa(*own, dropout_p=0.0, window=self.window)
            else:
                several = rows.stop - rows.start > 1
                part = part.transpose(0, 2) if several else part
                seen = [x[layer, rows, :keys].transpose(1, 2) for x in (self.k, self.v)]  # (B, H, keys, D)
                if self.cfg.rope_dynamic:
                    positions, lengths = self.at[:, start:end]
                    y = attend_one(
                        part, *seen, positions[:, None], self.positions[rows, :keys], lengths, self.cfg, mask
                    )
                else:
                    y = F.scaled_dot_product_attention(part, *seen, attn_mask=mask)
                y = y.transpose(0, 2) if several else y
            out.append(y)
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def keep(self, rows: list[int]) -> None:
        """Forgets all sequences but these."""
        self.k, self.v, self.positions = self.k[:, rows], self.v[:, rows], self.positions[rows]
        self.used = [self.used[row] for row in rows]


class DecodingWeights:
    """A model made ready for decoding, good for many texts. The model itself is not changed, and unless packed or cast
    its weights are shared: make a new one after training.

    dtype: bfloat16 casts the weights of the products once, and computes as autocast does (LayerNorm, residuals and
    logits stay fp32); rows: how many tokens most steps have, the size of the batch."""

    def __init__(self, model: GPT, dtype: torch.dtype, rows: int):
        self.cfg, self.dtype, self.device = model.cfg, dtype, model.wte.weight.device
        self.model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})  # modules alone
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, Product(child.weight, child.bias, dtype, rows))
        self.head = Product(model.wte.weight[: model.cfg.content_vocab_size], None, dtype, rows)


class Decoder:
    """Caches for B sequences, and the one step that reads what is new to them.

    slots, second_slots: positions of a window that will be used at most, and those of them that a second attention
    gathers. in_second: (token, position) -> does it connect this one? (If there is none, or it is
    causal: is it a marker, which may have no position?)"""

    def __init__(self, weights: DecodingWeights, B: int, slots: int, second_slots: int, in_second: Callable):
        cfg = weights.cfg
        self.weights, self.device = weights, weights.device
        self.in_second, self.gathered = in_second, cfg.second.gathers
        kind = (weights.dtype, self.device)
        self.causal, self.second = Store(cfg, B, slots, *kind), None
        if cfg.second.has_layer:
            self.second = Store(cfg, B, second_slots if self.gathered else slots, *kind, cfg.second.window)
        self.stores = [store for store in (self.causal, self.second) if store is not None]
        self.attends = [
            tuple(functools.partial(store.attend, layer) for store in self.stores) for layer in range(cfg.n_layer)
        ]

    @torch.inference_mode()
    def read(self, new: list[list[int]], sources: list[int]) -> torch.Tensor:
        """new[b]: tokens that follow what sequence b has read; sources[b]: the one of them, by index, whose prediction
        is wanted -> logits (B, content_vocab_size), fp32."""
        used = self.causal.used
        # prompts one by one, then the first new token of each other sequence, the second ones, and so on
        fresh = [(b, i) for b, tokens in enumerate(new) if used[b] == 0 for i in range(len(tokens))]
        rounds = range(max(len(tokens) for tokens in new))
        steps = [(b, i) for i in rounds for b, tokens in enumerate(new) if used[b] and i < len(tokens)]
        order = fresh + steps
        tokens, rows = [new[b][i] for b, i in order], [b for b, _ in order]
        positions = [used[b] + i for b, i in order]
        gathered = [n for n, pair in enumerate(zip(tokens, positions, strict=True)) if self.in_second(*pair)]
        self._place(rows, positions, gathered)
        inputs = [torch.tensor([part], device=self.device, dtype=torch.long) for part in (tokens, positions, gathered)]
        if not gathered:  # mostly: then the second attention has nothing to do
            inputs[2] = None
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.weights.model(*inputs, self.attends)[0]  # (N, C)
            places = {pair: n for n, pair in enumerate(order)}
            wanted = [places[pair] for pair in enumerate(sources)]
            return self.weights.head(hidden[wanted]).float()

    def _place(self, rows: list[int], positions: list[int], gathered: list[int]) -> None:
        """As the model does, of what may have no position."""
        meta_position, lengths = self.weights.cfg.meta_position, [position + 1 for position in positions]
        zeroed = list(positions)
        if meta_position != "same":
            for n in gathered:
                zeroed[n] = 0
        self.causal.place(rows, positions if meta_position == "none_second" else zeroed, lengths)
        if self.second is not None:
            second = (rows, positions if meta_position == "none_first" else zeroed, lengths)
            self.second.place(*([part[n] for n in gathered] for part in second) if self.gathered else second)

    def forget(self, row: int) -> None:
        """Sequence `row` starts again at position 0."""
        for store in self.stores:
            store.used[row] = 0

    def keep(self, rows: list[int]) -> None:
        """Forgets all sequences but these."""
        for store in self.stores:
            store.keep(rows)


class Product(nn.Module):
    """A Linear for decoding: its weight is cast beforehand and, on a CPU, laid out as oneDNN's kernels read it.

    On few rows F.linear rearranges a bf16 weight in every call, and is slow with fp32. The packed product, the one that
    torch.compile emits, reads every weight once, and takes as long for 10 rows as for 1. One fp32 row has nothing to
    gain: F.linear reads the weights as fast as memory gives them, and no copy is made."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, rows: int):
        """rows: how many there are in most steps."""
        super().__init__()
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.packed = on_cpu and (rows > 1 or dtype == torch.bfloat16)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    def forward(self, x):
        x = x.to(self.weight.dtype)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)
