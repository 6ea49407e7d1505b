"""What is settled before the first step: batch, data and arm must fit together, and so must a run that goes on."""

import dataclasses
import re
from os import environ
from pathlib import Path

import checkpoint
import pretrained
from checkpoint import Checkpoint, holds_run
from cli import load_config
from config import PrepareConfig, TrainConfig, UserError, to_dict
from data.loader import Windows
from data.shards import read_manifest
from data.tokenizer import Tokenizer
from extend import stretched
from optim import learning_rate
from tasks.source import TaskWindows


def accumulation(cfg: TrainConfig, world: int) -> int:
    """Micro-batches a step in each process. Raises UserError if batch_size cannot be divided so."""
    per_pass = cfg.micro_batch_size * world
    if cfg.batch_size % per_pass == 0:
        return cfg.batch_size // per_pass
    if cfg.batch_size % world:
        below = cfg.batch_size // per_pass * per_pass
        offers = f"--batch_size={below or per_pass}" + (f" or {below + per_pass}" if below else "")
    else:
        share = cfg.batch_size // world
        best = min((d for d in range(1, share + 1) if share % d == 0), key=lambda d: abs(d - cfg.micro_batch_size))
        offers = f"--micro_batch_size={best} or --batch_size={-(-cfg.batch_size // per_pass) * per_pass}"
    raise UserError(
        f"batch_size={cfg.batch_size} windows cannot be split over {world} processes in micro-batches of "
        f"{cfg.micro_batch_size}: nearest possible is {offers}."
    )


def recipe_of(dataset: str) -> PrepareConfig | None:
    """The recipe of data/RECIPE_INJECTION, which is config/RECIPE.py with that injection, or of
    data/RECIPE_INJECTION_Nplus, with min_document_tokens=N, too; None if there is none."""
    name = re.fullmatch(r"(.+)_(uniform|periodic|none)(?:_([1-9]\d{0,7})plus)?", Path(dataset).name, re.ASCII)
    if not name or not (path := Path(__file__).parent / "config" / f"{name[1]}.py").is_file():
        return None
    recipe = load_config(PrepareConfig, [str(path)], config_file=True)
    return dataclasses.replace(recipe, injection=name[2], min_document_tokens=int(name[3] or 0))


def open_windows(cfg: TrainConfig, split: str, base: Checkpoint | None = None) -> Windows | TaskWindows:
    """The windows of cfg's dataset, or the texts of its tasks, as cfg's arm sees them. base: as for with_base.

    Raises UserError if there is no dataset, or the arm needs another one."""
    if cfg.task.tasks:
        return TaskWindows(cfg, split, Tokenizer.load(base.folder if base else Path(cfg.dataset)))
    recipe = recipe_of(cfg.dataset)
    if recipe and not Path(cfg.dataset).exists():
        length = f" --min_document_tokens={recipe.min_document_tokens}" if recipe.min_document_tokens else ""
        raise UserError(
            f"there is no dataset in {cfg.dataset}: make it with python prepare.py config/{recipe.recipe}.py "
            f"--injection={recipe.injection}{length}."
        )
    check_arm(cfg, read_manifest(Path(cfg.dataset))["chunk_markers"])
    random_fraction = cfg.model.random_fraction if cfg.model.second_attention == "random" else None
    return Windows(cfg.dataset, split, cfg.model.block_size, cfg.target_rule, random_fraction, cfg.seed)


def check_arm(cfg: TrainConfig, markers: int) -> None:
    """Raises UserError if the arm makes no sense on a dataset whose chunks have so many markers."""
    if cfg.model.second_attention == "meta" and not markers:
        raise UserError(
            f"second_attention=meta would idle, since {cfg.dataset} has no markers: take --second_attention=none, or a "
            f"dataset prepared with --injection=uniform."
        )
    if cfg.model.second_attention == "random" and markers:
        raise UserError(
            f"second_attention=random is a control without markers, and {cfg.dataset} has {markers} a chunk: take a "
            f"dataset prepared with --injection=none."
        )
    if cfg.model.meta_position == "none" and not markers:
        raise UserError(
            f"meta_position=none would change nothing, since {cfg.dataset} has no markers: take --meta_position=same, "
            f"or a dataset prepared with --injection=uniform."
        )


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


def with_vocabulary(cfg: TrainConfig, n_vocab: int, n_content: int) -> TrainConfig:
    """cfg with the vocabulary of its dataset. Raises UserError if cfg says another one."""
    vocabulary = {"vocab_size": n_vocab, "content_vocab_size": n_content}
    for name, found in vocabulary.items():
        wanted = getattr(cfg.model, name)
        if wanted not in (None, found):
            raise UserError(f"{name}={wanted}, but the tokenizer of {cfg.dataset} has {found}: leave the setting out.")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **vocabulary))


def data_facts(data: Windows | TaskWindows, cfg: TrainConfig, base: Checkpoint | None = None) -> dict:
    """What a checkpoint keeps of its dataset: enough to insert markers as trained, and to know the data again. Of
    tasks: what their model was trained on before."""
    if cfg.task.tasks:
        scratch = {
            "dataset": cfg.dataset, "injection": "none", "chunk_content": cfg.task.train_length, "chunk_markers": 0,
            "tokenizer": data.tokenizer.fingerprint, "content_sha256": {}, "shards": {},
        }  # fmt: skip
        return base.state["data"] if base else scratch
    manifest = data.manifest
    return {
        "dataset": cfg.dataset,
        **{key: manifest[key] for key in ("injection", "chunk_content", "chunk_markers", "val_text_compressed")},
        "tokenizer": manifest["tokenizer"]["fingerprint"],
        "content_sha256": {split: manifest["splits"][split]["content_sha256"] for split in ("train", "val")},
        "shards": {
            entry["file"]: entry["sha256"] for split in manifest["splits"].values() for entry in split["shards"]
        },
    }


def flat(cfg: TrainConfig) -> dict:
    """All settings by their flat names."""
    settings = to_dict(cfg)
    return {**settings.pop("model"), **settings.pop("task"), **settings}


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
    was = flat(saved.config)
    for name, value in flat(cfg).items():
        before = was[name]
        if value == before or name in (
            "init_from",
            "branch_from",
            "out_dir",
            "run_name",
            "dataset",
            "allow_changed_data",
        ):
            continue
        if name in to_dict(cfg.model) | to_dict(cfg.task) or name in (
            "target_rule",
            "seed",
            "batch_size",
            "eval_windows",
            "optimizer",
        ):
            raise UserError(
                f"{name}={value} differs from the run's {before}, and {saved.folder} cannot go on with it: leave "
                f"--{name} as it was, or start a new --run_name."
            )
        changed.append(f"changed since the checkpoint: {name} {before} -> {value}")
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
