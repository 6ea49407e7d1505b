"""Finds the checkpoint that a run goes on from, and decides whether it may."""

from os import environ
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.config.checks import flat, flat_fields
from nanometa.training import checkpoint, pretrained
from nanometa.training.checkpoint import Checkpoint
from nanometa.training.optimizer import learning_rate


def check_resumable(saved: Checkpoint, cfg: TrainConfig, facts: dict) -> list[str]:
    """Raises UserError if the run cannot go on exactly -> sentences about settings that may change and did."""
    old = saved.state["data"]
    if old["tokenizer"] != facts["tokenizer"]:
        raise UserError(
            f"{cfg.dataset} was made with another tokenizer (fingerprint {facts['tokenizer'][:12]}..) than "
            f"{saved.folder} was trained with ({old['tokenizer'][:12]}..): give the run's dataset, {old['dataset']}."
        )
    changed = []
    names = sorted(old["shards"].keys() | facts["shards"].keys())
    other = [name for name in names if old["shards"].get(name) != facts["shards"].get(name)]
    if other:
        was, now = (f"{shards[other[0]][:12]}.." if other[0] in shards else "not there"
                    for shards in (old["shards"], facts["shards"]))  # fmt: skip
        if not cfg.allow_changed_data:
            raise UserError(
                f"{cfg.dataset} is not the dataset of {saved.folder}: the sha256 of {other[0]} was {was} and is {now}; "
                f"give the run's dataset, {old['dataset']}, or say --allow_changed_data to go on with this one."
            )
        changed.append(
            f"changed since the checkpoint: {len(other)} shards of {cfg.dataset}, as allowed, the sha256 of {other[0]} "
            f"from {was} to {now}; the order of the windows is that of the new data, from step {saved.step} on"
        )
    if cfg.max_steps < saved.step:
        raise UserError(f"max_steps={cfg.max_steps}, but {saved.folder} is at step {saved.step}: ask for more steps.")
    was, declared = flat(saved.config), flat_fields(TrainConfig)
    for name, value in flat(cfg).items():
        rule = declared[name].metadata.get("on_resume", "may not change")
        if value == was[name] or rule == "ignored":
            continue
        if rule != "may change":
            raise UserError(
                f"{name}={value} differs from the run's {was[name]}, and {saved.folder} cannot go on with it: leave "
                f"--{name} as it was, or start a new --run_name."
            )
        changed.append(f"changed since the checkpoint: {name} {was[name]} -> {value}")
    if any(learning_rate(step, cfg) != learning_rate(step, saved.config) for step in range(saved.step)):
        changed.append(
            f"up to step {saved.step} these settings would have had other learning rates than the run had: what comes "
            f"is not the run that they alone would give"
        )
    return changed


def occupied(run_dir: Path) -> bool:
    """Is there anything in the way of a new run? An empty folder, or one with nothing but a lock, is not."""
    if not run_dir.is_dir():
        return run_dir.exists()
    return any(not path.name.startswith(".") for path in run_dir.iterdir())


def find_checkpoint(cfg: TrainConfig, run_dir: Path, warn) -> Checkpoint | None:
    """What to go on from, None for a fresh start. Raises UserError if that is not what cfg.init_from allows."""
    init_from = cfg.init_from
    if init_from != "resume" and int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        init_from = "auto"  # torchrun restarts the job: anything else was meant for its first start
    if init_from not in ("resume", "auto"):
        pretrained.check_name(init_from)
        if occupied(run_dir):
            raise UserError(
                f"the run folder {run_dir} exists: go on with --init_from=auto, choose another --run_name, or "
                f"delete it."
            )
        return open_branch(cfg)
    found = checkpoint.newest(run_dir, warn) if run_dir.exists() else None
    if found is None and init_from == "resume":
        raise UserError(f"there is no checkpoint in {run_dir} to resume: start with --init_from=auto.")
    if found is None and occupied(run_dir) and not (run_dir / "config.json").exists():
        raise UserError(f"{run_dir} exists and is no run of ours: choose another --run_name.")
    return found or open_branch(cfg)


def open_branch(cfg: TrainConfig) -> Checkpoint | None:
    """The checkpoint of another run that this one goes on from, without that run's record of its best."""
    if not cfg.branch_from:
        return None
    saved = checkpoint.open_checkpoint(Path(cfg.branch_from))
    if not (saved.folder / checkpoint.OPTIMIZER).is_file():
        raise UserError(
            f"branch_from={cfg.branch_from} holds weights without their optimizer: give a step_ folder of the run, or "
            f"start anew from these weights with --init_from={cfg.branch_from}."
        )
    saved.state["best"] = None
    return saved
