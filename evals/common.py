"""What evaluations share: which run, whose weights, in which arm, and where the lines go."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.files import file_sha256
from nanometa.config import Rescale
from nanometa.config.arms import arm_label
from nanometa.config.checks import check_types, to_dict
from nanometa.data.inject import strip
from nanometa.data.shards import TokenStream, read_manifest, token_dtype
from nanometa.training.checkpoint import WEIGHTS, Run, content_tokens, load_run
from nanometa.training.context_extension import rescaled, scaling_of
from nanometa.training.distributed import autocast, pick_device, pick_dtype
from nanometa.training.run_log import environment

POSITIONS = 16384  # in one forward: some 0.1 GB a layer at GPT-2's width


@dataclass(frozen=True)
class Evaluation:
    """What every evaluation asks for: which run, read how, computed where, written to which file."""

    run: str = ""
    """a run's folder (out/NAME) or one of its checkpoints; by default the newest run in out/"""
    rescale: Rescale = field(default_factory=Rescale)
    output: str = ""
    """file of JSON lines to append to; by default one in the run's folder, by the name of what is measured:
    tasks.jsonl, perplexity.jsonl, passkey.jsonl, positions.jsonl, attention.jsonl and so on"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"

    def __post_init__(self):
        check_types(self)

    def open(self) -> tuple[Run, dict]:
        """The run as it is to be read, and what every line says of it. Raises UserError."""
        run = load_run(self.run, pick_device(self.device))
        facts, trained = facts_of(run), run.config.model
        run = rescaled(run, self.rescale)
        if run.config.model != trained:
            given = scaling_of(run.config.model) or "none"
            facts |= {"scaling": given, "arm": f"{facts['arm']}, read with {given}"}
        return run, facts

    def autocast(self, run: Run):
        """The context of the arithmetic that dtype asks for."""
        device = run.model.wte.weight.device
        return autocast(device, pick_dtype(self.dtype, device)[0])

    def lines(self, run: Run, name: str) -> Path:
        """The file to append to."""
        return Path(self.output) if self.output else run.folder.parent / f"{name}.jsonl"


def arm_of(run: Run) -> str:
    """The arm by its short name, as in records: meta, pause (markers in its data, no second attention), causal2,
    random, widemlp or gpt2, and its positions."""
    m = run.config.model
    name = arm_label(m.second, m.n_inner not in (None, 4 * m.n_embd), bool(run.state["data"]["chunk_markers"]))
    unplaced = f", markers' position {m.meta_position.replace('_', ' in ')}" if m.meta_position != "same" else ""
    scaling = f", {scaling_of(m)}" if scaling_of(m) else ""
    return f"{name} + {m.position}{scaling}{unplaced}"


def facts_of(run: Run) -> dict:
    """What every line says of the run, so that it can be repeated."""
    task = run.config.task
    return {
        "arm": arm_of(run),
        "scaling": scaling_of(run.config.model) or "none",
        "trained_scaling": scaling_of(run.config.model) or "none",
        "original_block_size": run.config.model.original_block_size,
        "run": run.config.run_name,
        "checkpoint": str(run.folder),
        "weights_sha256": file_sha256(run.folder / WEIGHTS),
        "step": run.state["step"],
        "seed": run.config.seed,
        "trained_on": list(task.tasks) or run.state["data"]["dataset"],
        "train_length": task.train_length if task.tasks else run.config.model.block_size,
        "train_placements": list(task.placements) if task.tasks else None,
        "settings": _settings(run),
        "origin": origin_of(run),
        "parameters": run.model.num_params(),
        "command": environment()["command"],
        "commit": environment()["commit"],
        "machine": f"{environment()['processor']}, {environment()['cores']} cores",
    }


def origin_of(run: Run) -> dict:
    """Where the weights come from: those of step 0, and the text that they and the run were trained on; tasks apart.
    content_tokens: None if nobody kept count, 0 for a model that has never seen text."""
    data, tokens = run.state["data"], content_tokens(run.state, run.config)
    return {
        "weights": run.state.get("origin", "unknown").partition(": loaded")[0],  # with their sha256
        "dataset": data["dataset"] if tokens != 0 else None,
        "train_sha256": data["content_sha256"].get("train") if tokens != 0 else None,
        "content_tokens": tokens,
    }


def _settings(run: Run) -> str:
    """A hash of how the run was trained, but for its model, its seed and names of folders: arms that are compared, and
    seeds of one arm, have the same."""
    apart = ("model", "seed", "run_name", "out_dir", "init_from", "branch_from", "dataset")
    settings = {name: value for name, value in to_dict(run.config).items() if name not in apart}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def fits(run: Run, length: int) -> str:
    """Why no text of so many positions can be read, "" if it can: a learned table ends."""
    m = run.config.model
    if m.position == "learned" and length > m.block_size:
        return f"{length} positions, and the table of learned ones has {m.block_size}"
    return ""


def write_lines(path: Path, lines: list[dict]) -> None:
    """Appends to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def check_lengths(config) -> None:
    if not config.lengths or not all(8 <= length <= 2**20 for length in config.lengths):
        raise UserError(f"lengths={config.lengths} is out of range: give lengths from 8 to 1048576 positions.")


