"""Slow, obvious reference for what a position may read: a loop over all pairs, written from the words of the rules."""

import math

import numpy as np


def may_read(cfg, kinds: list[str], segment: list[int], content: list[int], dropped: set[int]) -> np.ndarray:
    """Returns which places (columns) each place (row) may read, (T, T) bool.

    kinds: of each place "text", "opening" (the first of two markers) or "closing" (the marker that closes a segment).
    segment: of each place the number of the closed segment that it is text of or that it marks, or -1.
    content: number of each place's content token, -1 for markers.
    dropped: the places that evict=scattered forgets."""
    T = len(kinds)
    closing_of = {number: place for place, number in enumerate(segment) if kinds[place] == "closing"}
    last_of = {number: place for place, number in enumerate(segment) if number >= 0}
    seen = np.zeros((T, T), dtype=bool)
    for q in range(T):
        for k in range(q + 1):
            seen[q, k] = k == q or (_reader_wants(cfg, kinds, segment, q, k) and not _is_forgotten(
                cfg, kinds, segment, content, dropped, closing_of, last_of, q, k
            ))  # fmt: skip
    return seen


def _reader_wants(cfg, kinds, segment, q, k) -> bool:
    """With closing_reads=segment, a closing marker reads its segment and its opening marker, which reads nothing."""
    if cfg.closing_reads == "all" or kinds[q] == "text":
        return True
    return kinds[q] == "closing" and segment[k] == segment[q]


def _is_forgotten(cfg, kinds, segment, content, dropped, closing_of, last_of, q, k) -> bool:
    if cfg.evict == "local":  # q reads the places from floor(ratio q) on
        return k < math.floor(cfg.compression_ratio[0] * q)
    if cfg.evict == "scattered":
        return k in dropped
    sink = 0 <= content[k] < cfg.sinks
    if cfg.evict == "window":
        return not sink and q - k >= cfg.eviction_window
    if cfg.evict == "segment":
        if kinds[k] == "opening":
            return not (kinds[q] == "closing" and segment[q] == segment[k])
        if kinds[k] == "text" and segment[k] >= 0 and not sink:
            number = segment[k] + cfg.evict_delay
            ends = closing_of if cfg.closes else last_of
            return number in ends and q > ends[number]
    return False
