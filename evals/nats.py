"""Stores the nats of a training split's tokens under short contexts, as the scorer of weighted losses.

    python eval.py nats --run=out/tiny_gpt2 --dataset=data/stdlib_uniform --short_length=115
    python train.py config/tiny_meta.py --weighting=dense --scorer=data/stdlib_uniform/nats/tiny_gpt2_115_86

The nats are counted by content tokens. They serve every run on the same content with the same windows, whatever its
markers, and training then needs no scorer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.config.checks import FOLDER_NAME, check, is_folder_name
from nanometa.data.layout import IGNORE
from nanometa.data.loader import Windows
from nanometa.data.nats import Description, StoredNats, write
from nanometa.data.shards import read_manifest
from nanometa.evals.common import POSITIONS, Evaluation, check_finite, check_ranges, progress
from nanometa.layers.weighting import ShortLengths, content_scores
from nanometa.training.checkpoint import Run, content_per_window
from nanometa.training.weighted_loss import check_scorer, lengths_of


@dataclass(frozen=True)
class NatsEval(Evaluation):
    """The nats of a training split's tokens under short contexts, stored for weighted losses."""

    dataset: str = ""
    """folder of the dataset; if empty, that of the run"""
    content: int | None = None
    """content tokens in a window of the run that will be trained, a multiple of the dataset's chunks; None = as many as
    in a window of the scorer"""
    short_length: int | None = None
    """largest number of content tokens in a short context; None = a quarter of a window"""
    short_stride: int | None = None
    """content tokens between the starts of short contexts; None = (1 - short_length / content) short_length"""
    name: str = ""
    """name of the new folder in DATASET/nats; if empty, the run's name, the length and the stride"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, content=(2, 2**24), short_length=(1, 2**24), short_stride=(1, 2**24))
        check(self, "name", is_folder_name(self.name) or not self.name, FOLDER_NAME)


def main(cfg: NatsEval) -> None:
    """Runs the evaluation: writes the nats, and a JSON line about them in the folder of the run."""
    run, facts = cfg.open()
    folder = Path(cfg.dataset or run.state["data"]["dataset"])
    content = cfg.content or content_per_window(run.state, run.config)
    data = training_windows(folder, content)
    lengths = lengths_of(content, content, cfg.short_length, cfg.short_stride)
    check_scorer(run, data.tokenizer, lengths.length)
    name = cfg.name or f"{run.config.run_name}_{lengths.length}_{lengths.stride}"
    target = folder / "nats" / name
    if target.exists():
        raise UserError(f"{target} exists already: give another --name, or delete the folder.")

    def measured() -> Iterator[dict | str]:
        values = nats_of(run, data, lengths)
        about = Description(
            str(run.folder), run.weights_sha256, run.tokenizer.fingerprint,
            data.manifest["splits"]["train"]["content_sha256"], content, lengths.length, lengths.stride,
            data.n_windows, "",
        )  # fmt: skip
        write(target, about, values)
        mean = float(StoredNats(target).read(np.arange(data.n_windows)).mean(dtype=np.float64))
        line = {
            "eval": "nats", "dataset": str(folder), "nats": str(target), "content": content,
            "short_length": lengths.length, "short_stride": lengths.stride, "windows": data.n_windows, "mean": mean,
        }  # fmt: skip
        yield line
        yield (
            f"{data.n_windows:,} windows of {content} content tokens, with short contexts of "
            f"{lengths.length - lengths.stride + 1} to {lengths.length} tokens: {mean:.4f} nats per token\n"
            f"stored in {target}: train with --scorer={target}\n"
        )

    cfg.record(run, facts, "nats", measured())


def training_windows(folder: Path, content: int) -> Windows:
    """Returns the windows of a training split that have so many content tokens. Raises UserError if none has."""
    manifest = read_manifest(folder)
    C, M = manifest["chunk_content"], manifest["chunk_markers"]
    if content % C:
        raise UserError(
            f"content={content} is not a whole number of the {C}-token chunks of {folder}: give a multiple of {C}."
        )
    return Windows(folder, "train", content // C * (C + M), "ignore")


def nats_of(run: Run, data: Windows, lengths: ShortLengths) -> np.ndarray:
    """Returns the nats (windows, content) of the token after each content token, with short contexts, in fp16."""
    found = np.empty((data.n_windows, lengths.content), dtype=np.float16)
    device, size = run.model.wte.weight.device, max(1, POSITIONS // lengths.content)
    with torch.inference_mode(), progress(f"{data.n_windows} windows", data.n_windows) as advance:
        for start in range(0, data.n_windows, size):
            windows = np.arange(start, min(start + size, data.n_windows))
            texts = (content_tokens(data, window, lengths.content) for window in windows.tolist())
            ids, goals = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*texts, strict=True))
            found[windows] = content_scores(run.model, ids, goals, lengths).float().cpu().numpy()
            advance(len(windows))
    check_finite(run, found)
    return found


def content_tokens(data: Windows, window: int, content: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the content tokens of a window and the token after each of them, (content,) int64 each.

    Nothing follows the last token of the split; its target is -100."""
    ids = data.stream.read(window * data.step, (window + 1) * data.step + data.lookahead).astype(np.int64)
    ids = ids[ids < data.tokenizer.n_content][: content + 1]
    return ids[:content], np.append(ids, IGNORE)[1 : content + 1]
