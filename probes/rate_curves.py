"""Turns points of rate and distortion into curves: baselines, converse, lower hulls, and differences of two curves."""

import math
from typing import NamedTuple

import numpy as np

DRAWS = 1000  # number of bootstrap samples


class Points(NamedTuple):
    """Distortion and rate of N texts, as measured by the probes of one state."""

    distortion: np.ndarray  # (betas, seeds, N)
    rate: np.ndarray  # (betas, seeds, N)
    # (N,): distortion of a decoder that knows only the class frequencies of the training texts; its rate is 0
    constant: np.ndarray


def entropy(labels: np.ndarray, K: int) -> float:
    """Returns the entropy of the class frequencies in n labels, in nats. It is too low by about (K - 1) / 2n."""
    p = np.bincount(labels, minlength=K) / labels.size
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def baselines(train: np.ndarray, val: np.ndarray, test: np.ndarray, K: int) -> dict[str, float]:
    """Returns the distortions, in nats, that are reached without any state, from the labels (N,) of the splits.

    entropy is that of the labels of all texts, with the correction of Miller and Madow. floor is the least distortion
    of any state, which is 0 because a target is a single label."""
    every = np.concatenate([train, val, test])
    surprise = -np.log((np.bincount(every) / every.size)[every])
    return {
        "uniform": math.log(K), "entropy": min(math.log(K), entropy(every, K) + (K - 1) / (2 * every.size)),
        "entropy_error": float(surprise.std() / math.sqrt(len(every))), "entropy_test": entropy(test, K),
        "cross_entropy": float(constant_distortion(train, test, K).mean()), "floor": 0.0,
    }  # fmt: skip


def constant_distortion(train: np.ndarray, test: np.ndarray, K: int) -> np.ndarray:
    """Returns the cross-entropy (N,) of each test text's label under the frequencies of the training texts, with one
    text added to each class."""
    counts = np.bincount(train, minlength=K) + 1
    return -np.log(counts / counts.sum())[test]


def converse(distortion: np.ndarray, rate: np.ndarray, known: dict[str, float]) -> dict:
    """Returns D + R - H for distortion and rate (seeds, N) of one beta, its tolerance, and whether D + R - H is below 0
    by more than the tolerance, which is impossible for every state. The tolerance is three times the sum of two
    standard errors: that of the mean of D + R over texts, and that of H."""
    sums = (distortion + rate).mean(axis=0)
    above = float(sums.mean()) - known["entropy"]
    tolerance = 3 * (float(sums.std(ddof=1)) / math.sqrt(len(sums)) + known["entropy_error"])
    return {"above_converse": above, "converse_tolerance": tolerance, "violates_converse": above < -tolerance}


