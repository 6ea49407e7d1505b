"""Locks a run's folder, finds the checkpoint that the run continues, and decides whether it can be continued."""

import os
from pathlib import Path

from filelock import BaseFileLock

from nanometa.common.errors import UserError
from nanometa.common.files import leads_out, lock_folder
from nanometa.config import TrainConfig
from nanometa.config.checks import flat, flat_fields
from nanometa.training import checkpoint, pretrained
from nanometa.training.checkpoint import Checkpoint
from nanometa.training.ending import Ending
from nanometa.training.run_folders import STATE, holds_killed_start, holds_run, suggestion
from nanometa.training.run_log import log_files


def check_resumable(saved: Checkpoint, cfg: TrainConfig, facts: dict) -> list[str]:
    """Returns sentences about the settings that have changed since the checkpoint and are allowed to change, and one
    about a run that has ended early.

    Raises UserError if the run cannot continue exactly with the settings of cfg or with its dataset."""
    old = saved.state["data"]
    if old["tokenizer"] != facts["tokenizer"]:
        raise UserError(
            f"{cfg.dataset} was prepared with another tokenizer (fingerprint {facts['tokenizer'][:12]}..) than "
            f"{saved.folder} was trained with ({old['tokenizer'][:12]}..): give the run's dataset, {old['dataset']}."
        )
    saved_settings, declared = flat(saved.config), flat_fields(TrainConfig)
    differing = {name: value for name, value in flat(cfg).items() if value != saved_settings[name]}
    rules = {name: declared[name].metadata.get("on_resume", "may not change") for name in differing}
    branches = bool(cfg.branch_from) and saved.folder == Path(cfg.branch_from)
    by_branch = "may change" if branches else "may not change"
    rules = {name: by_branch if rule == "a branch may change" else rule for name, rule in rules.items()}
    if fixed := [name for name in differing if rules[name] == "may not change"]:
        name, more = fixed[0], f" (as does {', '.join(fixed[1:])})" if fixed[1:] else ""
        if branches:
            raise UserError(
                f"{name}={differing[name]} differs from {name}={saved_settings[name]} of {saved.folder}{more}, and a "
                f"branch continues with the optimizer and the order of the data of its trunk: leave the setting out, "
                f"or start from the weights alone, with --init_from={saved.folder} in place of --branch_from."
            )
        raise UserError(
            f"{name}={differing[name]} differs from {name}={saved_settings[name]} of {saved.folder}{more}, and a "
            f"resumed run cannot change this: give the settings that {_start_of(saved)} was started with, or start a "
            f"run with another --run_name."
        )
    if not branches and old.get("scorer") != facts.get("scorer"):
        raise UserError(
            f"scorer={cfg.scorer} has other weights than when {saved.folder} was saved, so the weights of the loss "
            f"would change: give the scorer that the run was started with, or start a run with another --run_name."
        )
    changed = []
    names = sorted(old["shards"].keys() | facts["shards"].keys())
    other = [name for name in names if old["shards"].get(name) != facts["shards"].get(name)]
    if other:
        was, now = (f"{shards[other[0]][:12]}.." if other[0] in shards else "not there"
                    for shards in (old["shards"], facts["shards"]))  # fmt: skip
        if not cfg.allow_changed_data:
            raise UserError(
                f"{cfg.dataset} is not the dataset of {saved.folder}, because the sha256 of {other[0]} was {was} and "
                f"is {now}: give the run's dataset, {old['dataset']}, or add --allow_changed_data to continue with "
                f"this one."
            )
        changed.append(
            f"changed since the checkpoint (--allow_changed_data): {len(other)} shards of {cfg.dataset}, among them "
            f"{other[0]} with sha256 {was} -> {now}; from step {saved.step} on, windows come from the new data"
        )
    if cfg.max_steps < saved.step:
        raise UserError(
            f"max_steps={cfg.max_steps} is less than the {saved.step} steps that {saved.folder} has done: set "
            f"--max_steps to at least {saved.step}."
        )
    changed += [
        f"changed since the checkpoint: {name} {saved_settings[name]} -> {differing[name]}"
        for name in differing
        if rules[name] == "may change"
    ]
    now, then = (Ending(settings, saved.state.get("stop_at"), saved.step) for settings in (cfg, saved.config))
    if any(now.rate(step) != then.rate(step) for step in range(saved.step)):
        changed.append(
            f"the learning rates up to step {saved.step} were not those of the present settings, so the result will "
            f"differ from a run that has these settings from the start"
        )
    return changed + now.finished(saved.step)


def _start_of(saved: Checkpoint) -> str:
    """Returns the arm of a checkpoint and, if it is recorded, the command of its run's last start, in words."""
    arm = saved.config.arm_name(saved.state["data"]["chunk_markers"])
    environment = saved.state.get("environment")
    command = environment.get("command") if isinstance(environment, dict) else None
    return f"the run of the {arm} arm" + (f" ({command})" if command else "")


def occupied(run_dir: Path) -> bool:
    """Returns whether the folder holds anything but hidden files, such as a lock, and so is not free for a new run."""
    if not run_dir.is_dir():
        return run_dir.exists()
    return any(not path.name.startswith(".") for path in run_dir.iterdir())


