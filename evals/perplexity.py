"""python eval.py perplexity: measures a run's loss on validation text, at any window length, with and without markers.

Windows. A window of `length` positions slides over the stream by `stride` positions at a time, and scores the tokens
that the previous windows did not contain. Every content token except the first of the stream is therefore scored
exactly once, as in training. Except at the start of the stream, it is predicted from at least length - stride
positions. With stride = length and the stored markers, windows and targets are those of the validation in training.

Conditions. The content and the scored tokens are the same in all conditions; only the places of the markers are drawn
anew. Markers take positions, so a window without markers would contain more text. `none` therefore uses windows of
length * C / (C + M) positions, which is the average number of content tokens in a window with markers, and the window
length with which the arms without markers are trained. `none_wide` uses all `length` positions for text. The figure
"context" is the resulting mean number of content tokens in the window up to the predicting token.

Chunks. Chunks with markers keep their places in the stream. If stride and length are multiples of a chunk, a window has
exactly as many markers as in training; otherwise it contains nearly as many, and periodic markers are shifted.

Documents. With --documents the text consists of pieces of long documents instead of the stream (evals/documents.py).
Each piece is read by itself and has as much content as a window of the longest length. The loss of that window at a
position is therefore the loss given all of the piece before it. The first piece of a document starts with
<|endoftext|>. The other pieces start within the text, as training windows do, and their first token is not scored.
Shorter windows slide over the same pieces and score the same tokens.

"by_distance" is the loss by distance since the last marker of the window, counted in positions from the predicting
token: 0 for predictions made at a marker, and null before the first marker. "by_position" is the loss by position in
the window, also beyond the trained one. Their intervals take blocks of consecutive windows as the unit, or documents.
"block_distance" and "block_position" hold the sums of nats and the numbers of tokens of each block and bin, for paired
comparisons of runs on the same text (report.py).

"by_depth" is the loss by place in the piece, counted in content tokens. At a given depth, all lengths, scalings,
conditions and arms predict the same tokens. Its intervals take documents as the unit. "document_nats" allows
intervals of differences, which are much narrower, because documents differ from each other."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.config.checks import nearest_multiples
from nanometa.config.settings import setting
from nanometa.data.inject import inject, marker_places, strip
from nanometa.data.layout import IGNORE, batch_of, connected_positions, draw_of, layout_of, targets_of
from nanometa.evals.blocks import DISTANCES, BlockSums, distance_bins, intervals
from nanometa.evals.common import (
    POSITIONS,
    Evaluation,
    check_finite,
    check_markers,
    check_ranges,
    content_sha256,
    fits,
    place_of,
    progress,
    read_split,
)
from nanometa.evals.documents import ByDepth, pieces
from nanometa.inference.scoring import score_batch
from nanometa.layers.loss import Tally
from nanometa.training.checkpoint import Run

Markers = Literal["trained", "none", "none_wide", "stored", "uniform", "periodic"]
LARGEST_LOSS = 700.0  # nats per token; exp overflows at 710
MEANING = {  # printed below the results
    "trained": "markers drawn anew by the rule of the run's training data",
    "none": "no markers, in shorter windows with as much text",
    "none_wide": "no markers, in windows of all positions, which have more text",
    "stored": "the markers of the dataset",
    "uniform": "as many markers, at random places",
    "periodic": "as many markers, evenly spaced",
}


@dataclass(frozen=True)
class PerplexityEval(Evaluation):
    """Loss, perplexity and bits per byte on validation text, by window length and markers."""

    dataset: str = ""
    """folder of a dataset that was prepared with the run's tokenizer; if empty, the run's own dataset"""
    lengths: tuple[int, ...] = ()
    """positions of a window, markers included; if empty, the run's block_size"""
    stride: int | None = None
    """positions from the start of one window to the next; None = half of each length"""
    markers: tuple[Markers, ...] = ()
    """trained: new draws by the run's rule; uniform, periodic: the same number of markers, placed by that rule; stored:
    the markers of the dataset; none: no markers, in shorter windows with the same amount of content; none_wide: no
    markers, in windows of all positions; if empty, trained and none, or none for a run without markers"""
    draws: int = setting(3, only_with={"markers": ((), "trained", "uniform")})
    """number of random draws of the marker positions, for markers trained and uniform; at least 3 show the spread"""
    documents: bool = False
    """read pieces of single documents instead of the stream; a piece fills a window of the longest of lengths"""
    max_tokens: int | None = None
    """number of content tokens to read from the start of the split; None = all"""
    bucket: int = 64
    """number of positions that are averaged together in the loss by position"""
    blocks: int = setting(32, only_with={"documents": (False,)})
    """number of blocks of consecutive windows, the unit of intervals by position and by distance since a marker"""

    def __post_init__(self):
        super().__post_init__()
        if self.lengths:
            check_ranges(self, lengths=(8, 2**20))
        check_ranges(self, stride=(1, 2**20), draws=(3, 1000), max_tokens=(100, 2**50), bucket=(1, 2**20))
        check_ranges(self, blocks=(2, 2**20))
        if self.documents and self.stride:
            raise UserError(
                f"stride={self.stride} has no effect with --documents, where the longest window contains a whole piece "
                f"and shorter windows move by half their length: leave out one of the two."
            )
        if self.documents and (unfit := [name for name in self.markers if name in ("stored", "none_wide")]):
            raise UserError(
                f"markers={unfit[0]} cannot be combined with --documents, whose pieces get new markers and have the "
                f"same content in all conditions: use trained, uniform, periodic or none."
            )


