"""Decoding with a KV cache: keys and values of tokens already read are stored, and only new tokens are computed.

Every block has one cache for causal attention and one for its second attention. The cache of causal attention holds all
positions. The cache of the second attention holds the positions that it connects: only the markers, which makes it
small, or the randomly drawn positions, or all. A second attention that averages values also has their sums. The new
tokens of all sequences are packed into one row (1, N) for the model's own forward pass, whether they are a whole prompt
or one token each. No layer therefore sees padding, and only the attention functions know which token belongs to which
sequence.
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
    """The KV cache of one attention in every block, for B sequences: keys and values (n_layer, B, S, H, D) each.

    Keys are stored rotated, except under rope_dynamic, where every new token rotates all of them again."""

    def __init__(
        self, cfg: GPTConfig, B: int, S: int, dtype: torch.dtype, device: torch.device, window: int | None = None
    ):
        """window: number of most recent keys that a query attends to; None for all previous keys."""
        size = (cfg.n_layer, B, S, cfg.n_head, cfg.n_embd // cfg.n_head)
        # zeros instead of empty memory: a masked key has weight 0, but 0 * NaN is NaN
        self.k, self.v = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.used, self.window = [0] * B, window
        self.cfg, self.positions = cfg, torch.zeros(B, S, dtype=torch.long, device=device)

    def place(
        self, rows: list[int], positions: list[int], lengths: list[int], stored: list[bool] | None = None
    ) -> None:
        """Assigns a cache slot to every token of a packed row, and plans the attention calls that `attend` will make.

        rows: the sequence that each token belongs to.
        positions: the position by which RoPE rotates each token.
        lengths: the length of the token's text up to and including it.
        stored: whether the token's key and value enter the cache; None: those of all tokens. The others only read. A
            token without any key to read is given slot 0, and `read` tells the layer to discard its output.

        Sets `calls` to one tuple (start, end, sequences, keys, mask) for each attention call. A call computes the
        tokens start .. end - 1, which are either several tokens of one sequence or one token of each of several
        sequences. `sequences` is the slice of these sequences, `keys` the number of cached keys that they read. A
        prompt reads only its own keys, and its tuple is (start, end, None, 0, None)."""
        B, S = self.k.shape[1:3]
        self.calls: list[tuple[int, int, slice | None, int, torch.Tensor | None]] = []
        slots, reads, n = [], [], 0
        for row, group in itertools.groupby(rows):
            count, used = len(list(group)), self.used[row]
            new = [True] * count if stored is None else stored[n : n + count]
            *_, self.used[row] = seen = list(itertools.accumulate(new, initial=used))
            slots += range(row * S + used, row * S + self.used[row])
            reads += [keys > 0 for keys in seen[1:]]
            seen = [max(keys, 1) for keys in seen[1:]]  # number of cached keys that each token sees
            if used == 0 and stored is None:
                self.calls.append((n, n + count, None, 0, None))
            elif self.cfg.rope_dynamic:  # every token has its own scale, so it needs its own call
                for i, keys in enumerate(seen):
                    mask = self._mask([keys])
                    mask = None if mask is None else mask[None, None]  # (1, 1, 1, keys)
                    self.calls.append((n + i, n + i + 1, slice(row, row + 1), keys, mask))
            else:
                mask = self._mask(seen)
                mask = None if mask is None else mask[None, None]  # (1, 1, count, keys)
                self.calls.append((n, n + count, slice(row, row + 1), seen[-1], mask))
            n += count
        self.slots = torch.tensor(slots, device=self.k.device, dtype=torch.long)
        self.reads = torch.tensor([reads], device=self.k.device, dtype=torch.bool)  # (1, N)
        if self.cfg.rope_dynamic:
            self.at = torch.tensor([positions, lengths], device=self.k.device, dtype=torch.long)  # (2, N)
            new = self.at[0] if stored is None else self.at[0, [n for n, kept in enumerate(stored) if kept]]
            self.positions.flatten().index_copy_(0, self.slots, new)
        tokens_of = [(call[1] - call[0], call[2]) for call in self.calls[:B]]
        if B > 1 and tokens_of == [(1, slice(row, row + 1)) for row in range(B)]:
            # the first B calls are one token of every sequence: merge them into one batched call
            lengths = [call[3] for call in self.calls[:B]]
            mask = self._mask(lengths)
            mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, keys)
            self.calls[:B] = [(0, B, slice(0, B), max(lengths), mask)]

    def _mask(self, lengths: list[int]) -> torch.Tensor | None:
        """Returns the additive mask (queries, keys) for queries that follow different numbers of keys.

        Query i sees the first lengths[i] keys, or only the last `window` of them. The mask has max(lengths) columns.
        Returns None if every query sees every key."""
        longest = max(lengths)
        if min(lengths) == longest and (self.window is None or longest <= self.window):
            return None
        keys, lengths = torch.arange(longest), torch.tensor(lengths)[:, None]
        hidden = keys >= lengths
        if self.window is not None:
            hidden |= keys < lengths - self.window
        return torch.zeros(hidden.shape, dtype=self.k.dtype).masked_fill(hidden, -math.inf).to(self.k.device)

    def attend(self, layer: int, q, k, v):
        """Computes the attention of one layer for the tokens given to `place`; it replaces causal_sdpa.

        Takes q, k, v (1, H, N, D) of these tokens, stores k and v in the cache, and returns (1, H, N, D). Of tokens
        that are not stored it takes only q."""
        if not self.calls:
            return q  # no token: q is empty
        for cache, new in ((self.k[layer], k), (self.v[layer], v)):
            cache.flatten(0, 1).index_copy_(0, self.slots, new[0].transpose(0, 1))
        out = []
        for start, end, rows, keys, mask in self.calls:
            part = q[:, :, start:end]
            if rows is None:
                prompt = (part, k[:, :, start:end], v[:, :, start:end])
                if self.cfg.rope_dynamic:
                    y = attend_dynamic(*prompt, *self.at[:, None, start:end], self.cfg, self.window)
                else:
                    y = causal_sdpa(*prompt, dropout_p=0.0, window=self.window)
            else:
                several = rows.stop - rows.start > 1
                part = part.transpose(0, 2) if several else part
                cached = [x[layer, rows, :keys].transpose(1, 2) for x in (self.k, self.v)]  # (B, H, keys, D)
                if self.cfg.rope_dynamic:
                    positions, lengths = self.at[:, start:end]
                    y = attend_one(
                        part, *cached, positions[:, None], self.positions[rows, :keys], lengths, self.cfg, mask
                    )
                else:
                    y = F.scaled_dot_product_attention(part, *cached, attn_mask=mask)
                y = y.transpose(0, 2) if several else y
            out.append(y)
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def read(self, layer: int, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces read_sdpa: returns what `attend` does, and whether each token has a key to read (1, N)."""
        return self.attend(layer, q, k, v), self.reads

    def keep(self, rows: list[int]) -> None:
        """Drops the cache of every sequence except those listed."""
        self.k, self.v, self.positions = self.k[:, rows], self.v[:, rows], self.positions[rows]
        self.used = [self.used[row] for row in rows]


