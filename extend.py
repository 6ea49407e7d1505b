"""Longer windows: what changes in a model's settings, its learned table, and in a run that is read further than it was
trained."""

import dataclasses
from typing import Literal

import torch

from checkpoint import Run
from config import GPTConfig, UserError


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
    at = (torch.arange(rows, dtype=torch.float64) / factor).clamp(max=len(table) - 1)
    below = at.long()
    above = (below + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[below], table[above], (at - below).to(table)[:, None])


@dataclasses.dataclass(frozen=True)
class Rescale:
    """How a run's positions are read; by default as it was trained."""

    rope_scaling: Literal["none", "pi", "ntk", "yarn"] | None = None
    """stretch the run's window without training: pi (also of a learned table), ntk, yarn; none = read on plainly;
    None = as trained"""
    rope_factor: float = 1.0
    """by so much, from the window before any extension"""
    rope_dynamic: bool = False
    """by no more than a text's length asks for, whatever rope_factor"""

    def __post_init__(self):
        if self.rope_scaling is None and (self.rope_factor != 1 or self.rope_dynamic):
            raise UserError(
                f"rope_factor={self.rope_factor} and rope_dynamic={self.rope_dynamic} need --rope_scaling: add "
                f"--rope_scaling=yarn, or leave them out."
            )

    def of(self, run: Run) -> Run:
        """The run as it is to be read; its model is changed, not copied."""
        if self.rope_scaling is None:
            return run
        m = stretched(run.config.model, self.rope_scaling, self.rope_factor, rope_dynamic=self.rope_dynamic)
        _ = m.original_block_size  # raises UserError if the scaling does not fit the positions
        if m.position == "learned":
            table = run.model.wpe.weight
            longer = torch.nn.Embedding(m.block_size, m.n_embd, device=table.device)
            longer.weight.data = interpolated(table.detach().cpu(), self.rope_factor, m.block_size).to(table.device)
            run.model.wpe = longer
        run.model.cfg = m
        return dataclasses.replace(run, config=dataclasses.replace(run.config, model=m))


def scaling_of(m: GPTConfig) -> str:
    """For a person: "" without any, else "yarn 4x", "ntk dynamic"."""
    if m.rope_scaling == "none":
        return ""
    return f"{m.rope_scaling} {'dynamic' if m.rope_dynamic else f'{m.rope_factor:g}x'}"
