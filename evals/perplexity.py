"""python eval.py perplexity: the loss of a run on validation text, at any window length, with and without markers.

A window of `length` positions slides over the stream, `stride` at a time, and scores what the window before it did not
reach. So every content token is scored exactly once, the stream's first apart, as in training, and from at least
length - stride positions before it, the stream's start apart. With stride = length and the stored markers these are the
windows and the targets of training's validation.

The content is the same in all conditions, and so are the tokens that are scored; where markers go is drawn anew.
Markers take positions, and a window without them would show more text. So `none` has windows of as many content tokens
as the marked ones have on average, length C / (C + M) positions (as the arms without markers are trained); none_wide
has all `length` positions for text. "context" is what came of it: content tokens in the window up to what predicts.

Chunks of markers lie where the stream has them, so a window shows training's number of them exactly where stride and
length are whole chunks, and nearly elsewhere; markers at regular places (periodic) are shifted there."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from checkpoint import Run
from config import UserError, check
from data.inject import inject, marker_places, strip
from data.loader import IGNORE, Batch, places_of, targets_of
from evals.common import (
    POSITIONS,
    Evaluation,
    check_finite,
    check_lengths,
    check_markers,
    connected,
    content_sha256,
    fits,
    hidden_of,
    place_of,
    read_split,
    write_lines,
)
from loss import Tally, scored_rows, token_nats
from rng import stable_key
from terminal import BOLD, write

Markers = Literal["trained", "none", "none_wide", "stored", "uniform", "periodic"]


@dataclass(frozen=True)
class PerplexityEval(Evaluation):
    """Loss, perplexity and bits per byte on validation text, by window length and markers."""

    dataset: str = ""
    """folder that prepare.py made with the run's tokenizer; by default the run's own"""
    lengths: tuple[int, ...] = ()
    """positions of a window, markers included; by default the run's block_size"""
    stride: int | None = None
    """positions from one window to the next; None = half of each length"""
    markers: tuple[Markers, ...] = ()
    """trained: new draws by the run's rule; uniform, periodic: by another rule, as many; stored: those of the dataset;
    none: without, in windows of the same content; none_wide: without, in windows of all positions. By default trained
    and none, or none for a run without markers"""
    draws: int = 3
    """for trained and uniform: so many draws of the places"""
    max_tokens: int | None = None
    """score so many content tokens, from the start of the split; None = all"""
    bucket: int = 64
    """positions that the loss by position takes together"""

    def __post_init__(self):
        super().__post_init__()
        if self.lengths:
            check_lengths(self)
        check(self, "stride", self.stride is None or self.stride >= 1, "be at least 1, or None")
        check(self, "draws", 3 <= self.draws <= 1000, "lie in 3 .. 1000: fewer say nothing of the spread")
        check(self, "max_tokens", self.max_tokens is None or self.max_tokens >= 100, "be at least 100, or None")
        check(self, "bucket", self.bucket >= 1, "be at least 1")


