"""A KV cache for texts whose positions may read only a part of what came before, and which forgets what nobody reads.

Every slot knows its place in the text and the last place that may read it. A slot is freed once that place has passed.
The cache grows when it needs slots, so its size follows what is kept, and not the length of the text.
"""

import itertools

import numpy as np
import torch

from nanometa.config import GPTConfig
from nanometa.data.markers import Row
from nanometa.inference.cache import Store

SPARE = 32  # slots that are added beyond those needed when a cache grows, or a sixteenth of them if that is more
WASTE = 128  # slots that may be free between used ones, or a quarter of all slots if that is less


class LimitedStore(Store):
    """A Store that obeys reads_from and read_until, and frees the slots that no later position may read."""

    def __init__(self, cfg: GPTConfig, B: int, dtype: torch.dtype, device: torch.device, window: int | None = None):
        super().__init__(cfg, B, 0, dtype, device, window)
        self.place_of = [np.empty(0, dtype=np.int64) for _ in range(B)]  # the place of each used slot
        self.position_of = [np.empty(0, dtype=np.int64) for _ in range(B)]  # its position
        self.until = [np.empty(0, dtype=np.int64) for _ in range(B)]  # the last place that may read it
        self.next_place = [0] * B  # number of places that each sequence has had

    def place_rows(
        self, rows: list[int], new: list[Row], forgotten: list[list[tuple[int, int]]], closing: list[int]
    ) -> None:
        """Assigns a slot to every token of a packed row, and plans the calls of `attend`, as `place` does.

        rows: the sequence that each token belongs to. new: its Row, whose place is the next one of its sequence.
        forgotten: for each sequence, pairs (place, read_until) of earlier places or of new ones.
        closing: the tokens that close a segment; with summary=mean, their keys and values are the means of a span."""
        B, n, self.calls, self.means = len(self.used), 0, [], []
        closing = set(closing if self.cfg.summary == "mean" else ())
        changed = [dict(pairs) for pairs in forgotten]
        counts = [rows.count(row) for row in range(B)]
        self.reserve(max(used + count for used, count in zip(self.used, counts, strict=True)))
        for row, pairs in enumerate(changed):
            for place, until in pairs.items():
                self.until[row][self.place_of[row] == place] = until
        S, slots, masks = self.room, [], []
        for row, group in itertools.groupby(zip(rows, new, strict=True), key=lambda pair: pair[0]):
            part = [one for _, one in group]
            places = np.arange(self.next_place[row], self.next_place[row] + len(part))
            until = [changed[row].get(place, one.read_until) for place, one in zip(places.tolist(), part, strict=True)]
            self.place_of[row] = np.append(self.place_of[row], places)
            self.position_of[row] = np.append(self.position_of[row], [one.position for one in part])
            self.until[row] = np.append(self.until[row], np.array(until, dtype=np.int64))
            used, self.used[row] = self.used[row], self.used[row] + len(part)
            self.next_place[row] += len(part)
            slots += range(row * S + used, row * S + self.used[row])
            reads_from = np.array([one.reads_from for one in part])[:, None]
            seen = (reads_from <= self.place_of[row]) & (self.place_of[row] <= places[:, None])
            reads_to = np.array([one.reads_to for one in part])[:, None]
            seen &= (self.place_of[row] <= reads_to) | (self.place_of[row] >= places[0])
            if self.window is not None:
                seen &= places[:, None] - self.place_of[row] < self.window
            masks.append(seen & (places[:, None] <= self.until[row]))
            for i in closing.intersection(range(n, n + len(part))):
                span = (new[i].reads_from <= self.place_of[row]) & (self.place_of[row] < places[i - n] - 1)
                self.means.append((row, used + i - n, torch.from_numpy(np.flatnonzero(span)).to(self.device)))
            self.calls.append((n, n + len(part), slice(row, row + 1), self.used[row], None))
            n += len(part)
        self.slots = torch.tensor(slots, device=self.device, dtype=torch.long)
        self._merge(masks)

    def write(self, layer: int, k, v) -> None:
        """Stores k and v (1, H, N, D) of the tokens given to `place_rows`, or the means of their spans."""
        super().write(layer, k, v)
        for row, slot, span in self.means:
            for cache in (self.k, self.v):
                cache[layer][row, slot] = cache[layer][row, span].mean(0)

    def _merge(self, masks: list[np.ndarray]) -> None:
        """Adds masks to the calls, and merges the first calls into one if they are one token of every sequence."""
        B = len(self.used)
        first = [(call[1] - call[0], call[2].start) for call in self.calls[:B]]
        if B > 1 and first == [(1, row) for row in range(B)]:
            keys = max(call[3] for call in self.calls[:B])
            seen = np.zeros((B, keys), dtype=bool)
            for row in range(B):
                seen[row, : masks[row].shape[1]] = masks[row][0]
            self.calls[:B] = [(0, B, slice(0, B), keys, self._additive(seen[:, None, None]))]
            masks = [None, *masks[B:]]
        for i, mask in enumerate(masks):
            if mask is not None:
                self.calls[i] = (*self.calls[i][:4], self._additive(mask[None, None]))

    def _additive(self, seen: np.ndarray) -> torch.Tensor | None:
        """Returns the mask of an attention call from the keys that are seen, or None if all are."""
        if seen.all():
            return None
        hidden = torch.from_numpy(~seen).to(self.device)
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill(hidden, -torch.inf)

    def reserve(self, slots: int) -> None:
        """Makes room for so many slots in every sequence, one layer at a time, so that only one exists twice."""
        have = self.room
        if slots <= have:
            return
        more = slots + max(SPARE, slots // 16) - have
        for cache in (self.k, self.v):
            for layer, old in enumerate(cache):
                cache[layer] = old.new_zeros(len(old), have + more, *old.shape[2:])
                cache[layer][:, :have] = old
        self.positions = self.positions.new_zeros(len(self.used), have + more)

    def evict(self) -> None:
        """Frees the slots that no later position may read.

        The slots behind them move forward. As long as these are more than the free ones, nothing is moved until WASTE
        slots are free. Moving then takes a small part of the time in which attention has read the cache since."""
        for row, n in enumerate(self.used):
            alive = self.until[row] >= self.next_place[row]
            dead = n - int(alive.sum())
            if not dead:
                continue
            first = int(np.argmin(alive))
            kept = first + np.flatnonzero(alive[first:])
            if len(kept) > dead and dead < min(WASTE, n / 4):
                continue
            index = torch.from_numpy(kept).to(self.device)
            for part in (*self.k, *self.v):
                part[row, first : first + len(kept)] = part[row, index]
            for of in (self.place_of, self.position_of, self.until):
                of[row] = of[row][alive]
            self.used[row] = n - dead

    def clear(self, row: int) -> None:
        """Empties the cache of a sequence, which starts again at place 0."""
        self.used[row], self.next_place[row] = 0, 0
        self.place_of[row] = self.position_of[row] = self.until[row] = np.empty(0, dtype=np.int64)

    def keep(self, rows: list[int]) -> None:
        """Drops the cache of every sequence except those listed."""
        super().keep(rows)
        for name in ("place_of", "position_of", "until", "next_place"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def kept(self, row: int) -> list[int]:
        """Returns the places of a sequence that later positions may still read."""
        return self.place_of[row][self.until[row] >= self.next_place[row]].tolist()
