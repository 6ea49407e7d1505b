"""Writes a run as a folder that Hugging Face transformers loads, with tasks for lm-eval and a model card."""

import importlib.util
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
from tyro.conf import Suppress

from nanometa.common.errors import UserError
from nanometa.common.terminal import BOLD, write_line
from nanometa.config import Rescale
from nanometa.config.checks import check, check_types
from nanometa.config.settings import SET, Settings, setting
from nanometa.evals.common import facts_of, read_split
from nanometa.inference.generation import MarkerPlan
from nanometa.interop.adapter import open_adapted, write_adapter
from nanometa.interop.hub import check_repository, push
from nanometa.interop.model_card import Card, model_card
from nanometa.interop.output import begin, check_output, finish, write_json, write_text
from nanometa.interop.texts import bits_per_byte, harness_texts
from nanometa.interop.weights import CODE, config_of, is_plain, pad_id, placement_of, refuse, token_ids, weights_of
from nanometa.training.checkpoint import Run, load_run
from nanometa.training.context_extension import rescaled

WHOLE = {"adapter": (False,)}  # condition of the settings of a whole model
NAME = r"[a-z0-9.-]*"  # of a license or a language on the hub
TASKS = Path(__file__).parent / "lm_eval"  # the files of the lm-eval tasks, copied as they are


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Exports a trained model to Hugging Face transformers."""

    run: str = ""
    """folder of a run (out/NAME) or of one of its checkpoints; by default the newest run in out/"""
    output: str = ""
    """folder to write, which must not exist; if empty, hf in the run's folder, or adapter with --adapter"""
    adapter: bool = False
    """write the factors that the run trained with train_only=lora, as an adapter for peft, instead of a whole model"""
    markers: Literal["auto", "implicit", "explicit", "none"] = setting("auto", only_with=WHOLE)
    """how the exported model gets its markers. implicit: it inserts them itself, by the rule of the run's data;
    explicit: prompts contain them, and generation forces them; none: it neither inserts nor forces any; auto =
    implicit, or none for a run whose data has no markers"""
    seed: int = setting(1337, only_with=WHOLE)
    """seed of random marker positions; the default gives those of generation and scoring from Python"""
    eval_texts: int = setting(200, only_with=WHOLE)
    """number of texts of each lm-eval task, which the export contains; 0 = no tasks and no figures on these texts"""
    dataset: str = setting("", only_with={"eval_texts": SET})
    """folder of the dataset whose validation text is exported for lm-eval; if empty, the run's own"""
    push_to_hub: str = setting("", only_with=WHOLE)
    """repository USER/NAME of the Hugging Face hub to upload the export to; a new one is private"""
    license: str = setting("", only_with=WHOLE)
    """license of the weights for the model card, by its name on the hub, such as mit; if empty, the card names none"""
    language: str = setting("", only_with=WHOLE)
    """language of the text for the model card, by its ISO 639-1 code, such as en; if empty, the card names none"""
    rescale: Rescale = field(default_factory=Rescale)
    typed: Suppress[tuple[str, ...]] = field(default=(), compare=False, repr=False, metadata={"hidden": True})
    """names of the settings that the command line set, even to their defaults"""

    def __post_init__(self):
        check_types(self)
        check(self, "seed", self.seed >= 0, "be at least 0")
        check(self, "eval_texts", 0 <= self.eval_texts <= 10**6, "lie in 0 .. 1000000")
        check(self, "license", re.fullmatch(NAME, self.license) is not None, "be a name such as mit or apache-2.0")
        check(self, "language", re.fullmatch(NAME, self.language) is not None, "be a code such as en")
        if self.push_to_hub:
            check_repository(self.push_to_hub)
        if self.adapter and self.rescale != Rescale():
            raise UserError(
                f"rope_scaling={self.rescale.rope_scaling} changes the model, which an adapter does not hold: leave it "
                f"out, or export the whole model without --adapter."
            )


