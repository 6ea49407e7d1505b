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
length are whole chunks, and nearly elsewhere; markers at regular places (periodic) are shifted there.

With --documents the text is not the stream but pieces of its long documents, each as much content as a window of the
longest length holds (evals/documents.py), each read by itself. So that window's loss at a place is the loss given all
of one document, or of its piece, up to there. A document's first piece starts with <|endoftext|>; the others start
within the text, as windows of training do, and their first token is context alone. Shorter lengths slide over the same
pieces and score the same tokens. The loss by depth, "by_depth", is by place in the piece, counted in content tokens: at
a depth all lengths, scalings, conditions and arms predict the same tokens. Its intervals take documents as the unit;
"document_nats" is for intervals of differences, which are much narrower, since documents differ."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.common.terminal import BOLD, write
from nanometa.config.checks import check, nearest_multiples
from nanometa.config.settings import setting
from nanometa.data.inject import inject, marker_places, strip
from nanometa.data.layout import IGNORE, Layout, batch_of, connected_positions, draw_of, layout_of, targets_of
from nanometa.evals.common import (
    POSITIONS,
    Evaluation,
    check_finite,
    check_lengths,
    check_markers,
    content_sha256,
    fits,
    place_of,
    read_split,
    write_lines,
)
from nanometa.evals.documents import ByDepth, pieces
from nanometa.inference.scoring import score_batch
from nanometa.layers.loss import Tally
from nanometa.training.checkpoint import Run

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
    draws: int = setting(3, only_with={"markers": ((), "trained", "uniform")})
    """for trained and uniform: so many draws of the places"""
    documents: bool = False
    """windows inside documents alone: pieces of the longest of lengths, of every document that has so many tokens"""
    max_tokens: int | None = None
    """score so many content tokens, from the start of the split, or with --documents cut these; None = all"""
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
        if self.documents and self.stride:
            raise UserError(
                f"stride={self.stride} has no use with --documents, where the longest window reads a piece whole and a "
                f"shorter one goes on by half its length: leave one out."
            )
        if self.documents and (unfit := [name for name in self.markers if name in ("stored", "none_wide")]):
            raise UserError(
                f"markers={unfit[0]} has no use with --documents, whose pieces get new markers and have the same "
                f"content in all conditions: take trained, uniform, periodic or none."
            )


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
    content, owners = strip(stored, run.tokenizer.meta), None
    if cfg.documents:
        content, owners = long_pieces(run, content, max(lengths), folder)
        trained = window(rule, "none", run.config.model.original_block_size, 1)[0]
        facts |= {"documents": len(np.unique(owners)), "pieces": len(owners), "original_content": trained}
    else:
        check_text(content, stored, conditions, max(lengths), folder)
    output = cfg.lines(run, "perplexity")
    facts |= {"dataset": str(folder), "split": "val", "content_sha256": content_sha256(run, content),
             "target_rule": run.config.target_rule}  # fmt: skip
    scored = f"{len(content) - (1 if owners is None else len(owners)):,} content tokens of {folder}"
    cut = f", {facts['pieces']} pieces of {facts['documents']} documents" if cfg.documents else ""
    write(f"{facts['arm']}, {run.folder}, {scored}{cut}\n", BOLD)
    with cfg.autocast(run):
        for length in lengths:
            whole = cfg.documents and length == max(lengths)  # one window is a piece
            stride = cfg.stride or (length if whole else max(1, length // 2))
            for markers in conditions:
                cells, piece = [], window(rule, markers, max(lengths), 1)[0]
                for draw, (injection, tokens) in enumerate(streams(run, stored, content, markers, cfg.draws)):
                    cell = {"eval": "perplexity", "markers": markers, "injection": injection, "draw": draw,
                            "length": length}  # fmt: skip
                    texts = [tokens] if owners is None else np.split(tokens, range(piece, len(tokens), piece))
                    how = (*window(rule, markers, length, stride), cfg.bucket)
                    cells.append({**cell, **measure_perplexity(run, texts, *how, owners)})
                    write_lines(output, [{**facts, **cells[-1]}])
                write(sentence(cells) + "\n")
    write(f"{output}\n", BOLD)


def check_text(content: np.ndarray, stored: np.ndarray, conditions: tuple, longest: int, folder: Path) -> None:
    """Raises UserError if a stream is too short for a window of so many positions, or lacks the markers asked for."""
    if "stored" in conditions and len(content) == len(stored):
        raise UserError(f"markers=stored, and {folder} has no markers: take --markers none, or another --dataset.")
    if len(content) <= longest:
        raise UserError(
            f"a window of {longest} positions is longer than the {len(content):,} content tokens that are read of "
            f"{folder}: take shorter --lengths or more text."
        )


def long_pieces(run: Run, content: np.ndarray, longest: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of documents in a content stream that fill windows of so many positions, one after the other (P K,),
    and the number of each one's document (P,). Raises UserError if there is none."""
    C, M = run.state["data"]["chunk_content"], run.state["data"]["chunk_markers"]
    if M and longest % (C + M):
        raise UserError(
            f"lengths={longest} is not a whole number of the run's chunks of {C + M} positions, which the pieces of "
            f"documents are: take {nearest_multiples(longest, C + M)} for the longest."
        )
    size = longest // (C + M) * C if M else longest
    found, owners, most = pieces(content, run.tokenizer.eot, size)
    if not len(found):
        raise UserError(
            f"no document that is read of {folder} has the {size:,} tokens that a window of {longest} positions holds, "
            f"the longest has {most:,}: read more (--max_tokens), take shorter --lengths, or prepare other text with "
            f"--min_document_tokens={size}."
        )
    return found.reshape(-1), owners


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
    """Yields the windows of a stream (N,), `size` at a time: numbers (B,), layouts, and targets (B, length).

    Window w starts at w stride. Its targets are those of the whole stream under the run's rule, at positions that no
    earlier window contains. The last window is padded with id 0, behind everything that is scored."""
    stream = layout_of(tokens, meta, width=len(tokens) + length)
    targets = targets_of(stream, rule)
    last = int(np.flatnonzero(targets != IGNORE)[-1])
    n = 1 + max(0, -(-(last + 1 - length) // stride))
    for first in range(0, n, size):
        numbers = np.arange(first, min(first + size, n))
        at = numbers[:, None] * stride + np.arange(length)  # (B, length)
        layouts = [Layout(stream.tokens[row], stream.content[row], np.arange(length)) for row in at]
        scored_before = (numbers[:, None] > 0) & (np.arange(length) < length - stride)
        yield numbers, layouts, np.where(scored_before, IGNORE, targets[at])


def measure_perplexity(run: Run, texts: list[np.ndarray], length: int, stride: int, bucket: int, owners=None) -> dict:
    """Figures of texts, each (N,) and by itself, in windows of `length` positions, `stride` apart.

    owners (len(texts),): of pieces of documents the number of each one's document, for the loss by depth."""
    cell = {"window": length, "stride": stride}
    if why := fits(run, length):
        return {**cell, "tokens": 0, "impossible": why}
    started, device, meta = time.perf_counter(), run.model.wte.weight.device, run.tokenizer.meta
    draw = draw_of(run.config, "val")
    tally = Tally(torch.from_numpy(run.tokenizer.token_bytes), device)
    by_depth = None if owners is None else ByDepth(owners, int((texts[0] != meta).sum()), bucket)
    size, buckets, context, before = max(1, POSITIONS // length), -(-length // bucket), 0, 0
    nats_at, n_at = np.zeros(buckets), np.zeros(buckets, dtype=np.int64)
    for number, text in enumerate(texts):
        content = (text != meta).cumsum() - 1  # place among the content tokens of the text
        for numbers, layouts, targets in windows(text, length, stride, run.config.target_rule, meta, size):
            batch = batch_of(layouts, targets, connected_positions(layouts, meta, before + numbers, draw))
            scores = score_batch(run.model, batch.to(device))
            tally.add(scores.nats, scores.targets)
            nats = scores.nats[scores.targets >= 0].cpu().double().numpy()
            row, at = np.nonzero(targets != IGNORE)  # in the order of nats
            nats_at += np.bincount(at // bucket, weights=nats, minlength=buckets)
            n_at += np.bincount(at // bucket, minlength=buckets)
            seen = (batch.tokens != meta).cumsum(dim=1)  # (B, T) content tokens up to each position
            context += int(seen[row, at].sum())
            if by_depth:
                by_depth.add(number, content[numbers[row] * stride + at], nats)
        before += 1 + int(numbers[-1])
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
        **(by_depth.figures() if by_depth else {}),
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
