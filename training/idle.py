"""Refuses settings of a new run that have no effect with its dataset or with its model."""

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.config.tasks import PLACEMENTS


def refuse_idle(cfg: TrainConfig, chunk_markers: int) -> None:
    """Raises UserError if a setting about markers or the second attention has no effect in a new run.

    A run that resumes is not checked: it must keep the settings that it was started with. chunk_markers: number of
    markers in a chunk of the dataset; not used for tasks, whose placements say whether there are markers."""
    tasks, model = cfg.task.tasks, cfg.model
    marked = any(PLACEMENTS[name].has_meta for name in cfg.task.placements) if tasks else cfg.has_markers(chunk_markers)
    if model.meta_position == "none_second" and not model.second.has_layer:
        raise UserError(
            f"meta_position=none_second has no effect, because second_attention={model.second_attention} is no second "
            f"attention: leave meta_position out, or choose another second_attention."
        )
    T = cfg.task.train_length if tasks else model.block_size
    if model.second.connects == "random" and model.second.rows(T, 0, model.random_fraction) == 0:
        raise UserError(
            f"random_fraction={model.random_fraction} connects none of {T} positions: set --random_fraction to at "
            f"least {1 / T:.2g}."
        )
    if marked:
        return
    where = f"placements={','.join(cfg.task.placements)} places" if tasks else f"{cfg.dataset} has"
    cure = "--placements target" if tasks else "a dataset prepared with --injection=uniform"
    if cfg.weights.weighting == "after_markers":
        raise UserError(f"weighting=after_markers has no effect, because {where} no markers: give {cure}.")
    for name, value in (("target_rule", cfg.target_rule), ("meta_position", model.meta_position)):
        if value not in ("ignore", "same"):
            default = "ignore" if name == "target_rule" else "same"
            raise UserError(
                f"{name}={value} has no effect, because {where} no markers: set --{name}={default}, or give {cure}."
            )