def check_markers(run: Run, markers: tuple[str, ...]) -> None:
    """Raises UserError if markers are to be placed as the run had them, and it had none."""
    placed = [name for name in markers if name in ("trained", "uniform", "periodic")]
    if placed and not run.state["data"]["chunk_markers"]:
        raise UserError(
            f"markers={placed[0]} needs a run that was trained on text with markers, and {run.folder} was not: take "
            f"--markers none."
        )


def check_finite(run: Run, nats: np.ndarray) -> None:
    """Raises UserError for a model that gives none: what is no number would compare as the best."""
    if not np.isfinite(nats).all():
        raise UserError(f"the weights in {run.folder} give a loss that is not finite: take another checkpoint.")


def read_split(run: Run, folder: Path, max_tokens: int | None) -> np.ndarray:
    """The stored validation stream (N,) int64, markers included, up to its last content token that is asked for: one
    more than are scored, since nothing predicts the first.

    Raises UserError if it is another tokenizer's, or not what its manifest says."""
    manifest, tokenizer = read_manifest(folder), run.tokenizer
    if manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{folder} was made with another tokenizer (fingerprint {manifest['tokenizer']['fingerprint'][:12]}..) "
            f"than {run.folder} was trained with ({tokenizer.fingerprint[:12]}..): prepare it with "
            f"--tokenizer={run.folder.parent}."
        )
    split = manifest["splits"]["val"]
    stream = TokenStream(folder, split["shards"], tokenizer.n_vocab)
    wanted = split["content_tokens"] if max_tokens is None else min(max_tokens + 1, split["content_tokens"])
    chunks = -(-wanted // manifest["chunk_content"])
    tokens = stream.read(0, chunks * (manifest["chunk_content"] + manifest["chunk_markers"]))
    content = strip(tokens, tokenizer.meta)
    whole = len(content) == split["content_tokens"]
    if (
        tokens.max() > tokenizer.meta
        or len(content) < wanted
        or (whole and content_sha256(run, content) != split["content_sha256"])
    ):
        raise UserError(f"the validation shards of {folder} are not what its manifest says: prepare the dataset again.")
    return tokens[: place_of(tokens, tokenizer.meta, wanted - 1) + 1]


def content_sha256(run: Run, content: np.ndarray) -> str:
    """As in a manifest: lines with the same one are of the same text."""
    return hashlib.sha256(content.astype(token_dtype(run.tokenizer.n_vocab))).hexdigest()


def place_of(tokens: np.ndarray, meta: int, i: int) -> int:
    """Where content token i stands."""
    return int(np.flatnonzero(tokens != meta)[i])
