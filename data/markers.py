"""Places markers while text is read, and computes what every position may read: for windows, and token by token.

A scheme cuts text into segments. A marker, or a pair of markers, follows each closed segment:

    place      a segment ends
    stored     before each meta-token that the dataset has
    sentence   after a sentence, once the next token has come
    newline    after a line, once the next token has come
    random     at random content tokens, a fixed number for each chunk of content
    span       at the end of random spans, whose number and total length are fixed for each chunk of content

`MarkerScheme.lay_out` does this for a whole text, and `Stream` for one token at a time. Both give the same rows.
"""

import functools
import math
from collections import deque
from typing import NamedTuple

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key, uniform_bits
from nanometa.config import TrainConfig
from nanometa.config.marker_settings import MarkerConfig
from nanometa.config.tasks import PLACEMENTS
from nanometa.data.inject import marker_places
from nanometa.data.layout import FOREVER, Layout, layout_of, padded
from nanometa.data.sentences import sentences_of
from nanometa.data.spans import draw_spans, number_of_spans
from nanometa.data.tokenizer import CL, CR, META, SR, Tokenizer

NAMES = {"sr": (SR,), "meta": (META,), "clcr": (CL, CR), "none": ()}  # markers by the value of the setting `marks`


class Row(NamedTuple):
    """One position of a text, with the columns of a Layout."""

    token: int
    content: int
    position: int
    reads_from: int
    read_until: int
    reads_to: int = FOREVER
    """the last place that it reads, apart from itself and the markers before it; only for spans that are compressed
    late"""


class Placing(NamedTuple):
    """How the texts of a split get their markers."""

    cfg: MarkerConfig
    key: int = 0
    """key of all random draws"""
    previous: bool = False
    """whether a marker has the position of the content token before it, so that positions count content alone;
    otherwise positions are places"""


STORED = Placing(MarkerConfig())


def placing_of(cfg: TrainConfig, split: str) -> Placing:
    """Returns how a run places the markers of a split, such as "train", "val" or "generated"."""
    return Placing(cfg.markers, stable_key(cfg.seed, "markers", split), cfg.model.meta_position == "previous")


def markers_of(cfg: TrainConfig, chunk_markers: int) -> tuple[str, ...]:
    """Returns the names of the markers that the texts of a run have, in the order of their ids.

    chunk_markers: number of markers in a chunk of its dataset."""
    if cfg.task.tasks:
        return (META,) if any(PLACEMENTS[name].has_meta for name in cfg.task.placements) else ()
    if cfg.markers.places_markers:
        return NAMES[cfg.markers.marks]
    return (META,) if chunk_markers else ()


def closing_marker(cfg: MarkerConfig, tokenizer: Tokenizer) -> int | None:
    """Returns the id of the marker that closes a segment, or None if none does."""
    names = NAMES[cfg.marks] if cfg.places_markers else (META,)
    return tokenizer.markers[names[-1]] if names else None


