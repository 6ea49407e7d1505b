"""What the paper's theorem 4.1 says of the entropy of attention, and where it is true.

It says: a meta-token boosts the logit of a key by t > 0, and entropy falls. Of a key of weight p that is true while
ln p > -H only, that is for a key that is likelier than the typical one: dH/dt = -p (ln p + H). (Once that holds it
stays so: at ln p = -H, ln p + H grows by 1 - p.)

In NumPy, not in torch: a report draws it, and starts without torch."""

import numpy as np
from scipy.special import expit, log_softmax, logit, softmax, xlogy


def entropy(logits: np.ndarray) -> np.ndarray:
    """(..., N), -inf where nothing is seen -> nats (...) of the softmax's weights: H = -sum p ln p."""
    logp = log_softmax(logits, axis=-1)
    return -(np.exp(logp) * np.where(logp == -np.inf, 0, logp)).sum(axis=-1)


def entropy_slope(p: np.ndarray, H: np.ndarray) -> np.ndarray:
    """dH/dt in nats, where the logit of a key of weight p grows by t, and H is the entropy of all weights."""
    return -p * (np.log(p) + H)


def boosted_entropy(p: np.ndarray, H: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The entropy after the logit of a key of weight 0 < p < 1 has grown by t; all in float64, for 1 - p may be small.

    The others keep their proportions, so with h(p) = -p ln p - (1 - p) ln (1 - p), H = h(p) + (1 - p) G with one G."""
    p, H, t = (np.asarray(x, dtype=np.float64) for x in (p, H, t))
    rest = np.maximum((H - _two(p)) / (1 - p), 0)
    after = expit(logit(p) + t)
    return _two(after) + (1 - after) * rest


def _two(p: np.ndarray) -> np.ndarray:
    return -xlogy(p, p) - xlogy(1 - p, 1 - p)


def theorem_curves(N: int = 64) -> dict[str, tuple[np.ndarray, ...]]:
    """N keys, of which one has nearly all of the weight. If that one, the likely key, is boosted by t, or another one:
    t, the entropy by definition, the same from p and H alone, and its slope by the theorem's formula, (81,) each."""
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
