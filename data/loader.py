"""Windows of a prepared split as batches, in an order that is a pure function of (seed, sample index)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import permute, stable_key
from nanometa.config import TrainConfig
from nanometa.config.checks import nearest_multiples
from nanometa.data.inject import marker_places
from nanometa.data.shards import TokenStream, read_manifest
from nanometa.data.tokenizer import Tokenizer

IGNORE = -100  # the target of a position that is not scored


class Batch(NamedTuple):
    """Everything positional is explicit: the model never searches for ids."""

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, IGNORE where nothing is scored
    positions: torch.Tensor  # (B, T) int64, index in the window
    # (B, M) int64, positions that take part in the second attention, increasing; pads are T and come last: those of
    # the meta-tokens, or for second_attention=random those drawn
    meta_index: torch.Tensor
    meta_count: torch.Tensor  # (B,) int64, how many these are in each row
    scored_index: torch.Tensor  # (B, S) int64, positions that are scored, increasing; pads are T and come last

    def to(self, device: torch.device) -> "Batch":
        if device.type != "cuda":
            return Batch(*(tensor.to(device) for tensor in self))
        return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))


def window_order(step: int, batch_size: int, n_windows: int | None, seed: int) -> np.ndarray:
    """The windows of a step (batch_size,), over all processes: a permutation of all windows each epoch; of a source
    that has no end (None), which draws each window anyway, just the next ones."""
    sample = np.arange(step * batch_size, (step + 1) * batch_size)
    if n_windows is None:
        return sample
    windows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(sample // n_windows):
        here = sample // n_windows == epoch
        windows[here] = permute(sample[here] % n_windows, n_windows, stable_key(seed, "window order", int(epoch)))
    return windows


def step_windows(step: int, cfg: TrainConfig, n_windows: int | None, rank: int, world: int) -> np.ndarray:
    """The windows of a step in process `rank` of `world`: (micro-batches, micro_batch_size), in order."""
    share = cfg.batch_size // world
    order = window_order(step, cfg.batch_size, n_windows, cfg.seed)
    return order[rank * share : (rank + 1) * share].reshape(-1, cfg.micro_batch_size)


def targets_of(tokens: np.ndarray, T: int, meta: int, rule: str) -> np.ndarray:
    """tokens (T + lookahead,), the window and what follows it -> targets (T,).

    ignore: the next token, unless it is a marker. skip: at a content token the next content token past any
    markers; at a marker nothing. IGNORE where nothing is scored, also where the stream ends."""
    following = np.full(T, IGNORE, dtype=np.int64)
    if rule == "ignore":
        nxt = tokens[1 : T + 1]
        following[: len(nxt)] = np.where(nxt == meta, IGNORE, nxt)
    elif rule == "skip":
        places = np.arange(len(tokens))
        content = tokens != meta
        next_content = np.minimum.accumulate(np.where(content, places, len(tokens))[::-1])[::-1]
        nxt = next_content[1 : T + 1]
        inside = nxt < len(tokens)
        following[: len(nxt)][inside] = tokens[nxt[inside]]
        following[~content[:T]] = IGNORE
    else:
        raise ValueError(f"unknown target rule {rule!r}")
    return following


def random_positions(windows: np.ndarray, T: int, fraction: float, seed: int, split: str) -> np.ndarray:
    """windows (B,) of a split -> (B, R) increasing, the positions of each window that second_attention=random connects.

    R = round(fraction T), at least 1, drawn without replacement as the markers of a chunk are. The draw of a window
    depends on (seed, split, window, T, R) alone."""
    R, key = max(1, round(fraction * T)), stable_key(seed, "random positions", split)
    draws = [np.flatnonzero(marker_places("uniform", int(window), 1, T - R, R, key)) for window in windows]
    return np.array(draws, dtype=np.int64).reshape(len(windows), R)


def places_of(there: np.ndarray, width: int) -> np.ndarray:
    """there (B, T) bool, at most `width` a row, else ValueError -> (B, width) their positions, increasing, padded with
    T."""
    if there.sum(axis=1).max(initial=0) > width:
        raise ValueError(f"a row has more than {width} positions: it would lose some")
    order = np.argsort(~there, axis=1, kind="stable")[:, :width]
    return np.where(np.arange(width) < there.sum(axis=1)[:, None], order, there.shape[1])


class Windows:
    """The windows of one split: window i is positions [i T, (i + 1) T) of the stream, T = block_size, a whole
    number of chunks. Under both target rules every content token of the stream is scored exactly once per epoch,
    but for the first, before which there may be nothing.
    random_fraction, seed: for second_attention=random, what random_positions takes; None = the markers are connected.

    Raises UserError for a missing or damaged dataset, a block_size that is not whole chunks, a split shorter
    than one window."""

    def __init__(
        self,
        folder: str | Path,
        split: str,
        block_size: int,
        target_rule: str,
        random_fraction: float | None = None,
        seed: int = 1337,
    ):
        self.split, self.random_fraction, self.seed = split, random_fraction, seed
        self.manifest = read_manifest(Path(folder))
        self.tokenizer = Tokenizer.load(Path(folder))
        if self.tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise UserError(f"the tokenizer in {folder} is not the one of its manifest: prepare the dataset again.")
        chunk = self.manifest["chunk_content"] + self.manifest["chunk_markers"]
        if block_size % chunk:
            raise UserError(
                f"block_size={block_size} is not a whole number of the {chunk}-position chunks of {folder}: "
                f"take --block_size={nearest_multiples(block_size, chunk)}."
            )
        self.stream = TokenStream(Path(folder), self.manifest["splits"][split]["shards"], self.tokenizer.n_vocab)
        self.T, self.rule = block_size, target_rule
        # under "skip" the last target may lie behind all markers of the next chunk
        self.lookahead = 1 + self.manifest["chunk_markers"]
        self.content_per_window = block_size // chunk * self.manifest["chunk_content"]
        self.n_windows = len(self.stream) // block_size
        if self.n_windows == 0:
            raise UserError(
                f"the {split} split of {folder} has {len(self.stream):,} positions, fewer than one window of "
                f"block_size={block_size}: prepare more text, or raise --val_fraction if validation is too short."
            )

    def counted(self, n: int) -> dict[str, int]:
        """What the first n windows of training hold."""
        return {"content_tokens": n * self.content_per_window, "positions": n * self.T}

    def batch(self, windows: np.ndarray) -> Batch:
        """The given windows (B,) as a Batch on the CPU."""
        T, meta = self.T, self.tokenizer.meta
        tokens = np.empty((len(windows), T), dtype=np.int64)
        targets = np.empty((len(windows), T), dtype=np.int64)
        for row, window in enumerate(windows):
            ids = self.stream.read(int(window) * T, (int(window) + 1) * T + self.lookahead)
            tokens[row], targets[row] = ids[:T], targets_of(ids, T, meta, self.rule)
            if window == 0:  # the stream's first content token is scored in no arm: only markers can precede it
                targets[row, : int(np.argmax(ids != meta))] = IGNORE
        if self.random_fraction is None:
            count = (tokens == meta).sum(axis=1)
            meta_index = places_of(tokens == meta, int(count.max(initial=0)))
        else:
            meta_index = random_positions(windows, T, self.random_fraction, self.seed, self.split)
            count = np.full(len(windows), meta_index.shape[1])
        # a window's content, and one more where the first token of the next is content and its own first is none
        scored_index = places_of(targets != IGNORE, min(T, self.content_per_window + 1))
        positions = np.broadcast_to(np.arange(T), tokens.shape).copy()
        return Batch(*map(torch.from_numpy, (tokens, targets, positions, meta_index, count, scored_index)))
