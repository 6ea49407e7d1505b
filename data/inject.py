"""Markers into a content stream, and out again. Pure functions on arrays.

The stream is cut into chunks of C content tokens and every chunk gets exactly M markers, which makes n = C + M
positions. So chunk i holds the same content whatever the rule, and the number of markers is a constant."""

import numpy as np

from rng import uniform_bits


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
        # the M places with the smallest random numbers are a uniformly drawn set
        counter = np.arange(first_chunk * n, (first_chunk + n_chunks) * n, dtype=np.uint64).reshape(n_chunks, n)
        chosen = np.argpartition(uniform_bits(key, counter), M - 1, axis=1)[:, :M]
        np.put_along_axis(places, chosen, True, axis=1)
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
