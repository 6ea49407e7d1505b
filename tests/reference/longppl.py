"""Reference for evals/longppl.py: loops over tokens and bytes, and reads every prefix again from its start."""

from tests.reference.generate import next_logits


def cuts(first: list[int], second: list[int], size: int) -> list[tuple]:
    """Returns the pieces of a document as pairs (start, end) of token counts under both tokenizers.

    first, second: bytes of each token. A piece takes as much as fits into `size` tokens under both tokenizers. What is
    left at the end is dropped, and what has no common border within `size` tokens, too."""
    borders = [(i, j) for i in range(1, len(first) + 1) for j in range(1, len(second) + 1)
               if sum(first[:i]) == sum(second[:j])]  # fmt: skip
    out, start = [], (0, 0)
    while later := [border for border in borders if border > start]:
        fitting = [(i, j) for i, j in later if i - start[0] <= size and j - start[1] <= size]
        if not fitting:
            start = later[0]
            continue
        end = fitting[-1]
        if end == later[-1] and size not in (end[0] - start[0], end[1] - start[1]):
            break
        out.append((start, end))
        start = end
    return out


def whole_nats(run, ids: list[int]) -> list[float]:
    """Returns the nats of all tokens but the first, each given all tokens before it. For a run without markers."""
    return [_nats(run, ids[:i], ids[i]) for i in range(1, len(ids))]


def short_nats(run, ids: list[int], K: int, d: int) -> list[float | None]:
    """Returns the nats of all tokens but the first given a short context, None for a token without one.

    Windows of K + d - 1 positions move by d; the last one ends with the text. The window of a position is the first one
    that holds it, and positions of the first window have no short context."""
    out, length = [], K + d - 1
    for i in range(1, len(ids)):
        start = 0
        while start + length < i:
            start += d
        start = min(start, len(ids) - length)
        out.append(_nats(run, ids[start:i], ids[i]) if i > length else None)
    return out


def _nats(run, before: list[int], token: int) -> float:
    return -next_logits(run, before).log_softmax(-1)[token].item()


def key_intervals(whole: list, short: list, n_bytes: list[int], alpha: float, beta: float) -> list[list[int]]:
    """Returns the merged intervals [first byte, end) of the key tokens of a piece.

    whole, short: nats of all tokens but the first; n_bytes: bytes of all tokens."""
    key = [b is not None and b - a > alpha and a < -beta for a, b in zip(whole, short, strict=True)]
    return merged([False, *key], n_bytes)


def merged(flags: list[bool], n_bytes: list[int]) -> list[list[int]]:
    """Returns the intervals of the flagged tokens; those that overlap or touch are one."""
    out, at = [], 0
    for flag, size in zip(flags, n_bytes, strict=True):
        if flag and size:
            if out and at <= out[-1][1]:
                out[-1][1] = max(out[-1][1], at + size)
            else:
                out.append([at, at + size])
        at += size
    return out


def inside(intervals: list[list[int]], n_bytes: list[int]) -> list[bool]:
    """Returns which tokens have bytes, all of them in one interval. n_bytes: bytes of each token."""
    out, at = [], 0
    for size in n_bytes:
        out.append(size > 0 and any(start <= at and at + size <= end for start, end in intervals))
        at += size
    return out
