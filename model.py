"""GPT-2 with a second attention in every block: attention among the meta-tokens, or a control of equal size.

Each block computes

    x = x + attn(ln_1(x))
    x = x + second_attn(ln_second(x))
    x = x + mlp(ln_2(x))

The rest is GPT-2: pre-LayerNorm, tanh-GELU, tied head. The paper does not say whether its meta-attention has a residual
connection and a LayerNorm. Here it has its own of each, and its output projection is initialized to zero, so that at
step 0 every arm computes the same function as GPT-2.
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
from nanometa.layers.rope import attend_dynamic, fixed_scale, read_dynamic, rope_tables, rotate
from nanometa.layers.visibility import limited_attention
from nanometa.meta_attention import (
    CausalSelfAttention,
    MetaAttention,
    MetaMeanAttention,
    ReadMetaAttention,
    gather_rows,
)

# The layer class of each second attention, keyed by SecondAttention.connects and .others (config/arms.py).
SECOND_LAYERS = {
    ("markers", "nothing"): MetaAttention,
    ("markers", "mean"): MetaMeanAttention,
    ("markers", "read"): ReadMetaAttention,
    ("random", "nothing"): MetaAttention,
    ("all", "nothing"): CausalSelfAttention,
}

# part of the names of parameters that torch.nn.utils.parametrize makes (training/adapters.py)
ADAPTED = ".parametrizations."


class Context(NamedTuple):
    """The inputs that all blocks of one forward pass share, besides x."""

    meta_index: torch.Tensor | None
    """(B, M) positions that the second attention connects, as in a Batch; None if it connects none in this batch"""
    rotate: Callable | None = None
    """applies rotary positions to q or k of the causal attention; None for no rotary positions"""
    rotate_second: Callable | None = None
    """applies rotary positions to q or k of the second attention; None for no rotary positions"""
    attend: Callable | None = None
    """replaces the causal attention over q, k, v, for a KV cache, a dynamic rotary scale, or limits to what positions
    may read; None to use the layer's"""
    attend_second: Callable | None = None
    """replaces the second attention over q, k, v in the same way"""
    mean: Callable | None = None
    """replaces the mean that MetaMeanAttention computes over the values, for a cache; None to use the layer's"""


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the model's width, with a bias if cfg.bias is set."""

    def __init__(self, cfg: GPTConfig):
        super().__init__(cfg.n_embd, bias=cfg.bias)


