"""Markers into a content stream, and out again. Pure functions on arrays.

The stream is cut into chunks of C content tokens and every chunk gets exactly M markers, which makes n = C + M
positions. So chunk i holds the same content whatever the rule, and the number of markers is a constant."""

import numpy as np

from nanometa.common.keyed_random import uniform_bits

IN_CACHE = 2**13  # random numbers drawn at a time: they and their copies stay in a core's cache, which halves the time


def marker_places(injection: str, first_chunk: int, n_chunks: int, C: int, M: int, key: int) -> np.ndarray:
    """Which places of chunks first_chunk .. first_chunk + n_chunks - 1 hold markers -> bool (n_chunks, C + M).

    uniform: M of the n places without replacement, every set equally likely (the paper, section 2: k = M / n);
    periodic: evenly spaced, the last one at the chunk's end; none: no marker, and M must be 0.
    The draw of a chunk depends on the key and its index alone."""
    n = C + M
    places = np.zeros((n_chunks, n), dtype=bool)
    if injection == "none":
        if M:
            raise ValueError(f"injection none has no markers, M = {M} given")
    elif injection == "periodic":
        places[:, (np.arange(1, M + 1) * n) // M - 1] = True
    elif injection == "uniform":
        # the M places with the smallest random numbers are a uniformly drawn set; no two numbers of a key are equal
        step = max(1, IN_CACHE // n)
        for start in range(0, n_chunks, step):
            chunks = np.arange(first_chunk + start, first_chunk + min(start + step, n_chunks), dtype=np.uint64)
            bits = uniform_bits(key, chunks[:, None] * np.uint64(n) + np.arange(n, dtype=np.uint64))
            places[start : start + step] = bits <= np.partition(bits, M - 1, axis=1)[:, M - 1 : M]
    else:
        raise ValueError(f"unknown injection {injection!r}")
    return places


def inject(content: np.ndarray, places: np.ndarray, marker: int) -> np.ndarray:
    """content (n_chunks, C) and places (n_chunks, n) -> tokens (n_chunks, n)."""
    tokens = np.full(places.shape, marker, dtype=content.dtype)
    tokens[~places] = content.reshape(-1)
    return tokens


def strip(tokens: np.ndarray, marker: int) -> np.ndarray:
    """tokens of any shape -> the content stream (N,)."""
    return tokens[tokens != marker]