def hull(rates: np.ndarray, distortions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners of the lower convex hull of points (k,), from the least rate to the least distortion.
    Every point on the line between two points can be reached by choosing one of the two at random."""
    corners: list[tuple[float, float]] = []
    for r, d in sorted(zip(rates.tolist(), distortions.tolist(), strict=True)):
        if corners and d >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (r0, d0), (r1, d1) = corners[-2:]
            if (d1 - d0) * (r - r0) < (d - d0) * (r1 - r0):
                break
            corners.pop()  # above the line from the corner before it to this point
        if corners and corners[-1][0] == r:
            corners.pop()
        corners.append((r, d))
    return tuple(np.array(corners).T)


def at_rates(rates: np.ndarray, distortions: np.ndarray, constant: float, wanted: np.ndarray) -> np.ndarray:
    """Returns the distortion at the wanted rates (m,) on the hull of points (k,) and (0, constant). The constant is a
    point of the hull because a sender may transmit a code for only some of the texts. Beyond the hull, the distortion
    stays at the hull's last value."""
    return np.interp(wanted, *hull(np.append(0.0, rates), np.append(constant, distortions)))


def resampled(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws texts and probe seeds with replacement, the same ones for all states of the same texts.

    Returns rates and distortions (1 + DRAWS, seeds, betas), the constant's distortion (1 + DRAWS,) and the weight of
    each seed (1 + DRAWS, seeds). The first row is over all texts, the others are over drawn texts."""
    generator = np.random.default_rng(0)
    _, seeds, N = points.rate.shape
    counts = generator.multinomial(N, np.full(N, 1 / N), size=DRAWS)
    counts = np.concatenate([np.ones((1, N)), counts]) / N
    weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS)
    weights = np.concatenate([np.ones((1, seeds)), weights]) / seeds
    rate, distortion = (np.einsum("bsn,dn->dsb", x, counts, optimize=True) for x in (points.rate, points.distortion))
    return rate, distortion, counts @ points.constant, weights


def intervals(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lower and the upper ends of the 95 % intervals of rate and distortion, (2, betas) each."""
    rate, distortion, _, weights = resampled(points)
    means = np.stack([np.einsum("dsb,ds->db", x, weights)[1:] for x in (rate, distortion)])
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return low, high


def curves(points: Points, wanted: np.ndarray) -> np.ndarray:
    """Returns the distortion (1 + DRAWS, m) at the wanted rates (m,), averaged over seeds. The first row is over all
    texts, the others are over the bootstrap samples."""
    rate, distortion, constant, weights = resampled(points)
    out = [
        [at_rates(r, d, c, wanted) for r, d in zip(rs, ds, strict=True)]
        for rs, ds, c in zip(rate, distortion, constant, strict=True)
    ]
    return np.einsum("dsm,ds->dm", out, weights)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % percentile interval of draws (draws,)."""
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return low, high


def found(points: Points, entropy: float) -> bool:
    """Returns whether a point has less distortion than a decoder that knows only the class frequencies, whose
    distortion is at least H(Y). The frequencies of the training texts have a slightly larger distortion than the true
    ones. The interval of a point's gain over them, computed text by text and with Bonferroni's correction over the
    points, must therefore lie above that surplus."""
    _, distortion, constant, weights = resampled(points)
    gain = constant[1:, None] - np.einsum("dsb,ds->db", distortion, weights)[1:]
    surplus = max(0.0, float(points.constant.mean()) - entropy)
    return bool((np.quantile(gain, 0.025 / gain.shape[1], axis=0) > surplus).any())


def reach(points: Points) -> float:
    """Returns the greatest rate up to which the points of every seed determine the distortion."""
    return float(points.rate.mean(axis=2).max(axis=0).min())


def compared(first: Points, second: Points, rates: list[float], entropy: float, both: tuple[bool, bool]) -> dict:
    """Returns the distortion of `first` minus that of `second` at equal rates: at each of `rates` (nats), with None
    where one of them does not reach that rate, and as a mean over the rates from 0 to `up_to`, which is H(Y) or the
    rate that both reach. `both` says whether something was found from each state. A state from which nothing was found
    reaches every rate, because its curve is the constant's. Intervals are bootstrapped over paired texts and probe
    seeds; p is the bootstrap's p-value of no difference in that mean."""
    reached = min(
        (reach(of) for of, something in zip((first, second), both, strict=True) if something), default=math.inf
    )
    up_to, n = min(entropy, reached), len(rates)
    wanted = np.concatenate([rates, np.linspace(0, up_to, 33)])
    difference, *drawn = curves(first, wanted) - curves(second, wanted)
    drawn = np.array(drawn)
    mean, means = float(difference[n:].mean()), drawn[:, n:].mean(axis=1)
    p = 2 * min(float((means >= 0).mean()), float((means <= 0).mean()))
    at_each = [(float(difference[i]), *interval(drawn[:, i])) for i in range(n)]
    return {
        "found": list(both),
        "rates": list(rates),
        "differences": [of if rate <= reached else None for rate, of in zip(rates, at_each, strict=True)],
        "up_to": up_to,
        "difference": mean,
        "difference_interval": interval(means),
        "p": min(1.0, max(p, 1 / len(means))),
    }