class RunningSums:
    """The sums of the values of all tokens read, (n_layer, B, C) in fp32, from which MetaMeanAttention continues."""

    def __init__(self, cfg: GPTConfig, B: int, device: torch.device):
        self.sums, self.used = torch.zeros(cfg.n_layer, B, cfg.n_embd, device=device), [0] * B

    def place(self, rows: list[int]) -> None:
        """Plans the calls of `mean` for a packed row. rows: the sequence that each token belongs to.

        Sets `calls` to one tuple (start, end, sequence, number of its tokens read before) for each group of tokens."""
        self.calls, n = [], 0
        for row, group in itertools.groupby(rows):
            count = len(list(group))
            self.calls.append((n, n + count, row, self.used[row]))
            self.used[row] += count
            n += count

    def mean(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """Replaces running_mean for the tokens given to `place`: takes their values (1, N, C), returns (1, N, C)."""
        out = []
        for start, end, row, used in self.calls:
            sums = values[0, start:end].cumsum(0, dtype=torch.float32)
            if used:
                sums += self.sums[layer, row]
            self.sums[layer, row] = sums[-1]
            out.append(sums / torch.arange(used + 1, used + 1 + end - start, device=sums.device)[:, None])
        return torch.cat(out)[None]

    def keep(self, rows: list[int]) -> None:
        """Drops the sums of every sequence except those listed."""
        self.sums, self.used = self.sums[:, rows], [self.used[row] for row in rows]


class DecodingWeights:
    """A copy of a model with its weights prepared for fast decoding. It can be used for any number of texts.

    The original model is not changed. Weights that are neither cast nor packed are shared with it, the others are
    copies: build a new instance after the model has been trained further."""

    def __init__(self, model: GPT, dtype: torch.dtype, rows: int):
        """dtype: bfloat16 casts the weights of the linear layers once, and computes as autocast does: LayerNorm,
            residuals and logits stay fp32.
        rows: number of tokens in most steps, which is the batch size."""
        self.cfg, self.dtype, self.device = model.cfg, dtype, model.wte.weight.device
        # copy the modules, but share the parameters
        self.model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, Product(child.weight, child.bias, dtype, rows))
        self.head = Product(model.wte.weight[: model.cfg.content_vocab_size], None, dtype, rows)


