"""Finds the base run and its settings. A new run takes over the base run's model to learn tasks or to get a longer
window."""

import dataclasses
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.config.checks import flat, to_dict
from nanometa.data.tokenizer import SPEC_FILE
from nanometa.training import checkpoint, pretrained
from nanometa.training.checkpoint import Checkpoint
from nanometa.training.context_extension import stretched
from nanometa.training.run_folders import holds_run


def base_of(cfg: TrainConfig, saved: Checkpoint | None) -> Checkpoint | None:
    """Returns the checkpoint whose model learns the tasks or gets a longer window.

    It is `saved` if the run is resumed, else the checkpoint that cfg.init_from names; None means a new model."""
    if saved or not cfg.takes_over or cfg.init_from in pretrained.KEYWORDS or not holds_run(Path(cfg.init_from)):
        return saved
    return checkpoint.open_run(cfg.init_from)


def with_base(cfg: TrainConfig, base: Checkpoint | None) -> TrainConfig:
    """Returns cfg with the model, the target rule and the markers of the base run, which need not be given again.

    Raises UserError if cfg contradicts the base run's model, has tasks but no tokenizer, asks for texts with more
    positions than the model has, or sets a dynamic scale."""
    if cfg.model.rope_dynamic:
        raise UserError(
            "rope_dynamic=True only works for reading a trained run, not in training: leave --rope_dynamic out, and "
            "give a fixed --rope_factor to train with longer windows."
        )
    if cfg.extends and not base:
        raise UserError(
            f"rope_scaling={cfg.model.rope_scaling} with rope_factor={cfg.model.rope_factor:g} extends the window of a "
            f"trained run, and no run is given: add --init_from=out/NAME, or leave both settings out."
        )
    if (cfg.task.tasks or cfg.extends) and base:
        cfg = _taken_over(cfg, base)
    if cfg.task.tasks and not base and not (Path(cfg.dataset) / SPEC_FILE).is_file():
        raise UserError(
            f"the tasks need the tokenizer of a run or of a dataset, but init_from={cfg.init_from} names no run and "
            f"there is no dataset in {cfg.dataset}: give --init_from=out/RUN to train the model of that run, or "
            f"--dataset=FOLDER to train a new model with the tokenizer of that dataset."
        )
    if cfg.task.tasks and base and "dataset" in cfg.typed and cfg.dataset != base.config.dataset:
        raise UserError(
            f"dataset={cfg.dataset} has no effect, because the texts of the tasks are generated with the tokenizer of "
            f"{base.folder}: leave --dataset out."
        )
    check_length(cfg)
    return cfg


def check_length(cfg: TrainConfig) -> None:
    """Raises UserError if the texts of the tasks have more positions than the model has learned positions for."""
    if cfg.task.tasks and cfg.model.position == "learned" and cfg.task.train_length > cfg.model.block_size:
        raise UserError(
            f"train_length={cfg.task.train_length} is too long, because the model has only {cfg.model.block_size} "
            f"learned positions: set --train_length to at most {cfg.model.block_size}."
        )


def _taken_over(cfg: TrainConfig, base: Checkpoint) -> TrainConfig:
    """Returns cfg with the model, target rule and markers of `base`, whose window is extended if cfg asks for it.

    Texts of tasks have their own meta-tokens, so a task run does not place the markers of its base, and it may be given
    other limits to what positions may read.

    Raises UserError if cfg has another value for one of these settings, and the value was typed, is in the config file,
    or differs from the default.
    """
    model, asked = base.config.model, flat(cfg)
    window = {
        name: asked[name] for name in to_dict(model) if name.startswith(("rope_", "yarn_")) and name != "rope_theta"
    }
    if cfg.extends and any(getattr(model, name) != value for name, value in window.items()):
        model = stretched(model, window.pop("rope_scaling"), window.pop("rope_factor"), **window)
    found, default = {**to_dict(model), "target_rule": base.config.target_rule}, flat(TrainConfig())
    markers, own = base.config.markers, to_dict(cfg.markers)
    if cfg.task.tasks and (markers.places_markers or set(own) & set(cfg.typed)):
        markers = cfg.markers
    found |= to_dict(markers)
    for name, value in found.items():
        given = asked[name]
        left_open = given is None and name in ("vocab_size", "content_vocab_size")  # the tokenizer decides these
        if given == value or left_open or not (name in cfg.typed or given != default[name]):
            continue
        if name == "block_size" and cfg.extends:
            raise UserError(
                f"block_size={given} differs from the {value} positions that {base.folder} has after stretching by "
                f"rope_factor={model.rope_factor:g}: leave --block_size out, or choose another --rope_factor."
            )
        raise UserError(
            f"{name}={given} differs from {name}={value} of the model in {base.folder}, which this run takes over: "
            f"leave {name} out of the command line and of the config file."
        )
    return dataclasses.replace(cfg, model=model, target_rule=found["target_rule"], markers=markers)