def main(cfg: PerplexityEval) -> None:
    run, facts = cfg.open()
    rule, folder = run.state["data"], Path(cfg.dataset or run.state["data"]["dataset"])
    conditions = cfg.markers or (("trained", "none") if rule["chunk_markers"] else ("none",))
    check_markers(run, conditions)
    lengths = cfg.lengths or (run.config.model.block_size,)
    if cfg.stride and cfg.stride > min(lengths):
        raise UserError(
            f"stride={cfg.stride} would leave text out between windows of {min(lengths)} positions: take at most that."
        )
    stored = read_split(run, folder, cfg.max_tokens)
    content = strip(stored, run.tokenizer.meta)
    if "stored" in conditions and len(content) == len(stored):
        raise UserError(f"markers=stored, and {folder} has no markers: take --markers none, or another --dataset.")
    if len(content) <= max(lengths):
        raise UserError(
            f"a window of {max(lengths)} positions is longer than the {len(content):,} content tokens that are read of "
            f"{folder}: take shorter --lengths or more text."
        )
    output = cfg.lines(run, "perplexity")
    facts |= {"dataset": str(folder), "split": "val", "content_sha256": content_sha256(run, content),
             "target_rule": run.config.target_rule}  # fmt: skip
    write(f"{facts['arm']}, {run.folder}, {len(content) - 1:,} content tokens of {folder}\n", BOLD)
    with cfg.autocast(run):
        for length in lengths:
            stride = cfg.stride or max(1, length // 2)
            for markers in conditions:
                cells = []
                for draw, (injection, tokens) in enumerate(streams(run, stored, content, markers, cfg.draws)):
                    cell = {"eval": "perplexity", "markers": markers, "injection": injection, "draw": draw,
                            "length": length}  # fmt: skip
                    cells.append({**cell, **measure(run, tokens, *window(rule, markers, length, stride), cfg.bucket)})
                    write_lines(output, [{**facts, **cells[-1]}])
                write(sentence(cells) + "\n")
    write(f"{output}\n", BOLD)


def streams(run: Run, stored: np.ndarray, content: np.ndarray, markers: str, draws: int) -> Iterator[tuple]:
    """The streams of a condition, one a draw, all of the same content -> (name of the rule, tokens (N,))."""
    rule = run.state["data"]
    if markers == "stored":
        yield "stored", stored
    elif markers in ("none", "none_wide"):
        yield "none", content
    else:
        injection = rule["injection"] if markers == "trained" else markers
        for draw in range(draws if injection == "uniform" else 1):  # periodic has nothing to draw
            key = stable_key("perplexity", draw)
            yield (
                injection,
                marked(content, injection, rule["chunk_content"], rule["chunk_markers"], key, run.tokenizer.meta),
            )


def marked(content: np.ndarray, injection: str, C: int, M: int, key: int, meta: int) -> np.ndarray:
    """content (N,) -> the stream with markers as preparation places them, up to the last content token."""
    n = -(-len(content) // C)
    chunks = np.zeros((n, C), dtype=content.dtype)  # the last one may be filled up
    chunks.reshape(-1)[: len(content)] = content
    tokens = inject(chunks, marker_places(injection, 0, n, C, M, key), meta).reshape(-1)
    return tokens[: place_of(tokens, meta, len(content) - 1) + 1]


def window(rule: dict, markers: str, length: int, stride: int) -> tuple[int, int]:
    """Positions of a window of a condition, and from one to the next."""
    if markers != "none":
        return length, stride
    share = rule["chunk_content"] / (rule["chunk_content"] + rule["chunk_markers"])
    return round(length * share), max(1, round(stride * share))


def windows(tokens: np.ndarray, length: int, stride: int, rule: str, meta: int, size: int) -> Iterator[tuple]:
    """Windows of a stream (N,), `size` at a time -> (their numbers (B,), ids (B, length), targets (B, length)).

    Window w starts at w stride. Its targets are those of the whole stream under the run's rule, at positions that no
    window before it has. The last one is filled up with id 0, which is after all that is scored."""
    targets = targets_of(tokens, len(tokens), meta, rule)
    targets[: place_of(tokens, meta, 0)] = IGNORE  # markers before the first content token, which has no context
    last = int(np.flatnonzero(targets != IGNORE)[-1])
    n = 1 + max(0, -(-(last + 1 - length) // stride))
    tokens, targets = (np.append(x, np.full(length, fill)) for x, fill in ((tokens, 0), (targets, IGNORE)))
    for first in range(0, n, size):
        numbers = np.arange(first, min(first + size, n))
        at = numbers[:, None] * stride + np.arange(length)  # (B, length)
        scored_before = (numbers[:, None] > 0) & (np.arange(length) < length - stride)
        yield numbers, tokens[at], np.where(scored_before, IGNORE, targets[at])


def as_batch(run: Run, numbers: np.ndarray, ids: np.ndarray, targets: np.ndarray) -> Batch:
    """What windows() gives as a Batch on the CPU."""
    is_meta, scored, T = ids == run.tokenizer.meta, targets != IGNORE, ids.shape[1]
    meta_index, count = places_of(is_meta, int(is_meta.sum(axis=1).max())), is_meta.sum(axis=1)
    drawn = connected(run, numbers, T, "val")
    if drawn is not None:
        meta_index, count = drawn, np.full(len(ids), drawn.shape[1])
    scored_index = places_of(scored, int(scored.sum(axis=1).max()))
    positions = np.broadcast_to(np.arange(T), ids.shape).copy()
    return Batch(*map(torch.from_numpy, (ids, targets, positions, meta_index, count, scored_index)))


def measure(run: Run, tokens: np.ndarray, length: int, stride: int, bucket: int) -> dict:
    """Figures of one stream (N,) in windows of `length` positions, `stride` apart."""
    cell = {"window": length, "stride": stride}
    if why := fits(run, length):
        return {**cell, "tokens": 0, "impossible": why}
    started, weight = time.perf_counter(), run.model.wte.weight
    tally = Tally(torch.from_numpy(run.tokenizer.token_bytes), weight.device)
    buckets, context = -(-length // bucket), 0
    nats_at, n_at = np.zeros(buckets), np.zeros(buckets, dtype=np.int64)
    size = max(1, POSITIONS // length)
    for part in windows(tokens, length, stride, run.config.target_rule, run.tokenizer.meta, size):
        batch = as_batch(run, *part).to(weight.device)
        hidden, targets = scored_rows(hidden_of(run, batch), batch.targets, batch.scored_index)
        nats = token_nats(hidden, weight, targets, run.tokenizer.n_content)
        tally.add(nats, targets)
        where = batch.scored_index if batch.scored_index.size(1) < length else batch.positions  # as scored_rows
        scored = (targets >= 0).cpu().numpy()
        at = where.flatten().cpu().numpy()[scored] // bucket
        nats_at += np.bincount(at, weights=nats.cpu().double().numpy()[scored], minlength=buckets)
        n_at += np.bincount(at, minlength=buckets)
        before = (part[1] != run.tokenizer.meta).cumsum(axis=1)  # content tokens that a position has seen
        context += int(before[part[2] != IGNORE].sum())
    check_finite(run, nats_at)
    figures = tally.figures()
    return {
        **cell,
        **figures,
        "perplexity": math.exp(figures["loss"]),
        "context": context / figures["tokens"],
        "bucket": bucket,
        # first position of the bucket (of what predicts, in its window), targets, nats a target
        "by_position": [
            [i * bucket, int(n), total / n]
            for i, (n, total) in enumerate(zip(n_at, nats_at.tolist(), strict=True))
            if n
        ],
        "seconds": time.perf_counter() - started,
    }


def sentence(cells: list[dict]) -> str:
    """All draws of a condition for a person."""
    first = cells[0]
    name = f"{first['length']:>6}  {first['markers']:<9}"
    if "impossible" in first:
        return f"{name}  impossible: {first['impossible']}"
    losses = np.array([cell["loss"] for cell in cells])
    spread = ""
    if len(cells) > 1:
        spread = f" ({losses.min():.4f} .. {losses.max():.4f}, sd {losses.std(ddof=1):.4f}, {len(cells)} draws)"
    bits, context = (np.mean([cell[key] for cell in cells]) for key in ("bits_per_byte", "context"))
    return (
        f"{name}  loss {losses.mean():.4f}{spread}  perplexity {math.exp(losses.mean()):.2f}  bits per byte {bits:.4f}"
        f"  windows of {first['window']}, {first['stride']} apart, {context:.0f} content tokens of context  "
        f"{sum(cell['seconds'] for cell in cells):.1f} s"
    )
