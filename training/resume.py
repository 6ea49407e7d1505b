"""Locks a run's folder, finds the checkpoint that the run goes on from, and decides whether it may."""

from os import environ
from pathlib import Path

from filelock import BaseFileLock

from nanometa.common.errors import UserError
from nanometa.common.files import lock_folder
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


def resumes(cfg: TrainConfig) -> bool:
    """May this start go on from a checkpoint of its own run?"""
    if int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        return True  # torchrun restarts the job: what init_from says was meant for its first start
    return cfg.init_from in ("resume", "auto")


def check_folder(cfg: TrainConfig, run_dir: Path) -> None:
    """Raises UserError if cfg.init_from does not fit the run's folder. Opens no file: the folder need not be locked."""
    if not resumes(cfg):
        pretrained.check_name(cfg.init_from)
        if occupied(run_dir):
            raise UserError(
                f"the run folder {run_dir} exists: go on with --init_from=auto, choose another --run_name, or "
                f"delete it."
            )
    elif cfg.init_from == "resume" and not occupied(run_dir):
        raise UserError(f"there is no checkpoint in {run_dir} to resume: start with --init_from=auto.")
    elif occupied(run_dir) and not (run_dir / "config.json").exists() and not checkpoint.holds_run(run_dir):
        raise UserError(f"{run_dir} exists and is no run of ours: choose another --run_name.")


def lock_existing(cfg: TrainConfig, run_dir: Path, main: bool) -> BaseFileLock | None:
    """Returns the lock of a run's folder, to be taken before anything in it is read; None if there is no run yet, or
    this is not the main process. Raises UserError as check_folder does, or if another process trains there."""
    check_folder(cfg, run_dir)
    return _lock(run_dir) if main and occupied(run_dir) else None


def lock_new(run_dir: Path) -> BaseFileLock:
    """Makes the folder of a new run and returns its lock. Raises UserError if another process has begun a run there
    since the folder was looked at."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = _lock(run_dir)
    if occupied(run_dir):
        lock.release()
        raise UserError(
            f"another process has begun a run in {run_dir} in the meantime: go on with --init_from=auto, or choose "
            f"another --run_name."
        )
    return lock


def _lock(run_dir: Path) -> BaseFileLock:
    lock = lock_folder(run_dir)
    if lock is None:
        raise UserError(f"another process is training in {run_dir}: wait for it, or take another --run_name.")
    return lock


def find_checkpoint(cfg: TrainConfig, run_dir: Path, warn) -> Checkpoint | None:
    """What to go on from, None for a fresh start. Raises UserError if that is not what cfg.init_from allows."""
    check_folder(cfg, run_dir)
    if not resumes(cfg):
        return open_branch(cfg)
    found = checkpoint.newest(run_dir, warn) if run_dir.exists() else None
    if found is None and cfg.init_from == "resume":
        raise UserError(f"there is no checkpoint in {run_dir} to resume: start with --init_from=auto.")
    if found is None:
        return open_branch(cfg)
    best = found.state["best"]
    if best and not (run_dir / f"best_{best['step']:08d}").is_dir():
        # a later evaluation of a trajectory that is abandoned now had replaced it: the next one is the best again
        found.state["best"] = None
    return found


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
