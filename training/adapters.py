"""Trains a small part of a model and freezes the rest: low-rank factors of the attentions' matrices (LoRA), and the
embeddings of the markers.

    train_only   trained                                                                frozen
    all          everything                                                             nothing
    markers      the rows of the embedding that belong to the run's markers             everything else
    lora         the same rows, and W + (alpha / r) B A in place of each matrix W of    everything else
                 the attentions, W frozen (Hu et al., arXiv 2106.09685)

Both are parametrizations of torch (torch.nn.utils.parametrize): a layer's `weight` stays what it is, and is computed
from the tensors that are frozen and trained. The forward pass, evaluations and probes therefore need no other code, and
`merge` gives back a model without adapters.
"""

import math

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.config import TrainConfig
from nanometa.data.markers import markers_of
from nanometa.data.tokenizer import MARKERS
from nanometa.model import ADAPTED, GPT

ATTENTION = ("attn.c_attn", "attn.c_proj")  # ends of the names of the layers that LoRA adapts, in both attentions


class LowRank(nn.Module):
    """Maps a frozen matrix W (out, in) to W + (alpha / r) B A, with A (r, in) and B (out, r), which starts at zero."""

    def __init__(self, weight: torch.Tensor, r: int, alpha: float):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(weight.new_empty(r, columns))
        self.B = nn.Parameter(weight.new_zeros(rows, r))
        self.scale = alpha / r

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # without autocast, so that a merged weight is the one that was trained
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.B, self.A, alpha=self.scale)


class Rows(nn.Module):
    """Joins a frozen matrix and trained rows, which stand at [start, stop) of the result (V, C)."""

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the other rows of the weight (V, C), and the rows [start, stop)."""
        return torch.cat((weight[: self.start], weight[self.stop :])), weight[self.start : self.stop].clone()

    def forward(self, frozen: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        return torch.cat((frozen[: self.start], trained, frozen[self.start :]))


def attach(model: GPT, cfg: TrainConfig, chunk_markers: int) -> GPT:
    """Freezes what cfg.train_only does not train, adds the adapters, and returns the model. It computes the same as
    before, to the bit.

    A is drawn uniformly from +-1 / sqrt(in), as in the authors' code and in peft, by a generator keyed by (seed, name
    of the parameter). chunk_markers: number of markers in a chunk of the dataset."""
    if cfg.train_only == "all":
        return model
    model.requires_grad_(False)
    model.frozen_head = True
    if marked := rows_of_markers(cfg, chunk_markers):
        parametrize.register_parametrization(model.wte, "weight", Rows(*marked))
        model.wte.parametrizations.weight.original1.requires_grad_(True)
    if cfg.train_only == "lora":
        for name, layer in list(model.named_modules()):
            if name.endswith(ATTENTION):
                _add_low_rank(layer, name, cfg)
    return model


def _add_low_rank(layer: nn.Linear, name: str, cfg: TrainConfig) -> None:
    factors = LowRank(layer.weight.detach(), cfg.lora_r, cfg.lora_alpha)
    # "unsafe" leaves out a trial run, which fails on the "meta" device: it has no autocast
    parametrize.register_parametrization(layer, "weight", factors, unsafe=True)
    if not factors.A.is_meta:
        generator = torch.Generator().manual_seed(stable_key(cfg.seed, "init", f"{name}{ADAPTED}weight.0.A") >> 1)
        bound = 1 / math.sqrt(factors.A.size(1))
        nn.init.uniform_(factors.A, -bound, bound, generator=generator)


def rows_of_markers(cfg: TrainConfig, chunk_markers: int) -> tuple[int, int] | None:
    """Returns the first row of the embedding that belongs to a marker of the run, and the first one after them; None if
    its texts have no markers."""
    places = [cfg.model.content_vocab_size + MARKERS.index(name) for name in markers_of(cfg, chunk_markers)]
    return (places[0], places[-1] + 1) if places else None


def has_adapters(model: GPT) -> bool:
    """Returns whether `attach` has added adapters to the model."""
    return any(parametrize.is_parametrized(module) for module in model.modules())


def merge(model: GPT) -> GPT:
    """Replaces adapters by the weights that they compute, and returns the model, in which everything is trainable."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model.frozen_head = False
    return model.requires_grad_(True)


def check_start(cfg: TrainConfig, chunk_markers: int, has_weights: bool) -> None:
    """Raises UserError if a new run cannot train what cfg.train_only says.

    has_weights: whether the run starts from the weights of another run or model."""
    if cfg.train_only == "all":
        return
    if not has_weights:
        raise UserError(
            f"train_only={cfg.train_only} freezes the weights that a run starts from, and init_from={cfg.init_from} "
            f"gives none: name a run or a Hugging Face GPT-2 with --init_from, or leave --train_only out."
        )
    if cfg.train_only == "markers" and not markers_of(cfg, chunk_markers):
        where = f"placements={','.join(cfg.task.placements)} place" if cfg.task.tasks else f"{cfg.dataset} has"
        raise UserError(
            f"train_only=markers has nothing to train, because {where} no markers: set --marker_place, use other data, "
            f"or set --train_only=lora."
        )
    if cfg.train_only == "lora" and cfg.lora_r > cfg.model.n_embd:
        raise UserError(
            f"lora_r={cfg.lora_r} is above n_embd={cfg.model.n_embd}, the largest rank that a matrix of the attentions "
            f"can have: set --lora_r to at most {cfg.model.n_embd}."
        )


def check_second(model: GPT, cfg: TrainConfig) -> None:
    """Raises UserError if a frozen second attention would stay without any effect.

    Weights without a second attention get one whose output is zero, and only training changes that."""
    outputs = [p for name, p in model.named_parameters() if name.endswith("second_attn.c_proj.weight")]
    if cfg.train_only == "markers" and outputs and not any(p.any() for p in outputs):
        raise UserError(
            f"second_attention={cfg.model.second_attention} would have no effect, because {cfg.init_from} has none, a "
            f"new one starts with an output of zero, and train_only=markers does not train it: set "
            f"--second_attention=none or --train_only=lora."
        )