class MarkerScheme:
    """The markers of a run, and what later positions may read."""

    def __init__(self, placing: Placing, tokenizer: Tokenizer, content: int, markers: int):
        """content, markers: numbers of content tokens, and of stored markers, in a window. Random draws are made for
            so much content at a time, and depend on the number of the window and on the key alone.

        Raises UserError if the tokenizer lacks a marker, or a window cannot have the drawn segments."""
        cfg, self.key, self.previous = placing
        self.cfg, self.tokenizer = cfg, tokenizer
        self.content, self.chunk = content, content + markers
        self.marks: tuple[int, ...] = ()
        if cfg.places_markers:
            for name in NAMES[cfg.marks]:
                if name not in tokenizer.markers:
                    raise UserError(
                        f"the tokenizer {tokenizer.name} has no room for {name}, because it was made by an older "
                        f"version: prepare the dataset again."
                    )
            self.marks = tuple(tokenizer.markers[name] for name in NAMES[cfg.marks])
        self.closing = closing_marker(cfg, tokenizer)
        self.sentences = sentences_of(tokenizer, cfg) if cfg.marker_place in ("sentence", "newline") else None
        if cfg.marker_place == "random" and cfg.random_marks >= content:
            raise UserError(
                f"random_marks={cfg.random_marks} does not fit a window with {content} content tokens: use fewer."
            )
        if cfg.marker_place == "span":
            for ratio in cfg.compression_ratio:
                number_of_spans(content, ratio, cfg.max_span)  # raises UserError if it cannot be done

    def check_room(self, most: int, width: int) -> None:
        """Raises UserError if windows of `width` positions, which can close `most` segments, lack room for those that
        are drawn."""
        cfg, needed = self.cfg, 1
        if cfg.marker_place == "random":
            needed = cfg.random_marks
        elif cfg.marker_place == "span":
            needed = max(number_of_spans(self.content, ratio, cfg.max_span)[0] for ratio in cfg.compression_ratio)
        if needed > most:
            raise UserError(
                f"block_size={width} has no room for the markers of {needed} segments beside {self.content} content "
                f"tokens: use --block_size={self.content + needed * len(self.marks)}."
            )

    @functools.lru_cache(maxsize=8)  # noqa: B019 (there are few schemes, and they live as long as their run)
    def drawn(self, chunk: int) -> np.ndarray:
        """Returns the first and the last content token (N, 2) of the segments that are drawn for a chunk of content,
        counted from its start."""
        if self.cfg.marker_place == "span":
            ratios = self.cfg.compression_ratio
            turn = uniform_bits(stable_key(self.key, "ratio"), np.array(chunk)) % np.uint64(len(ratios))
            return draw_spans(self.content, ratios[int(turn)], self.cfg.max_span, self.key, chunk)
        M = self.cfg.random_marks
        ends = np.flatnonzero(marker_places("uniform", chunk, 1, self.content - M, M, self.key)[0])
        return np.stack([np.append(0, ends[:-1] + 1), ends], axis=1)

    def segments(self, content: np.ndarray, first: int, most: int | None) -> np.ndarray:
        """Returns the first and the last content token (N, 2) of each closed segment of content (n,), counted from 0.

        first: number of the first content token in its stream. most: largest number of segments."""
        if self.sentences:
            found = self.sentences.segments(content)
        else:
            chunks = range(first // self.content, -(-(first + len(content)) // self.content))
            parts = [self.drawn(chunk) + (chunk * self.content - first) for chunk in chunks]
            found = np.concatenate(parts) if parts else np.empty((0, 2), dtype=np.int64)
            found = found[(found[:, 1] >= 0) & (found[:, 1] < len(content))]
            if self.cfg.marker_place == "span":
                found = found[found[:, 0] >= 0]  # not one whose start belongs to an earlier text
            found = np.maximum(found, 0)
        return found[:most]

    def lay_out(
        self,
        ids: np.ndarray,
        first: int = 0,
        width: int | None = None,
        pad: int = 0,
        most: int | None = None,
        segments: np.ndarray | None = None,
    ) -> Layout:
        """Returns the layout of a text: content ids (n,), or with marker_place=stored ids that have their markers.

        first: number of the first content token, on which random draws depend.
        width: the layout is padded to so many positions with the id `pad`; None = no padding.
        most: largest number of segments that are closed; None = no limit.
        segments: first and last content token (N, 2) of the closed segments; None = those that the scheme finds.
        Raises UserError if the layout is longer than `width`."""
        ids = np.asarray(ids, dtype=np.int64)
        if self.cfg.places_markers:
            segments = self.segments(ids, first, most) if segments is None else segments
            tokens, content = self._with_marks(ids, segments)
        else:
            tokens, content, *_ = layout_of(ids, self.tokenizer.meta)
            ends = np.cumsum(content >= 0)[content < 0] - 1
            segments = np.stack([np.append(0, ends + 1)[:-1], ends], axis=1)
        T = len(tokens)
        positions = np.maximum(np.cumsum(content >= 0) - 1, 0) if self.previous else np.arange(T)
        reads_from, read_until = self._limits(content, segments, first // self.content)
        layout = Layout(tokens, np.where(content < 0, -1, content + first), positions, reads_from, read_until)
        return layout if width is None else padded(layout, width, pad)

    def stream(self, first: int = 0, most: int | None = None) -> "Stream":
        """Returns a stream that lays out a text token by token, as `lay_out` does with the same arguments."""
        return Stream(self, first, most)

    def _with_marks(self, ids: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens (T,) and the content numbers (T,) of ids (n,) with marks after each segment (N, 2)."""
        m, n = len(self.marks), len(ids)
        at = np.arange(n) + m * np.searchsorted(segments[:, 1], np.arange(n))
        tokens, content = np.empty(n + m * len(segments), dtype=np.int64), np.full(n + m * len(segments), -1)
        tokens[at], content[at] = ids, np.arange(n)
        for i, mark in enumerate(self.marks):
            tokens[at[segments[:, 1]] + 1 + i] = mark
        return tokens, content

    def _limits(self, content: np.ndarray, segments: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns reads_from and read_until (T,) for content numbers (T,) and segments (N, 2) of content tokens."""
        cfg, T = self.cfg, len(content)
        reads_from, read_until = np.zeros(T, dtype=np.int64), np.full(T, FOREVER)
        if cfg.evict not in ("nothing", "segment"):
            read_until = np.array([self.forgotten_after(place, chunk) for place in range(T)], dtype=np.int64)
            return reads_from, np.where((content >= 0) & (content < cfg.sinks), FOREVER, read_until)
        place_of = np.flatnonzero(content >= 0)  # of each content token
        if self.cfg.places_markers:
            closing = place_of[segments[:, 1]] + len(self.marks)
        else:
            closing = np.flatnonzero(content < 0)
        marks = max(1, len(self.marks)) if self.cfg.closes else 0
        if cfg.closing_reads == "segment":
            # an empty segment has no first token: its marker reads itself
            starts = place_of[np.minimum(segments[:, 0], len(place_of) - 1)] if len(place_of) else closing
            reads_from[closing] = np.where(segments[:, 0] <= segments[:, 1], starts, closing)
            if marks == 2:
                reads_from[closing - 1] = closing - 1
        if cfg.evict == "segment":
            until = np.append(closing, np.full(cfg.evict_delay, FOREVER))[cfg.evict_delay :]
            for (start, end), last in zip(segments.tolist(), until.tolist(), strict=True):
                read_until[place_of[max(start, cfg.sinks) : end + 1]] = last
            if marks == 2:
                read_until[closing - 1] = closing
        return reads_from, read_until

    def forgotten_after(self, place: int, chunk: int) -> int:
        """Returns read_until of a place, as far as it does not depend on segments.

        chunk: number of the chunk in which the text begins."""
        if self.cfg.evict in ("nothing", "segment"):
            return FOREVER
        if self.cfg.evict == "window":
            return place + self.cfg.eviction_window - 1
        ratio = self.cfg.compression_ratio[0]
        if self.cfg.evict == "local":
            return last_local(place, ratio)
        number, at = divmod(place, self.chunk)
        return place if self._scattered(chunk + number)[at] else FOREVER

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _scattered(self, chunk: int) -> np.ndarray:
        """Returns which positions (chunk,) of a chunk evict=scattered forgets."""
        n = round(self.cfg.compression_ratio[0] * self.chunk)
        return marker_places("uniform" if n else "none", chunk, 1, self.chunk - n, n, stable_key(self.key, "drop"))[0]


def last_local(place: int, ratio: float) -> int:
    """Returns the last place q that reads `place` if q reads the places from floor(ratio q) on."""
    if ratio == 0:
        return FOREVER
    last = max(place, math.floor((place + 1) / ratio) + 1)
    while math.floor(ratio * last) > place:
        last -= 1
    return last


class Stream:
    """Lays out a text one token at a time, as MarkerScheme.lay_out does for a whole text."""

    def __init__(self, scheme: MarkerScheme, first: int, most: int | None):
        self.scheme, self.cfg, self.first = scheme, scheme.cfg, first
        self.left = math.inf if most is None else most  # number of segments that may still be closed
        self.place = self.count = 0  # numbers of positions and of content tokens so far
        self.sentence = scheme.sentences.begin() if scheme.sentences else None
        self.start: int | None = None  # the first place of the open segment; None if none is open
        self.text: list[int] = []  # the places of the open segment that are to be forgotten
        self.closed: deque[list[int]] = deque()  # the same of closed segments that wait for evict_delay
        self.rows: list[Row] = []
        self.forgotten: list[tuple[int, int]] = []

    def extend(self, token: int) -> tuple[list[Row], list[tuple[int, int]]]:
        """Adds a content token or, with marker_place=stored, a meta-token.

        Returns the new rows, and pairs (place, read_until) of older places whose read_until is known now."""
        self.rows, self.forgotten = [], []
        cfg, scheme = self.cfg, self.scheme
        if not cfg.places_markers and token == scheme.tokenizer.meta:
            self._close((token,))
            return self.rows, self.forgotten
        if self.sentence and self.sentence.ends_before(token) and self.left:
            self._close(scheme.marks)
        begins, ends = self.start is None, False
        if cfg.marker_place in ("random", "span"):
            starts, ends = self._drawn_here()
            begins = starts or (begins and cfg.marker_place == "random")  # text between spans is in no segment
        if begins:
            self.start, self.text = self.place, []
        if self.start is not None and self.count >= cfg.sinks:
            self.text.append(self.place)
        self._add(token, 0, content=self.first + self.count)
        if ends and self.start is not None and self.left:
            self._close(scheme.marks)
        return self.rows, self.forgotten

    def _drawn_here(self) -> tuple[bool, bool]:
        """Returns whether a drawn segment begins, and whether one ends, at the content token that comes now."""
        chunk, at = divmod(self.first + self.count, self.scheme.content)
        starts, ends = self.scheme.drawn(chunk).T
        return at in starts, at in ends

    def _add(self, token: int, reads_from: int, read_until: int | None = None, content: int = -1) -> None:
        """Adds a row. read_until: None = the value that does not depend on segments."""
        if content >= 0:
            self.count += 1
        if read_until is None:
            sink = content >= 0 and self.count <= self.cfg.sinks
            chunk = self.first // self.scheme.content
            read_until = FOREVER if sink else self.scheme.forgotten_after(self.place, chunk)
        position = max(self.count - 1, 0) if self.scheme.previous else self.place
        self.rows.append(Row(token, content, position, reads_from, read_until))
        self.place += 1

    def _close(self, marks: tuple[int, ...]) -> None:
        """Closes the open segment with markers, and forgets the text of the segment whose turn it is."""
        segment, evicts = self.cfg.closing_reads == "segment", self.cfg.evict == "segment"
        self.left -= 1
        for mark in marks[:-1]:  # only the closing marker reads the others
            self._add(mark, self.place if segment else 0, self.place + 1 if evicts else None)
        if marks:
            start = self.place if self.start is None else self.start
            self._add(marks[-1], start if segment else 0)
        if evicts:
            self.closed.append(self.text)
            if len(self.closed) > self.cfg.evict_delay:
                self.forgotten += [(place, self.place - 1) for place in self.closed.popleft()]
        self.start, self.text = None, []
