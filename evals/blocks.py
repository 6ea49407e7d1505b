"""Sums the loss of scored tokens by distance since the last marker and by position in the window, in blocks of windows.

Blocks are the unit of intervals. Two runs that read the same windows have the same tokens in every block and bin, so
their difference can be computed from the sums of their lines (reports/distance.py)."""

import math

import numpy as np

from nanometa.common.statistics import clustered_ratio

# The first distance of each bin: predictions at a marker, 1, 2, 3 to 4, 5 to 8, 9 to 16, 17 to 32, and 33 or more
# positions after the last one. One more bin holds the predictions before the first marker of the window.
DISTANCES = (0, 1, 2, 3, 5, 9, 17, 33)


def distance_bins(is_marker: np.ndarray) -> np.ndarray:
    """Returns the bin (B, T) of each position by its distance from the last marker of its window at or before it.

    is_marker (B, T): the markers of the windows. The bin is len(DISTANCES) where no marker precedes in the window."""
    here = np.arange(is_marker.shape[1])
    last = np.maximum.accumulate(np.where(is_marker, here, -1), axis=1)
    bins = np.searchsorted(DISTANCES, here - last, side="right") - 1
    return np.where(last < 0, len(DISTANCES), bins)


class BlockSums:
    """Sums of nats and of scored tokens by window and bin."""

    def __init__(self, bins: int):
        self.bins, self.nats, self.tokens = bins, [], []

    def add(self, rows: np.ndarray, bins: np.ndarray, nats: np.ndarray, n: int) -> None:
        """Adds the scored tokens (S,) of n windows: their window in 0 .. n - 1, their bin and their nats."""
        cells, size = rows * self.bins + bins, n * self.bins
        self.nats.append(np.bincount(cells, nats, minlength=size).reshape(n, self.bins))
        self.tokens.append(np.bincount(cells, minlength=size).reshape(n, self.bins))

    def blocks(self, most: int, owners: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sums of nats and of tokens, (G, bins) each.

        A block consists of consecutive windows, and there are at most `most`, of nearly equal size. With owners
        (windows,), the document of each window, each block is a document instead."""
        nats, tokens = np.concatenate(self.nats), np.concatenate(self.tokens)
        G = min(most, len(nats))
        block = np.arange(len(nats)) * G // len(nats) if owners is None else np.unique(owners, return_inverse=True)[1]
        sums = [np.zeros((block.max() + 1, self.bins), dtype=of.dtype) for of in (nats, tokens)]
        for total, of in zip(sums, (nats, tokens), strict=True):
            np.add.at(total, block, of)
        return sums[0], sums[1]


def intervals(nats: np.ndarray, tokens: np.ndarray) -> list[list]:
    """Returns for each bin its tokens, their nats per token, and the ends of the 95 % interval over blocks, from sums
    (G, bins). The mean is None without tokens, and the ends are None with fewer than two blocks that have some."""
    out = []
    for part, count in zip(nats.T, tokens.T, strict=True):
        there = count > 0
        ends = clustered_ratio(part[there], count[there]) if there.any() else (math.inf, math.inf)
        mean = float(part.sum() / count.sum()) if there.any() else None
        out.append([int(count.sum()), mean, *(end if math.isfinite(end) else None for end in ends)])
    return out
