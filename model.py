"""GPT-2 with a second attention in every block, for meta-tokens or for a control of equal size.

x += attn(ln_1(x));  x += second_attn(ln_second(x));  x += mlp(ln_2(x))

Pre-LayerNorm, tanh-GELU and tied head as GPT-2. The paper gives neither residual nor LayerNorm of its meta-attention;
here it has both of its own, and its output projection starts at zero, so that step 0 is GPT-2 in every arm.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.config import GPTConfig
from nanometa.layers.loss import mask_unpredictable_
from nanometa.layers.rope import attend_dynamic, fixed_scale, rope_tables, rotate
from nanometa.meta_attention import CausalSelfAttention, MetaAttention, gather_rows

# The layer of a second attention, by what it connects (config/arms.py).
SECOND_LAYERS = {"markers": MetaAttention, "random": MetaAttention, "all": CausalSelfAttention}


class Context(NamedTuple):
    """What the blocks of one forward share beside x."""

    meta_index: torch.Tensor | None
    """(B, M) positions that a second attention gathers, as in a Batch; None: none, in any row"""
    rotate: Callable | None = None
    """rotates q or k of causal attention by its positions; None: no rotary positions"""
    rotate_second: Callable | None = None
    """the same for the second attention"""
    attend: Callable | None = None
    """replaces causal attention of q, k, v, for a cache or a dynamic scale; None: the layer's own"""
    attend_second: Callable | None = None
    """the same for the second attention"""


