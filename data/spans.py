"""Draws the spans of text that are to be compressed, so that every chunk of content saves exactly the asked share."""

import functools

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws, stable_key


def number_of_spans(content: int, ratio: float, longest: int) -> tuple[int, int]:
    """Returns how many spans a chunk of content has, and how many tokens they save together.

    A span of n tokens leaves one closing marker and saves n - 1. Lengths lie in 2 .. longest, so their mean is about
    (2 + longest) / 2. Raises UserError if the chunk cannot save so much."""
    saved = round(ratio * content)
    if not saved:
        return 0, 0
    fewest, most = -(-saved // (longest - 1)), min(saved, content - saved)
    if fewest > most:
        raise UserError(
            f"compression_ratio={ratio:g} cannot be reached in {content} content tokens with spans of at most "
            f"max_span={longest} tokens, because {fewest} spans would need {saved + fewest}: use a smaller ratio, or a "
            f"larger --max_span."
        )
    n = min(max(round(saved / ((2 + longest) / 2 - 1)), fewest), most)
    return n, saved


@functools.lru_cache(maxsize=512)
def draw_spans(content: int, ratio: float, longest: int, key: int, chunk: int) -> np.ndarray:
    """Returns the first and the last token (N, 2) of the spans of a chunk of content, in order and without overlap.

    The number of spans and of their tokens are the same in every chunk. Lengths, and the gaps before, between and after
    the spans, are random: a function of the key and the number of the chunk. Raises UserError as number_of_spans does.
    """
    n, saved = number_of_spans(content, ratio, longest)
    draws = Draws(stable_key(key, "spans", content, ratio, longest, chunk))
    each = [draws.between(1, longest - 1) for _ in range(n)]  # tokens that each span saves
    while (over := sum(each) - saved) != 0:
        i, step = draws.below(n), 1 if over > 0 else -1
        if 1 <= each[i] - step <= longest - 1:
            each[i] -= step
    rest = content - saved - n
    bars = np.sort(draws.sample(range(rest + n), n)) if n else np.empty(0, dtype=np.int64)  # stars and bars
    before = bars - np.arange(n)  # tokens outside spans before each span
    lengths = np.array(each, dtype=np.int64) + 1
    starts = before + np.cumsum(lengths) - lengths
    return np.stack([starts, starts + lengths - 1], axis=1).astype(np.int64)
