"""Points of rate and distortion as curves: baselines, the converse, lower hulls, and what two curves differ by."""

import math
from typing import NamedTuple

import numpy as np

DRAWS = 1000  # of the bootstrap


class Points(NamedTuple):
    """What probes of one state say of N texts."""

    distortion: np.ndarray  # (betas, seeds, N)
    rate: np.ndarray  # (betas, seeds, N)
    constant: np.ndarray  # (N,): distortion of the training texts' frequencies, what rate 0 has for certain


def shares(labels: np.ndarray, K: int) -> np.ndarray:
    return np.bincount(labels.ravel(), minlength=K) / labels.size


def entropy(labels: np.ndarray, K: int) -> float:
    """H of the classes' frequencies, in nats: as they are in `labels`, which is too low by about (K - 1) / 2n."""
    p = shares(labels, K)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def baselines(train: np.ndarray, val: np.ndarray, test: np.ndarray, K: int) -> dict[str, float]:
    """labels (N, n) of the splits -> what is known without any state, in nats, and what no state can beat.

    entropy is that of all texts, with the correction of Miller and Madow; floor is the mean entropy of a text's own
    labels: 0 for one label, and for a bag what is left if all of it is known."""
    every = np.concatenate([train, val, test])
    constant = constant_distortion(train, test, K)
    p = shares(every, K)
    surprise = -np.log(p[every])
    return {
        "uniform": math.log(K),
        "entropy": min(math.log(K), entropy(every, K) + (K - 1) / (2 * every.size)),
        "entropy_error": float(surprise.mean(axis=1).std() / math.sqrt(len(every))),
        "entropy_test": entropy(test, K),
        "cross_entropy": float(constant.mean()),
        "floor": float(np.mean([entropy(np.unique(row, return_inverse=True)[1], len(row)) for row in test])),
    }


def constant_distortion(train: np.ndarray, test: np.ndarray, K: int) -> np.ndarray:
    """(N,) nats of each test text's labels by the frequencies of the training texts, one text added to each class."""
    counts = np.bincount(train.ravel(), minlength=K) + train.shape[1]
    return -np.log(counts / counts.sum())[test].mean(axis=1)


def converse(distortion: np.ndarray, rate: np.ndarray, known: dict[str, float]) -> dict:
    """distortion, rate (seeds, N) of one beta -> D + R - H, how far below 0 chance may bring it (three standard errors
    of the texts' own sums and of H), and whether it is further below, which no state can be."""
    sums = (distortion + rate).mean(axis=0)
    above = float(sums.mean()) - known["entropy"]
    tolerance = 3 * (float(sums.std(ddof=1)) / math.sqrt(len(sums)) + known["entropy_error"])
    return {"above_converse": above, "converse_tolerance": tolerance, "violates_converse": above < -tolerance}


def hull(rates: np.ndarray, distortions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the lower convex hull of points (k,), from the least rate to the least distortion: what is between
    two points can be had by choosing one of them at random."""
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
    """Distortion of points (k,) at the wanted rates (m,): on their hull with (0, constant), since who sends a code now
    and then, and else nothing, is on the line between; beyond it, its last."""
    return np.interp(wanted, *hull(np.append(0.0, rates), np.append(constant, distortions)))


def resampled(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Texts and probe seeds drawn again with replacement, the same for all states of the same texts.

    -> rates and distortions (1 + DRAWS, seeds, betas) and the constant's distortion (1 + DRAWS,) over the texts drawn,
    first over all as they are, and what each seed weighs (1 + DRAWS, seeds)."""
    generator = np.random.default_rng(0)
    _, seeds, N = points.rate.shape
    counts = generator.multinomial(N, np.full(N, 1 / N), size=DRAWS)
    counts = np.concatenate([np.ones((1, N)), counts]) / N
    weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS)
    weights = np.concatenate([np.ones((1, seeds)), weights]) / seeds
    rate, distortion = (np.einsum("bsn,dn->dsb", x, counts, optimize=True) for x in (points.rate, points.distortion))
    return rate, distortion, counts @ points.constant, weights


def intervals(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of rate and distortion (2, betas) each: lower ends, upper ends."""
    rate, distortion, _, weights = resampled(points)
    means = np.stack([np.einsum("dsb,ds->db", x, weights)[1:] for x in (rate, distortion)])
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return low, high


def curves(points: Points, wanted: np.ndarray) -> np.ndarray:
    """(1 + DRAWS, m) distortion at the wanted rates (m,), a mean over seeds: first of all texts, then as resampled."""
    rate, distortion, constant, weights = resampled(points)
    out = [
        [at_rates(r, d, c, wanted) for r, d in zip(rs, ds, strict=True)]
        for rs, ds, c in zip(rate, distortion, constant, strict=True)
    ]
    return np.einsum("dsm,ds->dm", out, weights)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of draws (draws,)."""
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return low, high


def found(points: Points, entropy: float) -> bool:
    """Has a point less distortion than whoever knows the classes' frequencies alone? That has H(Y) at least, and what
    stands for it here, the training texts' frequencies, somewhat more: the interval of what a point gains on them,
    text by text, must lie above that surplus, by Bonferroni over the points."""
    _, distortion, constant, weights = resampled(points)
    gain = constant[1:, None] - np.einsum("dsb,ds->db", distortion, weights)[1:]
    surplus = max(0.0, float(points.constant.mean()) - entropy)
    return bool((np.quantile(gain, 0.025 / gain.shape[1], axis=0) > surplus).any())


def reach(points: Points) -> float:
    """The greatest rate up to which these points say what the distortion is: that of the seed that has the least."""
    return float(points.rate.mean(axis=2).max(axis=0).min())


def compared(first: Points, second: Points, rates: list[float], entropy: float, both: tuple[bool, bool]) -> dict:
    """Distortion of `first` less that of `second` at equal rates: at each of `rates` (nats), None at one that is out of
    reach of either, and as a mean over the rates from 0 to `up_to`, H(Y) or what both reach. A state of which nothing
    is found (`both` say) reaches all: its curve is the constant's, at no rate. With bootstrap intervals over texts,
    paired, and probe seeds; p is the bootstrap's, of no difference of that mean."""
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