class LayerNorm(nn.LayerNorm):
    """LayerNorm with an optional bias (torch's own constructor couples it to the weight's)."""

    def __init__(self, cfg: GPTConfig):
        super().__init__(cfg.n_embd, bias=cfg.bias)


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        n_inner = cfg.n_inner or 4 * cfg.n_embd
        self.c_fc = nn.Linear(cfg.n_embd, n_inner, bias=cfg.bias)
        self.c_proj = nn.Linear(n_inner, cfg.n_embd, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # erf would not be GPT-2


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        attention = (cfg.n_embd, cfg.n_head, cfg.bias, cfg.dropout)
        self.second = cfg.second
        self.ln_1 = LayerNorm(cfg)
        self.attn = CausalSelfAttention(*attention)
        if self.second.has_layer:
            # the same names and shapes in every arm, so that equal seeds draw equal weights
            self.ln_second = LayerNorm(cfg)
            self.second_attn = SECOND_LAYERS[self.second.connects](*attention, window=self.second.window)
        self.ln_2 = LayerNorm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), context.rotate, context.attend)
        how = (context.rotate_second, context.attend_second)
        if self.second.gathers and context.meta_index is not None:  # adds to the rows of meta_index
            x = self.second_attn(x, context.meta_index, self.ln_second, *how)
        elif self.second.has_layer and not self.second.gathers:
            x = x + self.second_attn(self.ln_second(x), *how)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """forward gives the final hidden states; `logits` is the tied head."""

    def __init__(self, cfg: GPTConfig, seed: int = 1337):
        """Raises UserError unless the vocabulary is set. Each parameter is drawn from a generator keyed by (seed, its
        name), so arms share the weights that they share, whatever else they have."""
        super().__init__()
        if cfg.vocab_size is None or cfg.content_vocab_size is None:
            raise UserError("vocab_size and content_vocab_size are not set: take them from the dataset's tokenizer.")
        if not 1 <= cfg.content_vocab_size <= cfg.vocab_size:
            raise UserError(
                f"content_vocab_size={cfg.content_vocab_size} must lie in 1 .. vocab_size={cfg.vocab_size}."
            )
        self.cfg = cfg
        cfg.check_position()
        self.recompute = False  # activation checkpointing: what a block saves is made again in the backward
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.position == "learned":
            self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = LayerNorm(cfg)
        if not self.wte.weight.is_meta:  # only counted, by training/estimate.py: there are no numbers to draw
            self._init_weights(seed)

    @torch.no_grad()
    def _init_weights(self, seed: int) -> None:
        """GPT-2's: N(0, 0.02), projections into the residual stream 0.02 / sqrt(2 n_layer); second_attn's at zero."""
        for name, p in self.named_parameters():
            generator = torch.Generator().manual_seed(stable_key(seed, "init", name) >> 1)
            if name.endswith(".bias") or name.endswith("second_attn.c_proj.weight"):
                p.zero_()
            elif ".ln_" in name or name.startswith("ln_f"):
                p.fill_(1)
            elif name.endswith("c_proj.weight"):
                p.normal_(0, 0.02 / math.sqrt(2 * self.cfg.n_layer), generator=generator)
            elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight")):
                p.normal_(0, 0.02, generator=generator)
            else:
                raise AssertionError(f"no initialisation is written for {name}")

    def forward(self, tokens, positions, meta_index, attends=None):
        """Returns the hidden states after ln_f (B, T, C) of tokens and positions (B, T).

        meta_index (B, M): as in a Batch; None: the second attention connects nothing in these texts.
        attends: for each block what its two attentions call in place of causal attention (inference/cache.py); q and k
        come rotated, unless rope_dynamic."""
        x = self.wte(tokens)  # (B, T, C)
        unplaced = self._unplaced(tokens, meta_index)
        context = Context(meta_index)
        if self.cfg.position == "learned":
            place = self.wpe(positions)
            x = x + (place if unplaced is None else place.masked_fill(unplaced[..., None], 0))
        else:
            context = self._rotary(positions, meta_index, unplaced)
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            if attends is not None:
                context = context._replace(**dict(zip(("attend", "attend_second"), attends[layer], strict=False)))
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.ln_f(x)

    def _unplaced(self, tokens, meta_index) -> torch.Tensor | None:
        """Returns the positions (B, T) whose place is hidden from one attention or from both; None: no one's."""
        if self.cfg.meta_position == "same" or meta_index is None:
            return None
        B, T = tokens.shape
        unplaced = torch.zeros(B, T + 1, dtype=torch.bool, device=tokens.device)
        return unplaced.scatter(1, meta_index, True)[:, :T]  # pads, T, mark the column that is cut off

    def _rotary(self, positions, meta_index, unplaced) -> Context:
        """Returns the context under rotary positions: what rotates q and k, or, if the scale is dynamic, what replaces
        causal attention of q and k that are not rotated."""
        cfg, lengths = self.cfg, positions + 1  # of the text when a token comes
        zeroed = positions if unplaced is None else positions.masked_fill(unplaced, 0)  # an angle of 0 turns nothing
        first = positions if cfg.meta_position == "none_second" else zeroed
        second = positions if cfg.meta_position == "none_first" else zeroed
        at = [(first, lengths), (second, lengths)]
        if cfg.second.gathers and meta_index is not None:  # gathered rows keep their position in the window: (B, M)
            at[1] = tuple(gather_rows(x[..., None], meta_index).squeeze(-1) for x in at[1])
        if cfg.rope_dynamic:
            windows = (None, cfg.second.window)
            attends = [
                functools.partial(attend_dynamic, positions=p, lengths=n, cfg=cfg, window=window)
                for (p, n), window in zip(at, windows, strict=True)
            ]
            return Context(meta_index, attend=attends[0], attend_second=attends[1])
        tables = rope_tables(first, cfg, fixed_scale(cfg, first.device))
        tables = tables, tables if at[1][0] is first else rope_tables(at[1][0], cfg, fixed_scale(cfg, first.device))
        rotates = [functools.partial(rotate, cos=cos, sin=sin) for cos, sin in tables]
        return Context(meta_index, rotate=rotates[0], rotate_second=rotates[1])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> logits (..., vocab_size); ids >= content_vocab_size are never predicted: -inf."""
        logits = F.linear(hidden, self.wte.weight).float()
        return mask_unpredictable_(logits, self.cfg.content_vocab_size)

    def num_params(self, position_table: bool = True) -> int:
        """Parameters; without the table of learned positions as nanoGPT counts."""
        names = (n for n, _ in self.named_parameters() if position_table or n != "wpe.weight")
        return sum(self.get_parameter(name).numel() for name in names)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups: matrices and embeddings decay, biases and LayerNorms do not."""
        params = list(self.parameters())
        decay, rest = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
        assert len(decay) + len(rest) == len({id(p) for p in params}), "a parameter is in no group or in two"
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