class MLP(nn.Module):
    """The feed-forward layer of a block. Maps (B, T, C) to (B, T, C)."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        n_inner = cfg.n_inner or 4 * cfg.n_embd
        self.c_fc = nn.Linear(cfg.n_embd, n_inner, bias=cfg.bias)
        self.c_proj = nn.Linear(n_inner, cfg.n_embd, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # GPT-2 uses the tanh approximation
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """A transformer block: causal attention, the second attention if the arm has one, and an MLP."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        attention = (cfg.n_embd, cfg.n_head, cfg.bias, cfg.dropout)
        self.second = cfg.second
        self.ln_1 = LayerNorm(cfg)
        self.attn = CausalSelfAttention(*attention)
        if self.second.has_layer:
            # names and shapes are the same in every arm, so equal seeds draw equal weights
            self.ln_second = LayerNorm(cfg)
            self.second_attn = SECOND_LAYERS[self.second.connects, self.second.others](
                *attention, window=self.second.window
            )
        self.ln_2 = LayerNorm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """Maps x (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x), context.rotate, context.attend)
        second = (context.rotate_second, context.attend_second)
        if self.second.connects == "all":
            x = x + self.second_attn(self.ln_second(x), *second)
        elif self.second.selects and context.meta_index is not None:
            # these layers apply the norm and the residual connection themselves; MetaAttention does so only to the rows
            # of meta_index
            second += (context.mean,) if self.second.others == "mean" else ()
            x = self.second_attn(x, context.meta_index, self.ln_second, *second)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The language model. `forward` returns the final hidden states; `logits` applies the tied head to them."""

    def __init__(self, cfg: GPTConfig, seed: int = 1337):
        """Builds the model and draws its weights.

        Each parameter is drawn from its own generator, keyed by (seed, parameter name). Two arms with the same seed
        therefore start with identical values in every parameter that both have.
        Raises UserError if the vocabulary sizes in cfg are missing or inconsistent."""
        super().__init__()
        if cfg.vocab_size is None or cfg.content_vocab_size is None:
            raise UserError(
                f"vocab_size={cfg.vocab_size} and content_vocab_size={cfg.content_vocab_size} must both be numbers, "
                f"because they set the size of the embedding: take them from the dataset's tokenizer."
            )
        if not 1 <= cfg.content_vocab_size <= cfg.vocab_size:
            raise UserError(
                f"content_vocab_size={cfg.content_vocab_size} must lie in 1 .. vocab_size={cfg.vocab_size}, because "
                f"content ids are the first rows of the embedding: take both from the dataset's tokenizer."
            )
        self.cfg = cfg
        cfg.check_position()
        self.recompute = False  # activation checkpointing: recompute each block in the backward pass to save memory
        self.frozen_head = False  # whether all rows of wte that the head predicts are frozen (training/adapters.py)
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.position == "learned":
            self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = LayerNorm(cfg)
        if not self.wte.weight.is_meta:  # training/estimate.py builds the model on the meta device, without values
            self._init_weights(seed)

    @torch.no_grad()
    def _init_weights(self, seed: int) -> None:
        """Initializes as GPT-2 does, with zeros in the second attention's output projection.

        Weights are drawn from N(0, 0.02), and from N(0, 0.02 / sqrt(2 n_layer)) in residual projections."""
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
                raise AssertionError(f"_init_weights does not know the parameter {name}: add a rule for it.")

    def forward(self, tokens, positions, meta_index, reads_from=None, read_until=None, attends=None):
        """Returns the final hidden states (B, T, C), after ln_f, for tokens (B, T) and positions (B, T).

        meta_index (B, M): positions that the second attention connects, as in a Batch; None if it connects none.
        reads_from, read_until (B, T): limits to what positions may read, as in a Batch; None = no limit.
        attends: for each block, the functions that replace its causal attention, its second attention and the mean of
            its values (inference/cache.py). The first two receive rotated q and k, except under rope_dynamic."""
        if meta_index is None and self.cfg.second.others != "nothing":  # the other positions are computed all the same
            meta_index = tokens.new_empty(len(tokens), 0)
        no_position = self._without_position(tokens, meta_index)
        x = self.wte(tokens)  # (B, T, C)
        if self.cfg.position == "learned":
            context = Context(meta_index)
            pos_emb = self.wpe(positions)
            x = x + (pos_emb if no_position is None else pos_emb.masked_fill(no_position[..., None], 0))
        else:
            context = self._rotary_context(positions, meta_index, no_position)
        means_at = meta_index if self.cfg.summary == "mean" else None
        dropout_p = self.cfg.dropout if self.training else 0.0
        limited = limited_attention(reads_from, read_until, x.size(1), dropout_p, means_at)
        if limited is not None:
            # a second attention among markers reads no text, and markers are never forgotten
            second = limited if self.cfg.second.connects == "all" else None
            context = context._replace(attend=limited, attend_second=second)
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            if attends is not None:
                names = ("attend", "attend_second", "mean")
                context = context._replace(**dict(zip(names, attends[layer], strict=False)))
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.ln_f(x)

    def _without_position(self, tokens, meta_index) -> torch.Tensor | None:
        """Returns a mask (B, T) of the tokens whose position at least one of the two attentions does not see.

        These are the tokens at meta_index, depending on meta_position. Returns None if there are none."""
        if self.cfg.meta_position in ("same", "previous") or meta_index is None:
            return None
        B, T = tokens.shape
        no_position = torch.zeros(B, T + 1, dtype=torch.bool, device=tokens.device)
        return no_position.scatter(1, meta_index, True)[:, :T]  # the padding index T falls into the extra column

    def _rotary_context(self, positions, meta_index, no_position) -> Context:
        """Returns the Context that applies rotary positions (B, T) in both attentions.

        With a fixed scale it holds functions that rotate q and k. With a dynamic scale it holds functions that replace
        the attentions, because each query then rotates all its keys anew."""
        cfg, lengths = self.cfg, positions + 1  # lengths: number of positions read once each token has arrived
        zeroed = (
            positions if no_position is None else positions.masked_fill(no_position, 0)
        )  # position 0 means no rotation
        first = positions if cfg.meta_position == "none_second" else zeroed
        second = positions if cfg.meta_position == "none_first" else zeroed
        second_lengths = lengths
        if cfg.second.gathers and meta_index is not None:  # gathered rows keep their positions in the window: (B, M)
            second = gather_rows(second[..., None], meta_index).squeeze(-1)
            second_lengths = gather_rows(lengths[..., None], meta_index).squeeze(-1)
        if cfg.rope_dynamic:
            attend = functools.partial(attend_dynamic, positions=first, lengths=lengths, cfg=cfg, window=None)
            if cfg.second.others == "read":
                attend_second = functools.partial(
                    read_dynamic, index=meta_index, positions=second, lengths=lengths, cfg=cfg
                )
            else:
                attend_second = functools.partial(
                    attend_dynamic, positions=second, lengths=second_lengths, cfg=cfg, window=cfg.second.window
                )
            return Context(meta_index, attend=attend, attend_second=attend_second)
        scale = fixed_scale(cfg, first.device)
        tables = rope_tables(first, cfg, scale)
        second_tables = tables if second is first else rope_tables(second, cfg, scale)
        rotates = [functools.partial(rotate, cos=cos, sin=sin) for cos, sin in (tables, second_tables)]
        return Context(meta_index, rotate=rotates[0], rotate_second=rotates[1])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits (..., vocab_size) of hidden states (..., C).

        Ids >= content_vocab_size are markers and spare rows. They are never predicted, so their logits are -inf."""
        logits = F.linear(hidden, self.wte.weight).float()
        return mask_unpredictable_(logits, self.cfg.content_vocab_size)

    def num_params(self, position_table: bool = True) -> int:
        """Returns the number of parameters. nanoGPT counts without the learned position table: position_table=False."""
        names = (n for n, _ in self.named_parameters() if position_table or n != "wpe.weight")
        return sum(self.get_parameter(name).numel() for name in names)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Returns optimizer groups of the parameters that are not frozen. Matrices and embeddings get weight decay;
        biases, LayerNorms and adapters do not."""
        params = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decay = [p for name, p in params.items() if p.dim() >= 2 and ADAPTED not in name]
        no_decay = [p for name, p in params.items() if p.dim() < 2 or ADAPTED in name]
        assert len(decay) + len(no_decay) == len({id(p) for p in params.values()}), (
            "each parameter belongs in exactly one group"
        )
        return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
