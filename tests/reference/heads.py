"""Reference for the figures of probe.py attention: follows the definitions, one query at a time, in plain Python."""

import math


def sharpness(logits: list[float], marks: list[int]) -> dict[str, float]:
    """Returns the figures of one query of one head.

    logits: of the keys that the query sees. marks: indices of the marks among these keys."""
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
