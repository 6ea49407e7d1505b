"""Finds the run whose model a new run takes over, to learn tasks or to get a longer window, and its settings."""

import dataclasses
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.config.checks import flat, to_dict
from nanometa.training import checkpoint, pretrained
from nanometa.training.checkpoint import Checkpoint, holds_run
from nanometa.training.context_extension import stretched


def extends(cfg: TrainConfig) -> bool:
    """Does cfg ask for a longer window than the positions were trained in?"""
    return cfg.model.rope_scaling != "none" or cfg.model.rope_factor != 1


def base_of(cfg: TrainConfig, saved: Checkpoint | None) -> Checkpoint | None:
    """The run whose model learns the tasks, or gets a longer window: what goes on, or what init_from names; None = a
    new model."""
    takes_over = cfg.task.tasks or extends(cfg)
    if saved or not takes_over or cfg.init_from in pretrained.KEYWORDS or not holds_run(Path(cfg.init_from)):
        return saved
    return checkpoint.open_run(cfg.init_from)


def with_base(cfg: TrainConfig, base: Checkpoint | None) -> TrainConfig:
    """cfg with the model and the target rule of the run that learns its tasks, or whose window it stretches, which need
    not be given again.

    Raises UserError if cfg names another model, texts longer than the model's positions, or a dynamic scale."""
    if cfg.model.rope_dynamic:
        raise UserError("rope_dynamic is for reading: train with a fixed --rope_factor, or without.")
    if extends(cfg) and not base:
        raise UserError(
            f"rope_scaling={cfg.model.rope_scaling} by {cfg.model.rope_factor:g} extends a trained run: add "
            f"--init_from=out/NAME, or leave both out."
        )
    if (cfg.task.tasks or extends(cfg)) and base:
        cfg = _taken_over(cfg, base)
    if cfg.task.tasks and cfg.model.position == "learned" and cfg.task.train_length > cfg.model.block_size:
        raise UserError(
            f"train_length={cfg.task.train_length}, and the model has {cfg.model.block_size} learned positions: take a "
            f"--train_length of at most that."
        )
    return cfg


def _taken_over(cfg: TrainConfig, base: Checkpoint) -> TrainConfig:
    """Settings of the window are those of cfg, if it has any; what else cfg says of the model must be base's."""
    model, asked, default = base.config.model, to_dict(cfg.model), flat(TrainConfig())
    window = {name: asked[name] for name in asked if name.startswith(("rope_", "yarn_")) and name != "rope_theta"}
    if extends(cfg) and any(getattr(model, name) != value for name, value in window.items()):
        model = stretched(model, window.pop("rope_scaling"), window.pop("rope_factor"), **window)
    found = {**to_dict(model), "target_rule": base.config.target_rule}
    for name, value in found.items():
        given = flat(cfg)[name]
        if given not in (value, default[name]):
            if name == "block_size" and extends(cfg):
                raise UserError(
                    f"block_size={given}, and {base.folder} stretched by rope_factor={model.rope_factor:g} has "
                    f"{value}: leave --block_size out, or take another factor."
                )
            raise UserError(
                f"{name}={given}, and the model of {base.folder}, which is taken over, has {value}: leave --{name} out."
            )
    return dataclasses.replace(cfg, model=model, target_rule=found["target_rule"])
