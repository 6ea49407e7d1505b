"""Computes the positions and targets of texts, and builds the batches that the model reads."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.config import TrainConfig
from nanometa.config.marker_settings import Hides
from nanometa.data.inject import marker_places

IGNORE = -100  # the target of a position that is not scored
FOREVER = 2**31 - 1  # the value of read_until for a position that all later ones may read


class Layout(NamedTuple):
    """A text as the model reads it: one entry per position, arrays (T,) of int64.

    Position q may read position k if reads_from[q] <= k <= q <= read_until[k]. Places count the positions of the text,
    markers included."""

    tokens: np.ndarray  # ids, markers included
    content: np.ndarray  # index among the content tokens of its text or stream, -1 for a marker or a pad
    positions: np.ndarray  # positions for the positional encoding
    reads_from: np.ndarray  # the first place that this one may read; 0 = all earlier ones
    read_until: np.ndarray  # the last place that may read this one; FOREVER = all later ones

    def cut(self, first: int, width: int) -> "Layout":
        """Returns the layout of the places first .. first + width - 1, read as a text of their own.

        What came before cannot be read, and positions start at 0."""
        part = Layout(*(column[first : first + width] for column in self))
        until = np.where(part.read_until == FOREVER, FOREVER, part.read_until - first)
        positions = part.positions - (part.positions[0] if len(part.positions) else 0)
        return Layout(part.tokens, part.content, positions, np.maximum(part.reads_from - first, 0), until)


class Batch(NamedTuple):
    """Stacked layouts and their targets. The model takes all positions from here and never searches for marker ids."""

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, IGNORE where nothing is scored
    positions: torch.Tensor  # (B, T) int64, positions for the positional encoding
    meta_index: torch.Tensor  # (B, M) int64, positions that the second attention connects, increasing, then pads (= T)
    scored_index: torch.Tensor  # (B, S) int64, positions that are scored, increasing, then pads (= T)
    reads_from: torch.Tensor | None = None  # (B, T) int64, as in a Layout; None if every position reads from place 0
    read_until: torch.Tensor | None = None  # (B, T) int64, as in a Layout; None if every position is read for ever

    @property
    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        """The arguments of the model: tokens, positions, meta_index, reads_from and read_until."""
        return self.tokens, self.positions, self.meta_index, self.reads_from, self.read_until

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on another device. The copy to a GPU is asynchronous."""
        return Batch(*(None if tensor is None else to_device(tensor, device) for tensor in self))


NOTHING = Hides(before=False, after=False)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor of the CPU on another device. The copy to a GPU is asynchronous, so the CPU does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def layout_of(tokens: np.ndarray, marker: int, first: int = 0, width: int | None = None, pad: int = 0) -> Layout:
    """Returns the layout of tokens (N,) that already contain their markers.

    first: index of the first content token. The layout is padded with the id `pad` to `width` positions; None = no
    padding."""
    T = len(tokens) if width is None else width
    padded, content = np.full(T, pad, dtype=np.int64), np.full(T, -1)
    padded[: len(tokens)] = tokens
    is_content = tokens != marker
    content[: len(tokens)][is_content] = np.arange(first, first + np.count_nonzero(is_content))
    return Layout(padded, content, np.arange(T), np.zeros(T, dtype=np.int64), np.full(T, FOREVER))


def padded(layout: Layout, width: int, pad: int) -> Layout:
    """Returns a layout with `width` positions, of which the last ones hold the id `pad` and are no content.

    Raises UserError if it is longer."""
    T = len(layout.tokens)
    if T > width:
        raise UserError(
            f"a text with its markers has {T} positions, more than the {width} of a window: use a larger block_size, "
            f"or fewer markers."
        )
    rest = width - T
    after = np.arange(rest) + (int(layout.positions[-1]) + 1 if T else 0)
    values = (np.full(rest, pad), np.full(rest, -1), after, np.zeros(rest, dtype=np.int64), np.full(rest, FOREVER))
    return Layout(*(np.append(column, value) for column, value in zip(layout, values, strict=True)))