class Decoder:
    """The decoding state of B sequences: their KV caches, and the step that reads their new tokens."""

    def __init__(self, weights: DecodingWeights, B: int, slots: int, second_slots: int, in_second: Callable):
        """slots: the largest number of positions that a sequence will use in its window.
        second_slots: the largest number of them that a second attention among some positions connects.
        in_second: function of (token, position) that returns whether such a second attention connects the token. With
            any other second attention, or none, it returns whether the token is a marker, since markers may have no
            position."""
        cfg = weights.cfg
        self.weights, self.device = weights, weights.device
        self.in_second, self.reading = in_second, cfg.second.others == "read"
        kind = (weights.dtype, self.device)
        self.causal, self.second, self.sums = Store(cfg, B, slots, *kind), None, None
        functions = [self.causal.attend]
        if cfg.second.has_layer:
            # one slot at least, for the tokens of a text without markers that have nothing to read
            self.second = Store(cfg, B, max(second_slots, 1) if cfg.second.selects else slots, *kind, cfg.second.window)
            functions.append(self.second.read if self.reading else self.second.attend)
        if cfg.second.others == "mean":
            self.sums = RunningSums(cfg, B, self.device)
            functions.append(self.sums.mean)
        self.stores = [store for store in (self.causal, self.second, self.sums) if store is not None]
        self.attends = [
            tuple(functools.partial(function, layer) for function in functions) for layer in range(cfg.n_layer)
        ]

    @torch.inference_mode()
    def read(self, new: list[list[int]], sources: list[int]) -> torch.Tensor:
        """Reads new tokens of every sequence. Returns the logits (B, content_vocab_size), fp32, of one of them each.

        new[b]: the tokens that follow those already read of sequence b.
        sources[b]: index in new[b] of the token whose logits to return."""
        used = self.causal.used
        # the packed order: whole prompts first, then the first new token of every other sequence, then the second, ...
        prompts = [(b, i) for b, tokens in enumerate(new) if used[b] == 0 for i in range(len(tokens))]
        rounds = range(max(len(tokens) for tokens in new))
        steps = [(b, i) for i in rounds for b, tokens in enumerate(new) if used[b] and i < len(tokens)]
        order = prompts + steps
        tokens, rows = [new[b][i] for b, i in order], [b for b, _ in order]
        positions = [used[b] + i for b, i in order]
        gathered = [n for n, pair in enumerate(zip(tokens, positions, strict=True)) if self.in_second(*pair)]
        self._place(rows, positions, gathered)
        inputs = [torch.tensor([part], device=self.device, dtype=torch.long) for part in (tokens, positions, gathered)]
        if not gathered:  # the common case: a second attention that changes only gathered rows can be skipped
            inputs[2] = None
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.weights.model(*inputs, attends=self.attends)[0]  # (N, C)
            index_of = {pair: n for n, pair in enumerate(order)}
            wanted = [index_of[pair] for pair in enumerate(sources)]
            return self.weights.head(hidden[wanted]).float()

    def _place(self, rows: list[int], positions: list[int], gathered: list[int]) -> None:
        """Assigns cache slots in both caches, with positions zeroed as GPT does under meta_position."""
        meta_position, lengths = self.weights.cfg.meta_position, [position + 1 for position in positions]
        zeroed = list(positions)
        if meta_position not in ("same", "previous"):
            for n in gathered:
                zeroed[n] = 0
        self.causal.place(rows, positions if meta_position == "none_second" else zeroed, lengths)
        if self.second is not None:
            second = (rows, positions if meta_position == "none_first" else zeroed, lengths)
            if self.reading:
                members = set(gathered)
                self.second.place(*second, stored=[n in members for n in range(len(rows))])
            elif self.weights.cfg.second.gathers:
                self.second.place(*([part[n] for n in gathered] for part in second))
            else:
                self.second.place(*second)
        if self.sums is not None:
            self.sums.place(rows)

    def forget(self, row: int) -> None:
        """Empties the cache of sequence `row`, which then starts again at position 0."""
        for store in self.stores:
            store.used[row] = 0

    def keep(self, rows: list[int]) -> None:
        """Drops the cache of every sequence except those listed."""
        for store in self.stores:
            store.keep(rows)


class Product(nn.Module):
    """A linear layer for decoding. Its weight is cast once and, on a CPU, multiplied by oneDNN's kernels.

    On few rows, F.linear repacks a bf16 weight in every call. In fp32 it multiplies in MKL, which on AMD's processors
    leaves much of the memory's bandwidth unused for a single row. oneDNN, whose products torch.compile also emits,
    reads every weight once and takes as long for 10 rows as for 1. The weight is packed into the layout of its kernels,
    except for a single fp32 row, which gains little from that for a copy of all weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, rows: int):
        """rows: number of rows of the input in most steps."""
        super().__init__()
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.onednn = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if dtype == torch.bfloat16:  # a CPU without AVX512 has no such kernels in bf16
            self.onednn = self.onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.onednn and (rows > 1 or dtype == torch.bfloat16):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    def forward(self, x):
        x = x.to(self.weight.dtype)
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)
