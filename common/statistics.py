"""Computes confidence intervals and significance tests for the results of evaluations and probes.

The paper reports accuracies from 18 to 114 examples, which mean little without an interval."""

import math

import numpy as np
from scipy import stats

DECIDES = 1000  # with fewer texts no verdict is given


def wilson(right: int, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion, `right` out of n (Wilson, JASA 22, 1927), or (0, 1) if n = 0."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_ratio(
    numerators: np.ndarray, denominators: np.ndarray, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of sum(numerators) / sum(denominators), resampling examples.

    numerators, denominators: (N,), one entry per example, such as the correct tokens and all tokens of its answer.
    The tokens of one answer are not independent, therefore whole examples are resampled."""
    pick = np.random.default_rng(seed).integers(len(numerators), size=(draws, len(numerators)))
    ratios = np.asarray(numerators)[pick].sum(axis=1) / np.asarray(denominators)[pick].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
    return low, high


def bootstrap_means(values: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 95 % percentile bootstrap intervals of the column means, low and high (K,), resampling rows.

    values: (N, K), one row per example, NaN where an example has no value."""
    N, rng = len(values), np.random.default_rng(seed)
    there = ~np.isnan(values)
    filled, counted, means = np.where(there, values, 0), there.astype(float), np.empty((draws, values.shape[1]))
    for draw in range(draws):
        times = np.bincount(rng.integers(N, size=N), minlength=N).astype(float)  # how often each example is drawn
        with np.errstate(invalid="ignore"):  # a resample without any value has no mean
            means[draw] = (times @ filled) / (times @ counted)
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    return low, high


def mean_p(values: np.ndarray) -> float:
    """Returns the two-sided p value of Student's t-test that the mean of values (N,) is 0.

    If all values are equal, p is 1 if they are 0, and otherwise 0."""
    if np.ptp(values) == 0:
        return float(values[0] == 0)
    return float(stats.ttest_1samp(values, 0).pvalue)


def clustered_ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of sum(numerators) / sum(denominators) over clusters.

    numerators, denominators: (G,), such as the nats and tokens of each document. The interval uses Student's t with
    G - 1 degrees of freedom and the standard error of a ratio estimator (Cochran, Sampling Techniques, section 6.4). It
    is infinite for one cluster. A percentile bootstrap would be too narrow for as few as ten clusters."""
    numerators, denominators, G = np.asarray(numerators, float), np.asarray(denominators, float), len(numerators)
    ratio = numerators.sum() / denominators.sum()
    if G < 2:
        return -math.inf, math.inf
    squares = float(((numerators - ratio * denominators) ** 2).sum())
    half = float(stats.t.ppf(0.975, G - 1)) * math.sqrt(squares * G / (G - 1)) / float(denominators.sum())
    return float(ratio) - half, float(ratio) + half


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the two-sided p value of McNemar's exact test of two conditions on the same examples, (N,) bool each.

    The null hypothesis: among the examples that exactly one condition gets right, each condition has a share of 1/2."""
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    return float(stats.binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Returns the difference of two proportions over the same examples, (N,) bool each, and its 95 % interval.

    The interval is method 10 of Newcombe, Statistics in Medicine 17, 1998, which is also sound near 0 and 1."""
    n = len(first)
    both, only_first, only_second = (int(x.sum()) for x in (first & second, first & ~second, ~first & second))
    neither = n - both - only_first - only_second
    k1, k2 = both + only_first, both + only_second
    p1, p2, (low1, high1), (low2, high2) = k1 / n, k2 / n, wilson(k1, n), wilson(k2, n)
    margins, phi = k1 * (n - k1) * k2 * (n - k2), 0.0
    if margins:
        cross = both * neither - only_first * only_second
        phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(margins)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return p1 - p2, p1 - p2 - reach(p1 - low1, high2 - p2), p1 - p2 + reach(high1 - p1, p2 - low2)


def seed_difference(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Returns the mean of first - second over paired seeds and its 95 % interval by Student's t.

    The interval is infinite for one pair."""
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def holm(p_values: list[float]) -> list[float]:
    """Returns p values adjusted for multiple tests (Holm, Scandinavian Journal of Statistics 6, 1979), in order."""
    order, out, most = sorted(range(len(p_values)), key=p_values.__getitem__), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = most
    return out


def bits(outcomes: str) -> np.ndarray:
    """Returns the outcomes of N texts as (N,) bool. JSON lines store them as a string such as 0110."""
    return np.frombuffer(outcomes.encode(), np.uint8) == ord("1")


def brief(verdict: str) -> str:
    """Returns a verdict without its reason, for a table row. `too_few` states the reason once, below the table."""
    return verdict.partition(":")[0]


def too_few(lines: list[dict]) -> str:
    """Returns the note below a table for the lines that have too few texts for a verdict, or "" if there are none."""
    few = sorted({line["n"] for line in lines if line["n"] < DECIDES})
    if not few:
        return ""
    told = f"{few[0]} to {few[-1]}" if len(few) > 1 else f"{few[0]}"
    return f"There is no verdict for n = {told} texts: at least {DECIDES} are needed."


def decide(low: float, high: float, holm_p: float, effect: float, margin: float, n: int | None = None) -> str:
    """Returns the verdict on the claim "the first is better than the second by more than `effect`".

    low, high: the interval of first - second; holm_p: the p value after Holm's correction. The claim holds if
    low > effect, its reverse holds if high < -effect, both only if holm_p < 0.05. It does not hold if the interval
    lies within +-margin. Otherwise, and with n below DECIDES texts, it is undecided."""
    if n is not None and n < DECIDES:
        return f"undecided: n = {n}, {DECIDES} decide"
    inside = -margin <= low and high <= margin
    if low > effect or high < -effect:
        if holm_p >= 0.05:
            return "undecided after Holm"
        claim = "holds" if low > effect else "the reverse holds"
        return f"{claim}, within the margin" if inside else claim
    return "does not hold" if inside else "undecided"