def targets_of(layout: Layout, rule: str, counted: np.ndarray | None = None) -> np.ndarray:
    """Returns the id that each position must predict (T,), and IGNORE for positions that are not scored.

    Under the rule `ignore`, every position predicts the next one, except where the next one is a marker. Under `skip`,
    a content token predicts the next content token, past any markers, and a marker predicts nothing. Content token 0 is
    never a target, because no content precedes it. counted: tokens (T,) bool that may be targets; None = all.
    Raises ValueError for another rule."""
    if rule == "ignore":
        goals = np.arange(1, len(layout.tokens))
        sources = goals - 1
    elif rule == "skip":
        places = np.flatnonzero(layout.content >= 0)
        sources, goals = places[:-1], places[1:]
    else:
        raise ValueError(f"unknown target rule {rule!r}")
    scored = layout.content[goals] > 0
    if counted is not None:
        scored &= counted[goals]
    targets = np.full(len(layout.tokens), IGNORE)
    targets[sources[scored]] = layout.tokens[goals[scored]]
    return targets


def random_positions(windows: np.ndarray, T: int, fraction: float, seed: int, split: str) -> np.ndarray:
    """Draws the positions that second_attention=random connects in each of the windows (B,) of a split.

    Returns (B, R), increasing in each row, with R = round(fraction T), but at least 1. Each row is drawn without
    replacement, like the markers of a chunk, and depends only on (seed, split, window, T, R)."""
    R, key = max(1, round(fraction * T)), stable_key(seed, "random positions", split)
    draws = [np.flatnonzero(marker_places("uniform", int(window), 1, T - R, R, key)) for window in windows]
    return np.array(draws, dtype=np.int64).reshape(len(windows), R)


class Draw(NamedTuple):
    """The last arguments of random_positions: how second_attention=random draws the positions of a split."""

    fraction: float
    seed: int
    split: str


def draw_of(cfg: TrainConfig, split: str) -> Draw | None:
    """Returns the Draw of a run with second_attention=random, and None for other runs, which connect the markers."""
    m = cfg.model
    return Draw(m.random_fraction, cfg.seed, split) if m.second.connects == "random" else None


def connected_positions(
    layouts: Sequence[Layout],
    marker: int | None,
    numbers: np.ndarray,
    draw: Draw | None,
    multiple: int = 1,
    width: int | None = None,
) -> np.ndarray:
    """Returns the positions that the second attention connects, in the form of Batch.meta_index (B, M).

    draw None: the positions of the marker that closes segments, if there is one, with M = width or, by default, as
    many as there are, rounded up to a multiple of `multiple`. Otherwise the randomly drawn positions of the texts with
    these `numbers` (B,)."""
    if draw:
        return random_positions(numbers, len(layouts[0].tokens), *draw)
    if marker is None:
        return np.empty((len(layouts), 0), dtype=np.int64)
    return places_of(np.stack([layout.tokens for layout in layouts]) == marker, width, multiple)


def places_of(there: np.ndarray, width: int | None = None, multiple: int = 1) -> np.ndarray:
    """Returns the positions where `there` (B, T) is true: (B, width), increasing in each row, then pads (= T).

    width None: as many as the fullest row needs, rounded up to a multiple of `multiple`, but at most T.
    Raises ValueError if a row has more than `width`."""
    T, counts = there.shape[1], there.sum(axis=1)
    most = int(counts.max(initial=0))
    if width is None:
        width = min(T, -(-most // multiple) * multiple)
    if most > width:
        raise ValueError(f"a row has {most} positions, more than the {width} that the index can hold")
    order = np.argsort(~there, axis=1, kind="stable")[:, :width]
    return np.where(np.arange(width) < counts[:, None], order, T)


def batch_of(
    layouts: Sequence[Layout],
    targets: Sequence[np.ndarray],
    meta_index: np.ndarray,
    scored_width: int | None = None,
    multiple: int = 1,
    hides: Hides = NOTHING,
) -> Batch:
    """Builds a Batch on the CPU from layouts of one length, their targets (T,) each and meta_index (B, M).

    scored_width, multiple: width of scored_index, as in places_of. hides: the columns that the layouts of this run can
    restrict; the others are left out, so that attention takes its fast path."""
    targets = np.stack(targets)
    scored_index = places_of(targets != IGNORE, scored_width, multiple)

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(layout, name) for layout in layouts]))

    return Batch(
        stacked("tokens"), torch.from_numpy(targets), stacked("positions"), torch.from_numpy(meta_index),
        torch.from_numpy(scored_index), stacked("reads_from") if hides.before else None,
        stacked("read_until") if hides.after else None,
    )  # fmt: skip