def main(cfg: PerplexityEval) -> None:
    """Runs the evaluation: writes a JSON line for each draw, and prints a line for each condition."""
    run, facts = cfg.open()
    rule, folder = run.state["data"], Path(cfg.dataset or run.state["data"]["dataset"])
    conditions = cfg.markers or (("trained", "none") if rule["chunk_markers"] else ("none",))
    check_markers(run, conditions)
    if "draws" in cfg.typed and not any(injection_of(run, markers) == "uniform" for markers in conditions):
        raise UserError(
            f"--draws has no effect on {run.folder} with --markers {' '.join(conditions)}, because no marker is placed "
            f"at random: leave it out."
        )
    lengths = cfg.lengths or (run.config.model.block_size,)
    if cfg.stride and cfg.stride > min(lengths):
        raise UserError(
            f"stride={cfg.stride} would skip text between windows of {min(lengths)} positions: use a stride of at most "
            f"{min(lengths)}."
        )
    stored = read_split(run, folder, cfg.max_tokens)
    content, owners = strip(stored, run.tokenizer.meta), None
    if cfg.documents:
        content, owners = long_pieces(run, content, max(lengths), folder)
        trained = window(rule, "none", run.config.model.original_block_size, 1)[0]
        facts |= {"documents": len(np.unique(owners)), "pieces": len(owners), "original_content": trained}
    else:
        check_text(content, stored, conditions, max(lengths), folder)
    facts |= {"dataset": str(folder), "split": "val", "content_sha256": content_sha256(run, content),
             "target_rule": run.config.target_rule}  # fmt: skip
    heading = f", {len(content) - (1 if owners is None else len(owners)):,} content tokens of {folder}"
    if cfg.documents:
        heading += f", {facts['pieces']} pieces of {facts['documents']} documents"

    def measured() -> Iterator[dict | str]:
        for length, markers in itertools.product(lengths, conditions):
            whole = cfg.documents and length == max(lengths)  # one window contains a whole piece
            stride = cfg.stride or (length if whole else max(1, length // 2))
            size, step = window(rule, markers, length, stride)
            piece, cells = window(rule, markers, max(lengths), 1)[0], []
            for draw, (injection, tokens) in enumerate(streams(run, stored, content, markers, cfg.draws)):
                texts = [tokens] if owners is None else np.split(tokens, range(piece, len(tokens), piece))
                label = f"{length} positions, markers {markers}, draw {draw + 1}"
                with progress(label, sum(map(len, texts))) as advance:
                    figures = measure_perplexity(run, texts, size, step, cfg.bucket, owners, advance, cfg.blocks)
                cell = {"markers": markers, "injection": injection, "draw": draw, "length": length}
                cells.append({"eval": "perplexity", **cell, **figures})
                yield cells[-1]
            yield sentence(cells)
        yield f"The same {len(content):,} content tokens are read in every condition, and markers are never scored.\n"
        yield from (f"  {markers:<9}  {MEANING[markers]}\n" for markers in conditions)

    cfg.record(run, facts, "perplexity", measured(), heading)


def check_text(content: np.ndarray, stored: np.ndarray, conditions: tuple, longest: int, folder: Path) -> None:
    """Raises UserError if the stream is not longer than the longest window, or lacks the stored markers asked for."""
    if "stored" in conditions and len(content) == len(stored):
        raise UserError(
            f"markers=stored needs a dataset with markers, and {folder} has no markers: use --markers none or another "
            f"--dataset."
        )
    if len(content) <= longest:
        raise UserError(
            f"a window of {longest} positions is longer than the {len(content):,} content tokens that are read from "
            f"{folder}: use shorter --lengths or more text."
        )


def long_pieces(run: Run, content: np.ndarray, longest: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the documents of a content stream into pieces of K tokens, which fill a window of `longest` positions.

    Returns the concatenated pieces (P * K,), and the number of each piece's document (P,). Raises UserError if no
    document is long enough, or `longest` is not a whole number of the run's chunks."""
    C, M = run.state["data"]["chunk_content"], run.state["data"]["chunk_markers"]
    if M and longest % (C + M):
        raise UserError(
            f"lengths={longest} is not a whole number of the run's chunks of {C + M} positions, of which the pieces of "
            f"documents consist: use {nearest_multiples(longest, C + M)} as the longest length."
        )
    size = longest // (C + M) * C if M else longest
    found, owners, most = pieces(content, run.tokenizer.eot, size)
    if not len(found):
        raise UserError(
            f"no document that is read from {folder} has the {size:,} tokens that fill a window of {longest} "
            f"positions, the longest has {most:,}: read more text (--max_tokens), use shorter --lengths, or prepare "
            f"other text with --min_document_tokens={size}."
        )
    return found.reshape(-1), owners


def injection_of(run: Run, markers: str) -> str:
    """Returns the rule that places the markers of a condition: uniform, periodic, none or stored."""
    return {"trained": run.state["data"]["injection"], "none_wide": "none"}.get(markers, markers)


def streams(run: Run, stored: np.ndarray, content: np.ndarray, markers: str, draws: int) -> Iterator[tuple]:
    """Yields the streams of a condition, one for each draw: the injection rule and the tokens (N,).

    All streams have the same content."""
    rule, injection = run.state["data"], injection_of(run, markers)
    if injection == "stored":
        yield injection, stored
    elif injection == "none":
        yield injection, content
    else:
        for draw in range(draws if injection == "uniform" else 1):  # periodic markers are not random
            how = injection, rule["chunk_content"], rule["chunk_markers"], stable_key("perplexity", draw)
            yield injection, marked(content, *how, run.tokenizer.meta)


def marked(content: np.ndarray, injection: str, C: int, M: int, key: int, meta: int) -> np.ndarray:
    """Returns the stream of content (N,) with markers placed as in data preparation, up to the last content token."""
    n = -(-len(content) // C)
    chunks = np.zeros((n, C), dtype=content.dtype)  # zeros fill up the last chunk
    chunks.reshape(-1)[: len(content)] = content
    tokens = inject(chunks, marker_places(injection, 0, n, C, M, key), meta).reshape(-1)
    return tokens[: place_of(tokens, meta, len(content) - 1) + 1]


def window(rule: dict, markers: str, length: int, stride: int) -> tuple[int, int]:
    """Returns the positions of a window under a condition, and its stride."""
    if markers != "none":
        return length, stride
    share = rule["chunk_content"] / (rule["chunk_content"] + rule["chunk_markers"])
    return round(length * share), max(1, round(stride * share))


def windows(tokens: np.ndarray, length: int, stride: int, rule: str, meta: int, size: int) -> Iterator[tuple]:
    """Yields the windows of a stream (N,), `size` at a time: their numbers (B,), layouts, and targets (B, length).

    Window w starts at position w * stride. Its targets are those of the whole stream under the run's target rule, at
    the positions that no earlier window contains. The last window is padded with id 0 after all scored positions."""
    stream = layout_of(tokens, meta, width=len(tokens) + length)
    targets = targets_of(stream, rule)
    last = int(np.flatnonzero(targets != IGNORE)[-1])
    n = 1 + max(0, -(-(last + 1 - length) // stride))
    for first in range(0, n, size):
        numbers = np.arange(first, min(first + size, n))
        at = numbers[:, None] * stride + np.arange(length)  # (B, length)
        layouts = [stream.cut(number * stride, length) for number in numbers.tolist()]
        scored_before = (numbers[:, None] > 0) & (np.arange(length) < length - stride)
        yield numbers, layouts, np.where(scored_before, IGNORE, targets[at])


def measure_perplexity(
    run: Run,
    texts: list[np.ndarray],
    length: int,
    stride: int,
    bucket: int,
    owners: np.ndarray | None = None,
    advance: Callable[[int], None] = lambda positions: None,
    blocks: int = 32,
) -> dict:
    """Returns the figures of texts, (N,) each, that are read separately in windows of `length` positions.

    stride: positions from the start of one window to the next.
    owners (len(texts),): the number of each text's document, if the texts are pieces of documents; adds loss by depth.
    advance: called with the number of newly read positions after each batch, to show progress.
    blocks: number of blocks of consecutive windows that are the unit of intervals, if the texts are no documents."""
    cell = {"window": length, "stride": stride}
    if why := fits(run, length):
        return {**cell, "tokens": 0, "impossible": why}
    started, device, meta = time.perf_counter(), run.model.wte.weight.device, run.tokenizer.meta
    draw = draw_of(run.config, "val")
    tally = Tally(torch.from_numpy(run.tokenizer.token_bytes), device)
    by_depth = None if owners is None else ByDepth(owners, int((texts[0] != meta).sum()), bucket)
    size, buckets, context, before = max(1, POSITIONS // length), -(-length // bucket), 0, 0
    nats_at, n_at = np.zeros(buckets), np.zeros(buckets, dtype=np.int64)
    at_position, at_distance, documents = BlockSums(buckets), BlockSums(1 + len(DISTANCES)), []
    for number, text in enumerate(texts):
        content = (text != meta).cumsum() - 1  # index of each token among the content tokens of the text
        n_read = 0
        for numbers, layouts, targets in windows(text, length, stride, run.config.target_rule, meta, size):
            batch = batch_of(layouts, targets, connected_positions(layouts, meta, before + numbers, draw))
            scores = score_batch(run.model, batch.to(device))
            tally.add(scores.nats, scores.targets)
            nats = scores.nats[scores.targets >= 0].cpu().double().numpy()
            row, at = np.nonzero(targets != IGNORE)  # in the same order as nats
            nats_at += np.bincount(at // bucket, weights=nats, minlength=buckets)
            n_at += np.bincount(at // bucket, minlength=buckets)
            at_position.add(row, at // bucket, nats, len(numbers))
            at_distance.add(row, distance_bins((batch.tokens == meta).numpy())[row, at], nats, len(numbers))
            documents += [0 if owners is None else owners[number]] * len(numbers)
            seen = (batch.tokens != meta).cumsum(dim=1)  # (B, T) number of content tokens up to each position
            context += int(seen[row, at].sum())
            if by_depth:
                by_depth.add(number, content[numbers[row] * stride + at], nats)
            end = min(len(text), int(numbers[-1]) * stride + length)
            advance(end - n_read)
            n_read = end
        before += 1 + int(numbers[-1])
    owner = None if owners is None else np.array(documents)
    sums = {"distance": at_distance.blocks(blocks, owner), "position": at_position.blocks(blocks, owner)}
    check_finite(run, nats_at)
    figures = tally.figures()
    if figures["loss"] > LARGEST_LOSS:
        raise UserError(
            f"the loss of {run.folder} is {figures['loss']:.4g} nats per token, too large for a "
            f"perplexity: use another checkpoint."
        )
    # for each bucket of the predicting token's position in its window: first position, targets, nats per target
    each = enumerate(zip(n_at.tolist(), nats_at.tolist(), strict=True))
    by_position = [[i * bucket, n, total / n] for i, (n, total) in each if n]
    by_distance = zip([*DISTANCES, None], intervals(*sums["distance"]), strict=True)
    return {
        **cell, **figures, "perplexity": math.exp(figures["loss"]), "context": context / figures["tokens"],
        "bucket": bucket, "by_position": by_position,
        "by_position_interval": [ends for n, _, *ends in intervals(*sums["position"]) if n],
        # for each bin of distances since the last marker: first distance, targets, nats per target, interval
        "by_distance": [[first, *of] for first, of in by_distance if of[0]],
        **{f"block_{name}": {"nats": nats.round(4).tolist(), "tokens": n.tolist()}
           for name, (nats, n) in sums.items()},
        **(by_depth.figures() if by_depth else {}),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def sentence(cells: list[dict]) -> str:
    """Returns the printed line of a condition, over all its draws."""
    first = cells[0]
    name = f"{first['length']:>6}  {first['markers']:<9}"
    if "impossible" in first:
        return f"{name}  impossible: {first['impossible']}\n"
    losses = np.array([cell["loss"] for cell in cells])
    spread = ""
    if len(cells) > 1:
        spread = f" ({losses.min():.4f} .. {losses.max():.4f}, sd {losses.std(ddof=1):.4f}, {len(cells)} draws)"
    bits, context = (np.mean([cell[key] for cell in cells]) for key in ("bits_per_byte", "context"))
    return (
        f"{name}  loss {losses.mean():.4f}{spread}  perplexity {math.exp(losses.mean()):.2f}  bits per byte {bits:.4f}"
        f"  windows of {first['window']}, {first['stride']} apart, {context:.0f} content tokens of context  "
        f"{sum(cell['seconds'] for cell in cells):.1f} s\n"
    )
