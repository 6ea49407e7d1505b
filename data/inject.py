"""Injects markers into a stream of content tokens, and removes them again.

The stream is cut into chunks of C content tokens, and every chunk receives exactly M markers, so it has n = C + M
positions. Chunk i therefore has the same content and the same number of markers under every injection rule."""

import numpy as np

from nanometa.common.keyed_random import uniform_bits

IN_CACHE = 2**13  # random numbers drawn at a time; they fit in the cache of a core, which halves the time


def marker_places(injection: str, first_chunk: int, n_chunks: int, C: int, M: int, key: int) -> np.ndarray:
    """Returns which positions of chunks first_chunk .. first_chunk + n_chunks - 1 are markers, (n_chunks, n) bool.

    uniform: M of the n positions, drawn without replacement, all sets equally likely (the paper, section 2: k = M / n);
    periodic: evenly spaced, with the last marker at the end of the chunk; none: no markers, and M must be 0.
    The markers of a chunk depend only on the key and the chunk's index. Raises ValueError for another rule."""
    n = C + M
    places = np.zeros((n_chunks, n), dtype=bool)
    if injection == "none":
        if M:
            raise ValueError(f"injection none has no markers, but M = {M}")
    elif injection == "periodic":
        places[:, (np.arange(1, M + 1) * n) // M - 1] = True
    elif injection == "uniform":
        # The M places with the smallest random numbers are a uniformly drawn set. There are no ties, because the
        # numbers of one key are distinct.
        step = max(1, IN_CACHE // n)
        for start in range(0, n_chunks, step):
            chunks = np.arange(first_chunk + start, first_chunk + min(start + step, n_chunks), dtype=np.uint64)
            bits = uniform_bits(key, chunks[:, None] * np.uint64(n) + np.arange(n, dtype=np.uint64))
            places[start : start + step] = bits <= np.partition(bits, M - 1, axis=1)[:, M - 1 : M]
    else:
        raise ValueError(f"unknown injection {injection!r}")
    return places


def inject(content: np.ndarray, places: np.ndarray, marker: int) -> np.ndarray:
    """Returns content (n_chunks, C) with markers at the given places (n_chunks, n) bool, as tokens (n_chunks, n)."""
    tokens = np.full(places.shape, marker, dtype=content.dtype)
    tokens[~places] = content.reshape(-1)
    return tokens


def strip(tokens: np.ndarray, marker: int) -> np.ndarray:
    """Returns the content stream (N,) of tokens of any shape, without the markers."""
    return tokens[tokens != marker]
