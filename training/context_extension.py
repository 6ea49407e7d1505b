"""Gives models longer windows than they were trained with: new settings, and interpolated learned positions."""

import dataclasses

import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, Rescale
from nanometa.training.checkpoint import Run


def stretched(m: GPTConfig, scaling: str, factor: float, **more) -> GPTConfig:
    """Returns the model settings m with a window `factor` times as long as the one in which positions were first
    trained.

    more: other settings of the scaling. Raises UserError if the new length is not a whole number, or if learned
    positions were interpolated before, which is possible only once.
    """
    window = m.original_block_size
    if m.position == "learned" and m.rope_factor != 1:
        raise UserError(
            f"rope_factor={factor} cannot be applied, because the learned positions of this run were interpolated "
            f"before, by a factor of {m.rope_factor:g}: extend the run that this one started from."
        )
    block_size = round(window * factor)
    if abs(block_size - window * factor) > 1e-6:
        raise UserError(
            f"rope_factor={factor} would turn {window} positions into {window * factor:.2f}, which is not a whole "
            f"number: choose another --rope_factor."
        )
    return dataclasses.replace(m, rope_scaling=scaling, rope_factor=factor, block_size=block_size, **more)


def interpolated(table: torch.Tensor, factor: float, rows: int) -> torch.Tensor:
    """Returns a table of learned positions (T, C) stretched to (rows, C).

    New position m is old position m / factor, interpolated linearly between two rows (position interpolation, arXiv
    2306.15595). Positions beyond the last row get the last row."""
    at = (torch.arange(rows, device=table.device, dtype=table.dtype) / factor).clamp(max=len(table) - 1)
    below = at.long()
    above = (below + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[below], table[above], (at - below)[:, None])


def rescaled(run: Run, how: Rescale) -> Run:
    """Returns the run with its positions rescaled for reading. The model is changed in place, not copied.

    Raises UserError if the scaling does not fit the model."""
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
    """Returns a short name of the scaling, such as "yarn 4x", "ntk dynamic" or "none 4x"; "" for the trained window."""
    if m.rope_scaling == "none" and m.rope_factor == 1:
        return ""
    return f"{m.rope_scaling} {'dynamic' if m.rope_dynamic else f'{m.rope_factor:g}x'}"
