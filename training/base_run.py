"""Finds the run whose model a new run takes over, to learn tasks or to get a longer window, and its settings."""

import dataclasses
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.config.checks import flat, to_dict
from nanometa.training import checkpoint, pretrained
from nanometa.training.checkpoint import Checkpoint, holds_run
from nanometa.training.context_extension import stretched


def base_of(cfg: TrainConfig, saved: Checkpoint | None) -> Checkpoint | None:
    """The run whose model learns the tasks, or gets a longer window: what goes on, or what init_from names; None = a
    new model."""
    if saved or not cfg.takes_over or cfg.init_from in pretrained.KEYWORDS or not holds_run(Path(cfg.init_from)):
        return saved
    return checkpoint.read_run(cfg.init_from, _with_tokenizer)


def _with_tokenizer(found: Checkpoint) -> Checkpoint:
    found.tokenizer()
    return found


def with_base(cfg: TrainConfig, base: Checkpoint | None) -> TrainConfig:
    """cfg with the model and the target rule of the run that learns its tasks, or whose window it stretches, which need
    not be given again.

    Raises UserError if cfg names another model, texts longer than the model's positions, or a dynamic scale."""
    if cfg.model.rope_dynamic:
        raise UserError("rope_dynamic is for reading: train with a fixed --rope_factor, or without.")
    if cfg.extends and not base:
        raise UserError(
            f"rope_scaling={cfg.model.rope_scaling} by {cfg.model.rope_factor:g} extends a trained run: add "
            f"--init_from=out/NAME, or leave both out."
        )
    if (cfg.task.tasks or cfg.extends) and base:
        cfg = _taken_over(cfg, base)
    if cfg.task.tasks and base and "dataset" in cfg.typed and cfg.dataset != base.config.dataset:
        raise UserError(
            f"dataset={cfg.dataset} has no effect: the texts of tasks are made with the tokenizer of {base.folder}; "
            f"leave --dataset out."
        )
    if cfg.task.tasks and cfg.model.position == "learned" and cfg.task.train_length > cfg.model.block_size:
        raise UserError(
            f"train_length={cfg.task.train_length}, and the model has {cfg.model.block_size} learned positions: take a "
            f"--train_length of at most that."
        )
    return cfg


def _taken_over(cfg: TrainConfig, base: Checkpoint) -> TrainConfig:
    """Returns cfg with the model and target rule of base, whose window is stretched if cfg asks for that.

    Raises UserError if cfg names another value: one that was typed or that its config file gives, or that differs from
    the default."""
    model, asked = base.config.model, flat(cfg)
    window = {
        name: asked[name] for name in to_dict(model) if name.startswith(("rope_", "yarn_")) and name != "rope_theta"
    }
    if cfg.extends and any(getattr(model, name) != value for name, value in window.items()):
        model = stretched(model, window.pop("rope_scaling"), window.pop("rope_factor"), **window)
    found, default = {**to_dict(model), "target_rule": base.config.target_rule}, flat(TrainConfig())
    for name, value in found.items():
        given = asked[name]
        left_open = given is None and name in ("vocab_size", "content_vocab_size")  # for the tokenizer to decide
        if given == value or left_open or not (name in cfg.typed or given != default[name]):
            continue
        if name == "block_size" and cfg.extends:
            raise UserError(
                f"block_size={given}, and {base.folder} stretched by rope_factor={model.rope_factor:g} has "
                f"{value}: leave --block_size out, or take another factor."
            )
        raise UserError(
            f"{name}={given}, and the model of {base.folder}, which is taken over, has {value}: leave --{name} out."
        )
    return dataclasses.replace(cfg, model=model, target_rule=found["target_rule"])