def resumes(cfg: TrainConfig) -> bool:
    """Returns whether this start may continue from a checkpoint of its own run."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        return True  # torchrun has restarted the job, and init_from was meant for the first start
    return cfg.init_from in ("resume", "auto")


def check_folder(cfg: TrainConfig, run_dir: Path) -> None:
    """Raises UserError if cfg.init_from does not fit the state of the run's folder, or if a link in the folder would
    make this run write elsewhere.

    The folder need not be locked. If it is not, the result is preliminary, because another process may change it."""
    if run_dir.is_symlink() and not run_dir.exists():
        raise UserError(
            f"{run_dir} is a link to {os.readlink(run_dir)}, which does not exist: create that folder, or remove the "
            f"link."
        )
    if not resumes(cfg):
        pretrained.check_name(cfg.init_from)
        if occupied(run_dir) and not holds_killed_start(run_dir):
            raise UserError(
                f"the run folder {run_dir} exists: {_cure(cfg, run_dir)}choose another --run_name, or delete the "
                f"folder."
            )
    elif cfg.init_from == "resume" and not occupied(run_dir):
        raise UserError(f"there is no checkpoint to resume in {run_dir}: start the run with --init_from=auto.")
    elif occupied(run_dir) and not (run_dir / "config.json").exists() and not holds_run(run_dir):
        raise UserError(f"{run_dir} exists, but train.py did not make it: choose another --run_name.")
    log_files(run_dir)


def _cure(cfg: TrainConfig, run_dir: Path) -> str:
    """Returns the advice to continue the run in an occupied folder; empty if that would start it from other weights."""
    if holds_run(run_dir):
        return "continue that run with --init_from=auto, "
    if cfg.init_from != "scratch" or not (run_dir / "config.json").exists():
        return ""
    return "its run has no checkpoint, so start it again with --init_from=auto, "


def lock_existing(cfg: TrainConfig, run_dir: Path, main: bool) -> BaseFileLock | None:
    """Locks the folder of an existing run, or of a killed start, and returns the lock.

    Only the lines of metrics.jsonl are read before that, and again afterwards. Returns None if there is no run yet, or
    if this is not the main process. Raises UserError as check_folder does, or if another process is training there."""
    check_folder(cfg, run_dir)
    return _lock(run_dir) if main and occupied(run_dir) else None


def lock_new(run_dir: Path) -> BaseFileLock:
    """Creates and locks the folder of a new run, and returns the lock.

    Raises UserError if another process has begun a run there since check_folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = _lock(run_dir)
    if occupied(run_dir):
        lock.release()
        raise UserError(
            f"another process has begun a run in {run_dir} in the meantime: continue it with --init_from=auto, or "
            f"choose another --run_name."
        )
    return lock


def _lock(run_dir: Path) -> BaseFileLock:
    lock = lock_folder(run_dir)
    if lock is None:
        raise UserError(f"another process is training in {run_dir}: wait for it, or choose another --run_name.")
    return lock


def find_checkpoint(cfg: TrainConfig, run_dir: Path, warn) -> Checkpoint | None:
    """Returns the checkpoint to continue from, or None to start at step 0.

    warn: called with a sentence for each damaged checkpoint. Raises UserError if cfg.init_from does not allow what is
    found."""
    check_folder(cfg, run_dir)
    if not resumes(cfg):
        return open_branch(cfg)
    found = checkpoint.newest(run_dir, warn) if run_dir.exists() else None
    if found is None and cfg.init_from == "resume":
        cure = "give" if holds_killed_start(run_dir) else "delete the folder, and give"
        raise UserError(
            f"there is no checkpoint to resume in {run_dir}, because its run was stopped before the first one: {cure} "
            f"the command of its start again."
        )
    if found is None:
        return open_branch(cfg)
    best = found.state["best"]
    weights = run_dir / f"best_{best['step']:08d}" if best else run_dir
    if best and (leads_out(weights) or not weights.is_dir()):
        # A better result after this checkpoint had replaced these weights, and that result is now abandoned. The next
        # evaluation counts as the best again.
        found.state["best"] = None
    return found


def open_branch(cfg: TrainConfig) -> Checkpoint | None:
    """Returns the checkpoint of cfg.branch_from without the record of that run's best result; None if there is none.

    Raises UserError if it is no checkpoint or has no optimizer state."""
    if not cfg.branch_from:
        return None
    folder = Path(cfg.branch_from)
    if not folder.is_dir() or (holds_run(folder) and not (folder / STATE).is_file()):
        raise UserError(f"branch_from={cfg.branch_from} is not a checkpoint: {suggestion(folder)}")
    saved = checkpoint.open_checkpoint(folder)
    if checkpoint.OPTIMIZER not in saved.files:
        raise UserError(
            f"branch_from={cfg.branch_from} contains weights but no optimizer state: give a step_ folder of the run, "
            f"or start a new run from these weights with --init_from={cfg.branch_from}."
        )
    saved.state["best"] = None
    return saved