def export(cfg: ExportConfig) -> Path:
    """Exports the run that cfg names, and uploads it if asked. Returns the folder.

    Raises UserError if the run cannot be exported, before anything is written."""
    if cfg.adapter:
        return _export_adapter(cfg)
    if importlib.util.find_spec("transformers") is None:
        raise UserError("export.py needs the package transformers, which is missing: pip install -e '.[export]'.")
    run = load_run(cfg.run)
    facts, run = facts_of(run), rescaled(run, cfg.rescale)
    refuse(run)
    placement = placement_of(run, cfg.markers)
    rule = run.state["data"]["injection"]
    if "seed" in cfg.typed and (rule != "uniform" or placement == "none"):
        raise UserError(
            f"--seed has no effect on {run.folder} with markers={placement}, because no marker is placed at random: "
            f"leave --seed out."
        )
    output = Path(cfg.output) if cfg.output else run.folder.parent / "hf"
    check_output(output)
    stream = validation_stream(run, cfg) if cfg.eval_texts else None
    partial = begin(output)
    config = config_of(run, placement, cfg.seed)
    write_model(run, config, partial)
    terms = {name: value for name in ("license", "language") if (value := getattr(cfg, name))}
    card = Card(run, facts, config, output.name, cfg.push_to_hub, {}, {}, [], terms)
    if stream is not None:
        card = write_tasks(run, cfg, config, stream, partial, card)
    write_text(partial / "README.md", model_card(card))
    finish(partial, output, config="config.json", weights="model.safetensors")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    write_line(f"{output}: {config['architectures'][0]}, {size / 1e6:.1f} MB", BOLD)
    if cfg.push_to_hub:
        write_line(push(output, cfg.push_to_hub))
    return output


def _export_adapter(cfg: ExportConfig) -> Path:
    """Writes the adapter of a run that was trained with LoRA. Returns the folder."""
    run = open_adapted(cfg.run)
    output = Path(cfg.output) if cfg.output else run.folder.parent / "adapter"
    check_output(output)
    for line in write_adapter(run, output):
        write_line(line)
    return output


def validation_stream(run: Run, cfg: ExportConfig) -> np.ndarray:
    """Returns the first validation tokens (N,), twenty times as many as the texts for lm-eval need.

    Raises UserError if the dataset is missing, or is not of the run's tokenizer."""
    folder = Path(cfg.dataset or run.state["data"]["dataset"])
    if not folder.is_dir():
        raise UserError(
            f"there is no dataset in {folder}, from whose validation text the export takes the texts for lm-eval: name "
            f"its folder with --dataset, or leave the texts out with --eval_texts=0."
        )
    return read_split(run, folder, 20 * cfg.eval_texts * run.config.model.block_size)


def write_model(run: Run, config: dict, folder: Path) -> None:
    """Writes the configuration, the code, the weights and the tokenizer."""
    import transformers  # an optional dependency, and slow to import

    from nanometa.interop.tokenizer import save_tokenizer

    version = {"transformers_version": transformers.__version__}
    write_json(folder / "config.json", {**config, **version})
    write_json(folder / "generation_config.json", {"_from_model_config": True, **token_ids(run), **version})
    if not is_plain(run):
        for name in ("configuration_nanometa.py", "modeling_nanometa.py"):
            shutil.copyfile(CODE / name, folder / name)
    safetensors.torch.save_file(weights_of(run), folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(run.tokenizer, pad_id(run), config["n_positions"], folder)


def write_tasks(run: Run, cfg: ExportConfig, config: dict, stream: np.ndarray, folder: Path, card: Card) -> Card:
    """Writes the lm-eval tasks with their texts. Returns the card with their names and this project's own figures."""
    plan = MarkerPlan.of_run(run, seed=cfg.seed)
    window = run.config.model.block_size
    # one position is left for <|endoftext|>, which lm-eval puts before the text
    longest = sum(position not in plan for position in range(window)) - 1
    texts, missing = harness_texts(run, stream, cfg.eval_texts, longest)
    tasks = folder / "lm_eval"
    tasks.mkdir()
    shutil.copyfile(TASKS / "offline.py", tasks / "offline.py")
    for name, lines in texts.items():
        shutil.copyfile(TASKS / f"{name}.yaml", tasks / f"{name}.yaml")
        write_text(tasks / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    pieces = texts["nanometa_bits_per_byte"]
    plans = {"none": MarkerPlan("none", 1, 0, 0)}
    if plan.M:
        plans = {"implicit": plan, **plans}
    figures = {placement: bits_per_byte(run, pieces, plan) for placement, plan in plans.items()}
    for placement, figure in figures.items():
        about = (
            f"{len(pieces)} pieces of validation text, marker_placement={placement}" if plan.M else "validation text"
        )
        write_line(f"{figure:.4f} bits per byte on {about}")
    for name, why in missing.items():
        write_line(f"without the lm-eval task {name}: {why}")
    return card._replace(
        figures=figures, n_texts={name: len(lines) for name, lines in texts.items()}, missing=[*missing]
    )
