"""Computes what the paper's theorem 4.1 claims about the entropy of attention, and where it is true.

The theorem says that a meta-token boosts the logit of a key by t > 0 and entropy falls. For a key of weight p this is
true only while ln p > -H, for a key more likely than the typical one: dH/dt = -p (ln p + H). (Once this holds it
continues to hold: at ln p = -H, ln p + H grows by 1 - p.)

The code uses NumPy instead of torch because a report draws the theorem and starts without torch."""

import numpy as np
from scipy.special import expit, log_softmax, logit, softmax, xlogy


def entropy(logits: np.ndarray) -> np.ndarray:
    """Returns the entropy (...) in nats of the softmax of logits (..., N), which are -inf where no key is seen:
    H = -sum p ln p."""
    logp = log_softmax(logits, axis=-1)
    return -(np.exp(logp) * np.where(logp == -np.inf, 0, logp)).sum(axis=-1)


def entropy_slope(p: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Returns dH/dt in nats when the logit of a key of weight p grows by t and H is the entropy of all weights."""
    return -p * (np.log(p) + H)


def boosted_entropy(p: np.ndarray, H: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Returns the entropy after the logit of a key of weight 0 < p < 1 has grown by t, in float64 because 1 - p may be
    small.

    The other keys keep their proportions, so with h(p) = -p ln p - (1 - p) ln (1 - p), H = h(p) + (1 - p) G and G is
    constant."""
    p, H, t = (np.asarray(x, dtype=np.float64) for x in (p, H, t))
    rest = np.maximum((H - _two(p)) / (1 - p), 0)
    after = expit(logit(p) + t)
    return _two(after) + (1 - after) * rest


def _two(p: np.ndarray) -> np.ndarray:
    return -xlogy(p, p) - xlogy(1 - p, 1 - p)


def theorem_curves(N: int = 64) -> dict[str, tuple[np.ndarray, ...]]:
    """Returns the effect of a boost t on the entropy over N keys, one of which has nearly all of the weight. The
    boosted key is either this likely key or another, unlikely one. For each of the two the result has t, the entropy by
    definition, the entropy from p and H, and the slope by the theorem's formula, (81,) each."""
    logits = np.linspace(-1, 1, N)
    logits[0] = 7.0
    t = np.linspace(0, 10, 81)
    out = {}
    for name, key in (("likely", 0), ("unlikely", N // 2)):
        boosted = np.tile(logits, (len(t), 1))
        boosted[:, key] += t
        p, H = softmax(boosted, axis=-1)[:, key], entropy(boosted)
        out[name] = t, H, boosted_entropy(p[0], H[0], t), entropy_slope(p, H)
    return out
