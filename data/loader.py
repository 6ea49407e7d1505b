"""Reads batches of windows from a prepared split, in an order that depends only on the seed and the step."""

from pathlib import Path

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import permute, stable_key
from nanometa.config import TrainConfig
from nanometa.config.checks import nearest_multiples
from nanometa.data.layout import IGNORE, Batch, Draw, batch_of, connected_positions, padded, targets_of
from nanometa.data.markers import STORED, MarkerScheme, Placing
from nanometa.data.shards import TokenStream, read_manifest
from nanometa.data.tokenizer import Tokenizer


def window_order(step: int, batch_size: int, n_windows: int | None, seed: int) -> np.ndarray:
    """Returns the windows of a step (batch_size,), for all processes together.

    Every epoch is another permutation of all windows. n_windows None: the source is endless and its windows are random
    anyway, so they are taken in order."""
    sample = np.arange(step * batch_size, (step + 1) * batch_size)
    if n_windows is None:
        return sample
    windows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(sample // n_windows):
        here = sample // n_windows == epoch
        windows[here] = permute(sample[here] % n_windows, n_windows, stable_key(seed, "window order", int(epoch)))
    return windows


def step_windows(step: int, cfg: TrainConfig, n_windows: int | None, rank: int, world: int) -> np.ndarray:
    """Returns the windows of a step for process `rank` of `world`: (micro-batches, micro_batch_size), in order."""
    share = cfg.batch_size // world
    order = window_order(step, cfg.batch_size, n_windows, cfg.seed)
    return order[rank * share : (rank + 1) * share].reshape(-1, cfg.micro_batch_size)


class Windows:
    """The windows of one split. Every window has the same number of content tokens, and is read alone.

    With the markers of the dataset, window i is the positions [i T, (i + 1) T) of the stream, with T = block_size.
    A scheme that places markers itself needs a dataset without any: window i is then the content [i C, (i + 1) C),
    where C is the largest multiple of the dataset's chunks within block_size, and the rest of block_size has room for
    markers. Under both target rules, every content token of the stream is scored exactly once per epoch, except the
    first one, which no content precedes.

    Raises UserError if the dataset is missing or damaged, if it does not fit block_size or the scheme, or if the split
    is shorter than one window."""

    def __init__(
        self,
        folder: str | Path,
        split: str,
        block_size: int,
        target_rule: str,
        draw: Draw | None = None,
        placing: Placing = STORED,
    ):
        """draw: how second_attention=random draws its positions; None: the second attention connects the markers.
        placing: how markers are placed, and what can be read; by default they are those of the dataset."""
        self.split, self.T, self.rule, self.draw, self.hides = split, block_size, target_rule, draw, placing.cfg.hides
        self.manifest = read_manifest(Path(folder))
        self.tokenizer = Tokenizer.load(Path(folder))
        if self.tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise UserError(f"the tokenizer in {folder} is not the one of its manifest: prepare the dataset again.")
        C, M = self.manifest["chunk_content"], self.manifest["chunk_markers"]
        chunks, places = self.T // (C + M), placing.cfg.places_markers
        if self.T % (C + M) and not (places and chunks):
            raise UserError(
                f"block_size={self.T} is not a whole number of the {C + M}-position chunks of {folder}: "
                f"use --block_size={nearest_multiples(self.T, C + M)}."
            )
        self.content_per_window = chunks * C
        self.scheme = MarkerScheme(placing, self.tokenizer, chunks * C, chunks * M)
        self.most = None  # largest number of segments that a window closes
        if places and self.scheme.marks:
            self.most = (self.T - chunks * C) // len(self.scheme.marks)
            self.scheme.check_room(self.most, self.T)
        self.stream = TokenStream(Path(folder), self.manifest["splits"][split]["shards"], self.tokenizer.n_vocab)
        # positions of the stream in a window, and further ones that its last target may be in: under "skip", it may
        # come after all markers of the next chunk
        self.step, self.lookahead = (chunks * C, 1) if places else (self.T, 1 + M)
        self.n_windows = len(self.stream) // self.step
        if self.n_windows == 0:
            raise UserError(
                f"the {split} split of {folder} has {len(self.stream):,} positions, fewer than one window of "
                f"block_size={self.T}: prepare more text; for the val split, raise --val_fraction or give more "
                f"--val_files."
            )

    def counted(self, n: int) -> dict[str, int]:
        """Returns the numbers of content tokens and positions in the first n windows of training."""
        return {"content_tokens": n * self.content_per_window, "positions": n * self.T}

    def sample(self, n: int) -> np.ndarray:
        """Returns n windows, evenly spread over the split."""
        return np.arange(n) * self.n_windows // n

    def batch(self, windows: np.ndarray) -> Batch:
        """Builds the Batch of the given windows (B,), on the CPU."""
        layouts, targets = [], []
        for window in windows.tolist():
            ids = self.stream.read(window * self.step, (window + 1) * self.step + self.lookahead)
            first = window * self.content_per_window
            layout = self.scheme.lay_out(ids, first, most=self.most)
            after = np.flatnonzero(layout.content >= first + self.content_per_window)
            # only the last target lies behind the window
            T = int(after[0]) if len(after) and self.step < self.T else min(self.T, len(layout.tokens))
            goals = targets_of(layout, self.rule)[:T]
            layouts.append(padded(layout.cut(0, T), self.T, self.tokenizer.eot))
            targets.append(np.pad(goals, (0, self.T - len(goals)), constant_values=IGNORE))
        meta_index = connected_positions(layouts, self.scheme.closing, windows, self.draw, width=self.most)
        # at most its own content, and one more token if this window starts with a marker and the next with content
        width = min(self.T, self.content_per_window + 1)
        return batch_of(layouts, targets, meta_index, scored_width=width, hides=self.hides)
