"""Describes what all processes of a run must have in common. Dist.compare compares it before the first step."""

import hashlib
import json
import sys

import torch

from nanometa.common.files import file_sha256
from nanometa.config import TrainConfig
from nanometa.config.checks import flat
from nanometa.training.checkpoint import MANIFEST, Checkpoint

DIGITS = 12  # shown of a hash


def program_and_settings(cfg: TrainConfig) -> dict[str, object]:
    """Returns the settings, the version of torch, and the sha256 of every source file of nanoMeta that is loaded.

    The path of the dataset is left out: it may differ between machines, and data_and_start compares the content."""
    settings = {name: value for name, value in flat(cfg).items() if name != "dataset"}
    sources = {
        name: file_sha256(module.__file__)[:DIGITS]
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in ("nanometa", "__main__") and getattr(module, "__file__", None)
    }
    return settings | {"torch": torch.__version__} | sources


def data_and_start(facts: dict, saved: Checkpoint | None, origin: str, notes: list[str]) -> dict[str, object]:
    """Returns the content of the data, the checkpoint that the run continues, and the weights that it starts from.

    facts: what a checkpoint records of the data, including its path. notes: sentences about damaged checkpoints."""
    content = json.dumps({name: value for name, value in facts.items() if name != "dataset"}, sort_keys=True)
    start = "step 0"
    if saved:
        start = f"step {saved.step} of {saved.folder} ({file_sha256(saved.folder / MANIFEST)[:DIGITS]})"
    return {
        "content of the dataset": hashlib.sha256(content.encode()).hexdigest()[:DIGITS],
        "start": "; ".join([start, *notes]),
        "weights": origin,
    }
