"""Computes the weights of targets one window at a time, from the formulas of arXiv 2503.09202 and 2410.23771."""

import math


def weights(name: str, long: list[float], short: list[float], ties: list[int], after: list[bool], **c) -> list[float]:
    """Returns the weights of the n targets of a window, from their nats with the whole context and with a short one.

    ties: a random number for each target; after: whether a marker precedes it; c: the constants lambda_, kappa, shift
    and gamma."""
    n = len(long)
    d = [whole - part for whole, part in zip(long, short, strict=True)]  # log p_short - log p_long
    if name == "longce":
        return [min(math.exp(-x), c["gamma"]) for x in d]
    if name == "after_markers":
        u = [2.0 if follows else 1.0 for follows in after]
    elif name == "ppmi":
        u = [max(0.0, -x - math.log(c["shift"])) for x in d]
    elif name == "npmi":
        u = [max(0.0, x - math.log(c["shift"])) for x in d]
    else:
        u = [abs(x) for x in d]
    if name in ("sparse", "ppmi", "npmi"):
        ranked = sorted(range(n), key=lambda i: (-u[i], ties[i]))
        kept = set(ranked[: max(1, math.floor(c["kappa"] * n + 1e-6))])
        u = [1.0 if i in kept else 0.0 for i in range(n)]
    u = [x * n / sum(u) for x in u] if sum(u) > 0 else [1.0] * n
    if name in ("dense", "permuted"):
        u = [c["lambda_"] + (1 - c["lambda_"]) * x for x in u]
    if name == "permuted":
        u = [u[i] for i in sorted(range(n), key=lambda i: ties[i])]
    return u
