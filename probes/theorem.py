"""Computes what the paper's theorem 4.1 claims about the entropy of attention.

The theorem says that a meta-token boosts the logit of a key by t > 0 and entropy falls. For a key of weight p this is
true only while ln p > -H, that is, for a key more likely than a typical one, because dH/dt = -p (ln p + H). Once this
holds, it holds for every larger t, because the derivative of ln p + H at ln p = -H is 1 - p > 0."""

import numpy as np
from scipy.special import expit, logit, xlogy


def boosted_entropy(p: np.ndarray, H: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Returns the entropy in nats after the logit of a key of weight 0 < p < 1 has grown by t. It is computed in
    float64 because 1 - p may be small. H is the entropy of all weights before.

    The other keys keep their proportions, so with h(p) = -p ln p - (1 - p) ln (1 - p), H = h(p) + (1 - p) G and G is
    constant."""
    p, H, t = (np.asarray(x, dtype=np.float64) for x in (p, H, t))
    rest = np.maximum((H - _two(p)) / (1 - p), 0)
    after = expit(logit(p) + t)
    return _two(after) + (1 - after) * rest


def _two(p: np.ndarray) -> np.ndarray:
    return -xlogy(p, p) - xlogy(1 - p, 1 - p)
