"""Reads batches of windows from a prepared split, in an order that depends only on the seed and the step."""

from pathlib import Path

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import permute, stable_key
from nanometa.config import TrainConfig
from nanometa.config.checks import nearest_multiples
from nanometa.data.layout import Batch, Draw, Layout, batch_of, connected_positions, layout_of, targets_of
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
    """The windows of one split. Window i is the positions [i T, (i + 1) T) of the stream, with T = block_size.

    Under both target rules, every content token of the stream is scored exactly once per epoch, except the first one,
    which no content precedes. draw: how second_attention=random draws its positions; None: the second
    attention connects the markers.

    Raises UserError if the dataset is missing or damaged, if block_size is not a multiple of the chunk size, or if the
    split is shorter than one window."""

    def __init__(self, folder: str | Path, split: str, block_size: int, target_rule: str, draw: Draw | None = None):
        self.split, self.draw = split, draw
        self.manifest = read_manifest(Path(folder))
        self.tokenizer = Tokenizer.load(Path(folder))
        if self.tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise UserError(f"the tokenizer in {folder} is not the one of its manifest: prepare the dataset again.")
        chunk = self.manifest["chunk_content"] + self.manifest["chunk_markers"]
        if block_size % chunk:
            raise UserError(
                f"block_size={block_size} is not a whole number of the {chunk}-position chunks of {folder}: "
                f"use --block_size={nearest_multiples(block_size, chunk)}."
            )
        self.stream = TokenStream(Path(folder), self.manifest["splits"][split]["shards"], self.tokenizer.n_vocab)
        self.T, self.rule = block_size, target_rule
        # under "skip", the last target may come after all markers of the next chunk
        self.lookahead = 1 + self.manifest["chunk_markers"]
        self.content_per_window = block_size // chunk * self.manifest["chunk_content"]
        self.n_windows = len(self.stream) // block_size
        if self.n_windows == 0:
            raise UserError(
                f"the {split} split of {folder} has {len(self.stream):,} positions, fewer than one window of "
                f"block_size={block_size}: prepare more text, or raise --val_fraction if it is the val split."
            )

    def counted(self, n: int) -> dict[str, int]:
        """Returns the numbers of content tokens and positions in the first n windows of training."""
        return {"content_tokens": n * self.content_per_window, "positions": n * self.T}

    def sample(self, n: int) -> np.ndarray:
        """Returns n windows, evenly spread over the split."""
        return np.arange(n) * self.n_windows // n

    def batch(self, windows: np.ndarray) -> Batch:
        """Builds the Batch of the given windows (B,), on the CPU."""
        T, meta, layouts, targets = self.T, self.tokenizer.meta, [], []
        for window in windows.tolist():
            ids = self.stream.read(window * T, (window + 1) * T + self.lookahead)
            layout = layout_of(ids, meta, first=window * self.content_per_window)
            layouts.append(Layout(*(column[:T] for column in layout)))
            targets.append(targets_of(layout, self.rule)[:T])
        meta_index = connected_positions(layouts, meta, windows, self.draw)
        # at most its own content, and one more token if this window starts with a marker and the next with content
        return batch_of(layouts, targets, meta_index, scored_width=min(T, self.content_per_window + 1))
