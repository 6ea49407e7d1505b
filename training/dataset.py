"""Opens the dataset that a run trains on, and checks that the run's arm and vocabulary fit it."""

import dataclasses
import re
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config import PrepareConfig, TrainConfig
from nanometa.config.checks import nearest_multiples
from nanometa.config.command_line import read_config_file, recipes
from nanometa.data.layout import draw_of
from nanometa.data.loader import Windows
from nanometa.data.markers import placing_of
from nanometa.data.shards import read_manifest
from nanometa.data.tokenizer import Tokenizer
from nanometa.tasks.source import TaskWindows
from nanometa.training.checkpoint import Checkpoint

RECIPES = Path(__file__).resolve().parent.parent / "config"


def recipe_of(dataset: str) -> PrepareConfig | None:
    """Returns the recipe that prepares a dataset, found by the dataset's name, or None if there is none.

    data/RECIPE_INJECTION is prepared by config/RECIPE.py with --injection=INJECTION; data/RECIPE_INJECTION_Nplus also
    has --min_document_tokens=N."""
    name = re.fullmatch(r"(.+)_(uniform|periodic|none)(?:_([1-9]\d{0,7})plus)?", Path(dataset).name, re.ASCII)
    path = RECIPES / f"{name[1]}.py" if name else None
    if path not in recipes(RECIPES):
        return None
    recipe, _ = read_config_file(object, str(path))
    if not isinstance(recipe, PrepareConfig):  # config/gpt2.py exists, but it trains and prepares no data/gpt2_none
        return None
    return dataclasses.replace(recipe, injection=name[2], min_document_tokens=int(name[3] or 0))


def open_windows(cfg: TrainConfig, split: str, base: Checkpoint | None = None) -> Windows | TaskWindows:
    """Opens a split of cfg's dataset, or of the texts of its tasks, as windows for cfg's arm. base: as for with_base.

    Raises UserError if the dataset does not exist or does not fit the arm."""
    if cfg.task.tasks:
        return TaskWindows(cfg, split, base.tokenizer() if base else Tokenizer.load(Path(cfg.dataset)))
    recipe = recipe_of(cfg.dataset)
    if recipe and not Path(cfg.dataset).exists():
        length = f" --min_document_tokens={recipe.min_document_tokens}" if recipe.min_document_tokens else ""
        raise UserError(
            f"there is no dataset in {cfg.dataset}: prepare it with python prepare.py config/{recipe.recipe}.py "
            f"--injection={recipe.injection}{length}."
        )
    manifest = read_manifest(Path(cfg.dataset))
    check_arm(cfg, manifest["chunk_content"], manifest["chunk_markers"])
    placing = placing_of(cfg, split)
    return Windows(cfg.dataset, split, cfg.model.block_size, cfg.target_rule, draw_of(cfg, split), placing)


def check_arm(cfg: TrainConfig, content: int, markers: int) -> None:
    """Raises UserError if the arm does not fit a dataset with these numbers of content tokens and markers per chunk."""
    second, places = cfg.model.second, cfg.markers.places_markers
    if places and markers:
        raise UserError(
            f"marker_place={cfg.markers.marker_place} places markers in text without any, but {cfg.dataset} has "
            f"{markers} markers per chunk: give a dataset prepared with --injection=none."
        )
    if second.markers == "needed" and not cfg.has_markers(markers):
        raise UserError(
            f"second_attention={second.name} has nothing to connect, because {cfg.dataset} has no markers: set "
            f"--second_attention=none, or give a dataset prepared with --injection=uniform."
        )
    if second.markers == "refused" and cfg.has_markers(markers):
        raise UserError(
            f"second_attention={second.name} is a control for data without markers, but {cfg.dataset} has {markers} "
            f"markers per chunk: give a dataset prepared with --injection=none."
        )
    if cfg.model.meta_position in ("none", "previous") and not cfg.has_markers(markers):
        raise UserError(
            f"meta_position={cfg.model.meta_position} has no effect, because {cfg.dataset} has no markers: set "
            f"--meta_position=same, or give a dataset prepared with --injection=uniform."
        )
    closing = cfg.markers.evict == "segment" or cfg.markers.closing_reads == "segment"
    if closing and not places and not markers:
        raise UserError(
            f"evict={cfg.markers.evict}, closing_reads={cfg.markers.closing_reads} need markers that close segments, "
            f"and {cfg.dataset} has none: give a dataset prepared with --injection=uniform, or set --marker_place."
        )
    if second.markers == "allowed" and not places:
        check_window(cfg, content, markers)


def check_window(cfg: TrainConfig, content: int, markers: int) -> None:
    """Raises UserError if the window of an arm that may have markers is that of the other kind of dataset.

    The other kind of dataset is offered before another block_size, which would turn the run into another arm."""
    size, chunk = cfg.model.block_size, content + markers
    if size % chunk == 0:
        return
    offer = f"--block_size={nearest_multiples(size, chunk)}"
    if markers and size % content == 0:
        raise UserError(
            f"{cfg.dataset} has {markers} markers per chunk, but block_size={size} is for data without markers: give a "
            f"dataset prepared with --injection=none, or train another arm, one with markers, with {offer}."
        )
    if markers:
        raise UserError(
            f"{cfg.dataset} has {markers} markers per chunk, and block_size={size} is not a whole number of its "
            f"{chunk}-position chunks: for an arm without markers give a dataset prepared with --injection=none and "
            f"--block_size={nearest_multiples(size, content)}, or train another arm, one with markers, with {offer}."
        )
    raise UserError(
        f"{cfg.dataset} has no markers, and block_size={size} is not a whole number of its {chunk}-position chunks: "
        f"for an arm with markers give a dataset prepared with --injection=uniform, else use {offer}."
    )


def with_vocabulary(cfg: TrainConfig, n_vocab: int, n_content: int) -> TrainConfig:
    """Returns cfg with the vocabulary of its dataset. Raises UserError if cfg names another vocabulary size."""
    vocabulary = {"vocab_size": n_vocab, "content_vocab_size": n_content}
    for name, found in vocabulary.items():
        wanted = getattr(cfg.model, name)
        if wanted not in (None, found):
            raise UserError(
                f"{name}={wanted} does not match the tokenizer of {cfg.dataset}, which has {found}: leave --{name} out."
            )
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **vocabulary))


def data_facts(data: Windows | TaskWindows, cfg: TrainConfig, base: Checkpoint | None = None) -> dict:
    """Returns what a checkpoint records of its dataset: the facts needed to insert markers as in training, and to
    recognize the data. A task run that takes over a model returns the record of that model's training."""
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
