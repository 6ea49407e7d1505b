"""Longer windows: what changes in a model's settings, its learned table, and in a run that is read further than it was
trained."""

import dataclasses

import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, Rescale
from nanometa.training.checkpoint import Run


def stretched(m: GPTConfig, scaling: str, factor: float, **more) -> GPTConfig:
    """m with its window `factor` times as long as the one that its positions were trained in, before any extension.

    more: other settings of the scaling. Raises UserError if the window would not be whole, or a learned table, which
    is interpolated once, was already."""
    window = m.original_block_size
    if m.position == "learned" and m.rope_factor != 1:
        raise UserError(
            f"rope_factor={factor}, and the learned positions are interpolated already, by {m.rope_factor:g}: take the "
            f"run that this one came from."
        )
    block_size = round(window * factor)
    if abs(block_size - window * factor) > 1e-6:
        raise UserError(
            f"rope_factor={factor} makes {window * factor:.2f} positions of {window}: take a factor that makes a whole "
            f"number."
        )
    return dataclasses.replace(m, rope_scaling=scaling, rope_factor=factor, block_size=block_size, **more)


def interpolated(table: torch.Tensor, factor: float, rows: int) -> torch.Tensor:
    """A table of learned positions (T, C) -> (rows, C): position m reads the old one m / factor, linearly between two
    rows, as position interpolation has it (arXiv 2306.15595). Beyond the last row it is the last."""
    at = (torch.arange(rows, device=table.device, dtype=table.dtype) / factor).clamp(max=len(table) - 1)
    below = at.long()
    above = (below + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[below], table[above], (at - below)[:, None])


def rescaled(run: Run, how: Rescale) -> Run:
    """The run as it is to be read; its model is changed, not copied. Raises UserError if the scaling does not fit."""
    if how.rope_scaling is None:
        return run
    m = stretched(run.config.model, how.rope_scaling, how.rope_factor, rope_dynamic=how.rope_dynamic)
    m.check_position()
    if m.position == "learned":
        table = run.model.wpe.weight
        run.model.wpe = torch.nn.Embedding.from_pretrained(interpolated(table.detach(), how.rope_factor, m.block_size))
    run.model.cfg = m
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=m))


def scaling_of(m: GPTConfig) -> str:
    """For a person: "" if the window is that of training, else "yarn 4x", "ntk dynamic", "none 4x"."""
    if m.rope_scaling == "none" and m.rope_factor == 1:
        return ""
    return f"{m.rope_scaling} {'dynamic' if m.rope_dynamic else f'{m.rope_factor:g}x'}"
