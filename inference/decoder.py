"""Decoding with a KV cache: only new tokens are computed.

Every block has one cache for causal attention and one for its second attention. The cache of causal attention holds all
positions, or those that later ones may still read. The cache of the second attention holds the positions that it
connects: only the markers, which makes it small, or the randomly drawn positions, or all. A second attention that
averages values also has their sums. The new tokens of all sequences are packed into one row (1, N) for the model's own
forward pass, whether they are a whole prompt or one token each. No layer therefore sees padding, and only the attention
functions know which token belongs to which sequence.
"""

import copy
import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanometa.data.layout import FOREVER
from nanometa.data.markers import Row
from nanometa.inference.cache import RunningSums, Store
from nanometa.inference.limited_cache import LimitedStore
from nanometa.model import GPT

FEW = 4  # rows that a step of decoding may add to a sequence; more are read like a prompt
PIECE = 512  # rows of a prompt that a limited cache reads at a time

Forgotten = list[list[tuple[int, int]]]  # for each sequence, pairs (place, read_until)


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

    def __init__(
        self,
        weights: DecodingWeights,
        B: int,
        slots: int,
        second_slots: int,
        in_second: Callable,
        limited: bool = False,
    ):
        """slots: the largest number of positions that a sequence will use in its window; a limited cache grows instead.
        second_slots: the largest number of them that a second attention among some positions connects.
        in_second: function of (token, place) that returns whether such a second attention connects the token. With
            any other second attention, or none, it returns whether the token is a marker that may have no position.
        limited: whether positions may have limits to what they read, and are forgotten."""
        cfg = weights.cfg
        self.weights, self.device = weights, weights.device
        self.in_second, self.reading = in_second, cfg.second.others == "read"
        self.places = [0] * B  # number of tokens that were read of each sequence in its window
        kind = (weights.dtype, self.device)
        self.limited = limited
        new_store = functools.partial(LimitedStore, cfg, B) if limited else functools.partial(Store, cfg, B, slots)
        self.causal, self.second, self.sums = new_store(*kind), None, None
        functions = [self.causal.attend]
        if cfg.second.has_layer:
            if cfg.second.selects:
                # one slot at least, for the tokens of a text without markers that have nothing to read
                self.second = Store(cfg, B, max(second_slots, 1), *kind, cfg.second.window)
            else:
                self.second = new_store(*kind, window=cfg.second.window)
            functions.append(self.second.read if self.reading else self.second.attend)
        if cfg.second.others == "mean":
            self.sums = RunningSums(cfg, B, self.device)
            functions.append(self.sums.mean)
        self.stores = [store for store in (self.causal, self.second, self.sums) if store is not None]
        self.attends = [
            tuple(functools.partial(function, layer) for function in functions) for layer in range(cfg.n_layer)
        ]

    @torch.inference_mode()
    def read(self, new: list[list[Row]], sources: list[int], forgotten: Forgotten | None = None) -> torch.Tensor:
        """Reads new tokens of every sequence. Returns the logits (B, content_vocab_size), fp32, of one of them each.

        new[b]: the rows that follow those already read of sequence b.
        sources[b]: index in new[b] of the row whose logits to return.
        forgotten[b]: pairs (place, read_until) of places whose read_until is known now; None = there are none.

        A limited cache reads long prompts in pieces, and forgets between them, so that it never holds all of a prompt.
        """
        forgotten, found = forgotten or [[] for _ in new], {}
        longest = max(map(len, new))
        size = PIECE if self.limited else longest
        for start in range(0, longest, size):
            hidden = self._hidden([rows[start : start + size] for rows in new], forgotten)
            found |= {(b, start + i): h for (b, i), h in hidden.items() if sources[b] == start + i}
        with torch.autocast(self.device.type, enabled=False):
            return self.weights.head(torch.stack([found[pair] for pair in enumerate(sources)])).float()

    def compress(self, sequence: int, first: int, last: int, marks: tuple[int, int]) -> None:
        """Compresses a span that was already read: reads <|cl|> and <|cr|>, and forgets the places first .. last.

        The closing marker reads the span and the opening marker alone, as in training, so nothing is computed again.
        What was read behind the span has seen its text. marks: the ids of both markers; both get the position of the
        last place. Raises ValueError if the cache is not limited, or does not hold all of the span."""
        if not self.limited:
            raise ValueError("only a limited cache can forget a span")
        places, here = self.causal.place_of[sequence], self.places[sequence]
        if np.isin(range(first, last + 1), self.causal.kept(sequence)).sum() != last + 1 - first or first > last:
            raise ValueError(f"the cache does not hold the span of places {first} .. {last}")
        position = int(self.causal.position_of[sequence][places == last][0])
        rows = [
            Row(marks[0], -1, position, here, here + 1),
            Row(marks[1], -1, position, first, FOREVER, reads_to=last),
        ]
        forgotten = [[] for _ in self.places]
        forgotten[sequence] = [(place, here + 1) for place in range(first, last + 1)]
        with torch.inference_mode():
            self._hidden([rows if b == sequence else [] for b in range(len(self.places))], forgotten)

    def _hidden(self, new: list[list[Row]], forgotten: Forgotten) -> dict[tuple[int, int], torch.Tensor]:
        """Reads new tokens. Returns the final hidden state (C,) of row i of sequence b, by (b, i)."""
        # the packed order: prompts first, then the first new token of every other sequence, then the second, ...
        whole = [place == 0 or (self.limited and len(rows) > FEW) for place, rows in zip(self.places, new, strict=True)]
        prompts = [(b, i) for b, rows in enumerate(new) if whole[b] for i in range(len(rows))]
        rounds = range(max(map(len, new)))
        steps = [(b, i) for i in rounds for b, rows in enumerate(new) if not whole[b] and i < len(rows)]
        order = prompts + steps
        inputs, sequences = [new[b][i] for b, i in order], [b for b, _ in order]
        tokens, places = [row.token for row in inputs], [self.places[b] + i for b, i in order]
        gathered = [n for n, pair in enumerate(zip(tokens, places, strict=True)) if self.in_second(*pair)]
        self._place(sequences, inputs, gathered, forgotten)
        self.places = [place + len(rows) for place, rows in zip(self.places, new, strict=True)]
        columns = (tokens, [row.position for row in inputs], gathered)
        args = [torch.tensor([column], device=self.device, dtype=torch.long) for column in columns]
        if not gathered:  # the common case: a second attention that changes only gathered rows can be skipped
            args[2] = None
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.weights.model(*args, attends=self.attends)[0]  # (N, C)
        for store in self.stores:
            store.evict()
        return dict(zip(order, hidden, strict=True))

    def _place(self, sequences: list[int], inputs: list[Row], gathered: list[int], forgotten: Forgotten) -> None:
        """Assigns cache slots in all caches, with positions zeroed as GPT does under meta_position."""
        cfg, positions = self.weights.cfg, [row.position for row in inputs]
        lengths = [position + 1 for position in positions]
        zeroed = list(positions)
        if cfg.meta_position not in ("same", "previous"):
            for n in gathered:
                zeroed[n] = 0
        if self.limited:
            self.causal.place_rows(sequences, inputs, forgotten, gathered)
        else:
            self.causal.place(sequences, positions if cfg.meta_position == "none_second" else zeroed, lengths)
        if self.second is not None:
            second = (sequences, positions if cfg.meta_position == "none_first" else zeroed, lengths)
            if self.reading:
                members = set(gathered)
                self.second.place(*second, stored=[n in members for n in range(len(sequences))])
            elif cfg.second.gathers:
                self.second.place(*([part[n] for n in gathered] for part in second))
            elif self.limited:
                self.second.place_rows(sequences, inputs, forgotten, gathered)
            else:
                self.second.place(*second)
        if self.sums is not None:
            self.sums.place(sequences)

    @property
    def position_bytes(self) -> int:
        """The bytes that a limited cache takes for one position of one sequence."""
        stores = [store for store in self.stores if isinstance(store, LimitedStore)]
        return sum(2 * store.cfg.n_layer * store.cfg.n_embd * store.dtype.itemsize for store in stores)

    def forget(self, row: int) -> None:
        """Empties the cache of sequence `row`, which then starts again at place 0."""
        self.places[row] = 0
        for store in self.stores:
            store.clear(row)

    def keep(self, rows: list[int]) -> None:
        """Drops the cache of every sequence except those listed."""
        self.places = [self.places[row] for row in rows]
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
