"""Code shared by the evaluations: loads a run, describes it, checks settings, writes JSON lines, shows progress."""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Suppress

from nanometa.common.errors import UserError
from nanometa.common.files import own_file
from nanometa.common.terminal import BOLD, write, write_line
from nanometa.config import Rescale, TrainConfig
from nanometa.config.checks import check, check_types, to_dict
from nanometa.data.inject import strip
from nanometa.data.shards import TokenStream, read_manifest, token_dtype
from nanometa.training.checkpoint import Run, content_tokens, load_run
from nanometa.training.context_extension import rescaled, scaling_of
from nanometa.training.distributed import autocast, pick_device, pick_dtype
from nanometa.training.run_log import environment

POSITIONS = 16384  # positions in one forward pass, which takes about 0.1 GB per layer at GPT-2's width
PATIENCE = 2.0  # seconds after which a cell shows a progress bar


@dataclass(frozen=True)
class Evaluation:
    """The settings of every evaluation: the run, how to read its positions, the device, and the output file."""

    READS = ()
    """What the evaluation supports beside plain texts: "drawn", markers that a run places itself; "limited", limits to
    what positions may read; "previous", markers with the position of the token before them."""

    run: str = ""
    """folder of a run (out/NAME) or of one of its checkpoints; if empty, the newest run in out/"""
    rescale: Rescale = field(default_factory=Rescale)
    output: str = ""
    """file of JSON lines to append to; if empty, a file in the run's folder that is named after the evaluation or
    probe: tasks.jsonl, perplexity.jsonl, passkey.jsonl, positions.jsonl, attention.jsonl and so on"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """device to compute on; auto takes the first available of cuda, mps, cpu"""
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"
    """precision of the matrix products; auto takes bfloat16 where the hardware computes it"""
    typed: Suppress[tuple[str, ...]] = field(default=(), compare=False, repr=False, metadata={"hidden": True})
    """names of the settings that the command line set, even to their defaults"""

    def __post_init__(self):
        check_types(self)
        if self.output and Path(self.output).is_dir():
            raise UserError(f"output={self.output} is a folder, but results are lines of a file: give a file's name.")

    def open(self) -> tuple[Run, dict]:
        """Returns the run, with its positions rescaled as asked, and the facts that every JSON line repeats about it.

        Raises UserError if there is no such run or it cannot be rescaled."""
        run = load_run(self.run, pick_device(self.device))
        markers = run.config.markers
        for kind, applies, what in (
            ("drawn", markers.places_markers, markers.label),
            ("limited", markers.restricts, markers.label),
            ("previous", run.config.model.meta_position == "previous", "meta_position=previous"),
        ):
            if applies and kind not in self.READS:
                raise UserError(
                    f"{run.folder} was trained with special markers ({what}), which this evaluation cannot place: use "
                    f"python eval.py compression, or another run."
                )
        facts, trained = facts_of(run), run.config.model
        run = rescaled(run, self.rescale)
        if run.config.model != trained:
            given = scaling_of(run.config.model) or "none"
            facts |= {"scaling": given, "arm": f"{facts['arm']}, read with {given}"}
        return run, facts

    def autocast(self, run: Run):
        """Returns the autocast context for the setting dtype."""
        device = run.model.wte.weight.device
        return autocast(device, pick_dtype(self.dtype, device)[0])

    def lines(self, run: Run, name: str) -> Path:
        """Returns the file of JSON lines: the setting output, or NAME.jsonl in the run's folder.

        Raises UserError if it cannot be written, before anything is measured."""
        path = Path(self.output) if self.output else own_file(run.folder.parent / f"{name}.jsonl")
        nearest = next(place for place in (path, *path.parents) if place.exists())
        if not os.access(nearest, os.W_OK):
            raise UserError(f"{path} cannot be written: name another file with --output=FILE.jsonl.")
        return path

    def record(self, run: Run, facts: dict, name: str, measured: Iterable[dict | str], heading: str = "") -> None:
        """Appends lines to the file of evaluation `name` as soon as they are measured, and prints the texts among them.

        measured: lines and texts, computed while this function iterates, under the setting dtype.
        heading: text after the arm and the folder in the first printed line."""
        output = self.lines(run, name)
        write_line(f"{facts['arm']}, {run.folder}{heading}", BOLD)
        with self.autocast(run):
            for one in measured:
                if isinstance(one, str):
                    write(one)
                else:
                    write_lines(output, [{**facts, **one}])
        write_line(str(output), BOLD)


def arm_of(run: Run) -> str:
    """Returns the arm's short name and its kind of positions, for example "meta + rope".

    Short names are those of arm_label: meta, pause (markers in the data, no second attention), causal2, random,
    widemlp, gpt2 and so on."""
    m = run.config.model
    name = run.config.arm_name(run.state["data"]["chunk_markers"])
    unplaced = f", markers' position {m.meta_position.replace('_', ' in ')}" if m.meta_position != "same" else ""
    scaling = f", {scaling_of(m)}" if scaling_of(m) else ""
    return f"{name} + {m.position}{scaling}{unplaced}"


# the names of the facts that facts_of returns
FACTS = (
    "arm", "scaling", "trained_scaling", "original_block_size", "run", "checkpoint", "weights_sha256", "step", "seed",
    "trained_on", "train_length", "train_placements", "settings", "origin", "parameters", "command", "commit",
    "machine",
)  # fmt: skip


def facts_of(run: Run) -> dict:
    """Returns the facts about a run that every JSON line repeats, so that the measurement can be reproduced."""
    task = run.config.task
    return {
        "arm": arm_of(run),
        "scaling": scaling_of(run.config.model) or "none",
        "trained_scaling": scaling_of(run.config.model) or "none",
        "original_block_size": run.config.model.original_block_size,
        "run": run.config.run_name,
        "checkpoint": str(run.folder),
        "weights_sha256": run.weights_sha256,
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
    """Returns where the weights come from: the initial weights, and the text that the run was trained on.

    Training on task texts is not included. content_tokens is None if their number is unknown, and 0 for a model that
    was never trained on text."""
    data, tokens = run.state["data"], content_tokens(run.state, run.config)
    return {
        "weights": run.state.get("origin", "unknown").partition(": loaded")[0],  # includes their sha256
        "dataset": data["dataset"] if tokens != 0 else None,
        "train_sha256": data["content_sha256"].get("train") if tokens != 0 else None,
        "content_tokens": tokens,
    }


def _settings(run: Run) -> str:
    """Returns a hash of the run's training settings, without its model, its seed, names of folders, and what is shown
    of the run.

    Arms that can be compared, and the seeds of one arm, have the same hash."""
    apart = {"model", "seed", "run_name", "out_dir", "init_from", "branch_from", "dataset"}
    apart |= {"tracker", "draw_curves", "sample_interval", "sample_prompt"}
    settings = {name: value for name, value in to_dict(run.config).items() if name not in apart}
    # runs that are older than these settings keep their hash
    for name in ("stop_at", "scorer", "weights", "train_only", "lora_r", "lora_alpha"):
        if getattr(run.config, name) == getattr(TrainConfig(), name):
            del settings[name]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def fits(run: Run, length: int) -> str:
    """Returns "" if the run can read texts of `length` positions, or else the reason why it cannot."""
    m = run.config.model
    if m.position == "learned" and length > m.block_size:
        return (
            f"{length} positions do not fit into the learned position table, which has {m.block_size} rows, those of "
            f"the window it was trained in (a run with --position=rope has no such limit, and one with a --block_size "
            f"of {length} or more has room)"
        )
    return ""


def write_lines(path: Path, lines: list[dict]) -> None:
    """Appends dictionaries to a file of JSON lines, which is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on a terminal while a cell is computed, if that takes longer than PATIENCE seconds.

    Yields a function that adds to the number of finished units, `total` at the end. The bar is erased when the cell is
    finished. Nothing is written if standard output is not a terminal."""
    if not sys.stdout.isatty():
        yield lambda units: None
        return
    bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn(), transient=True)
    task, started = bar.add_task(label, total=total), time.perf_counter()

    def advance(units: int) -> None:
        bar.advance(task, units)
        if not bar.live.is_started and time.perf_counter() - started >= PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def check_ranges(config, **ranges: tuple[float, float]) -> None:
    """Raises UserError if a setting does not lie in its range, given by the least and the largest allowed value.

    A tuple must have at least one value, and all its values must lie in the range. None is not checked."""
    for name, (low, high) in ranges.items():
        value, several = getattr(config, name), isinstance(getattr(config, name), tuple)
        values = value if several else () if value is None else (value,)
        holds = all(low <= one <= high for one in values) and (bool(values) or not several)
        check(config, name, holds, f"{'be one or more values' if several else 'lie'} in {low:,} .. {high:,}")


def check_markers(run: Run, markers: tuple[str, ...]) -> None:
    """Raises UserError if `markers` asks for markers and the run was trained without."""
    placed = [name for name in markers if name in ("trained", "uniform", "periodic")]
    if placed and not run.state["data"]["chunk_markers"]:
        raise UserError(
            f"markers={placed[0]} needs a run that was trained on text with markers, and {run.folder} was not: use "
            f"--markers none."
        )


def check_finite(run: Run, nats: np.ndarray) -> None:
    """Raises UserError if a loss is not finite. A NaN would otherwise rank as the best answer in comparisons."""
    if not np.isfinite(nats).all():
        raise UserError(f"the loss of {run.folder} is not finite, so nothing can be measured: use another checkpoint.")


def read_split(run: Run, folder: Path, max_tokens: int | None) -> np.ndarray:
    """Returns the stored validation stream (N,) int64, markers included, of max_tokens + 1 content tokens.

    There is one more content token than are scored, since nothing predicts the first. None reads the whole split.
    Raises UserError if the dataset was made with another tokenizer, or its shards do not match its manifest."""
    manifest, tokenizer = read_manifest(folder), run.tokenizer
    if manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{folder} was made with another tokenizer (fingerprint {manifest['tokenizer']['fingerprint'][:12]}..) "
            f"than {run.folder} was trained with ({tokenizer.fingerprint[:12]}..): prepare the dataset with "
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
        raise UserError(
            f"the validation shards of {folder} do not match its manifest, so the text is not known: prepare the "
            f"dataset again."
        )
    return tokens[: place_of(tokens, tokenizer.meta, wanted - 1) + 1]


def content_sha256(run: Run, content: np.ndarray) -> str:
    """Returns the sha256 of a content stream, as in a manifest. Measurements with equal hashes used the same text."""
    return hashlib.sha256(content.astype(token_dtype(run.tokenizer.n_vocab))).hexdigest()


def place_of(tokens: np.ndarray, meta: int, i: int) -> int:
    """Returns the position of content token i in a stream with markers."""
    return int(np.flatnonzero(tokens != meta)[i])
