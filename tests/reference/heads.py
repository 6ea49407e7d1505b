"""What probe.py attention measures, from its definition: one query at a time, sums in Python."""

import math


def sharpness(logits: list[float], marks: list[int]) -> dict[str, float]:
    """Of one query of one head: the logits of the keys it sees, and which of them are marks."""
    most = max(logits)
    weights = [math.exp(x - most) for x in logits]
    p = [w / math.fsum(weights) for w in weights]
    H = -math.fsum(x * math.log(x) for x in p if x > 0)
    return {
        "max": most,
        "entropy": H,
        "normalised": H / math.log(max(2, len(p))),
        "sink": p[0],
        "keys": float(len(p)),
        "on_marks": math.fsum(p[j] for j in marks),
        "p_mark": p[marks[-1]],
        "logit_mark": logits[marks[-1]],
    }
