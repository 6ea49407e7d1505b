"""Tests intervals and tests against published figures and against calculations by hand."""

import math

import numpy as np
import pytest

from nanometa.common.statistics import (
    DECIDES,
    bits,
    bootstrap_ratio,
    brief,
    clustered_ratio,
    decide,
    holm,
    mcnemar,
    paired_difference,
    seed_difference,
    too_few,
    wilson,
)


def test_wilson_equals_newcombes_table():
    """Newcombe, Statistics in Medicine 17, 857 (1998), table I, method 3."""
    for (right, n), interval in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson(right, n) == pytest.approx(interval, abs=1e-4)
    assert wilson(0, 0) == (0, 1) and wilson(20, 20)[1] == 1


def table(both, only_first, only_second, neither):
    pairs = [(1, 1)] * both + [(1, 0)] * only_first + [(0, 1)] * only_second + [(0, 0)] * neither
    return (np.array(side, dtype=bool) for side in zip(*pairs, strict=True))


def test_paired_difference_equals_newcombes_table():
    """Newcombe, Statistics in Medicine 17, 2635 (1998), table II, method 10."""
    for cells, interval in {(36, 12, 2, 0): (0.0569, 0.3404), (36, 14, 0, 0): (0.1528, 0.4167)}.items():
        difference, low, high = paired_difference(*table(*cells))
        assert difference == pytest.approx((cells[1] - cells[2]) / sum(cells))
        assert (low, high) == pytest.approx(interval, abs=1e-4)
    # no pair differs, and still the interval has a width
    difference, low, high = paired_difference(*table(53, 0, 0, 1))
    assert difference == 0 and -0.1 < low == -high < -0.05


def test_mcnemar_counts_only_the_pairs_that_differ():
    assert mcnemar(*table(50, 10, 2, 38)) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(*table(0, 10, 2, 0)) == mcnemar(*table(50, 10, 2, 38))
    assert mcnemar(*table(5, 0, 0, 5)) == 1 and mcnemar(*table(1, 4, 4, 1)) == 1


def test_bootstrap_resamples_examples_not_single_ids():
    """For 40 examples of 25 ids that are all right or all wrong, the interval is that of 40 draws, not of 1000."""
    right = np.repeat([25, 0], 20)
    low, high = bootstrap_ratio(right, np.full(40, 25))
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.5 / math.sqrt(40), 0.5 + 1.96 * 0.5 / math.sqrt(40)), abs=0.03)
    assert bootstrap_ratio(right, np.full(40, 25)) == (low, high)


def test_clusters_of_equal_size_give_students_interval_of_their_means():
    means = np.array([1.0, 2.0, 4.0, 5.0])
    half = 3.18244631 * math.sqrt(10 / 3 / 4)
    assert clustered_ratio(7 * means, np.full(4, 7)) == pytest.approx((3 - half, 3 + half))
    assert clustered_ratio([3.0], [2]) == (-math.inf, math.inf)


def test_intervals_of_few_uneven_clusters_have_their_coverage():
    """For eight documents of 1 to 8 pieces, about 95 % of 2000 intervals contain the truth. The percentile bootstrap
    fails."""
    rng, sizes = np.random.default_rng(0), np.arange(1, 9)
    held = {clustered_ratio: 0, bootstrap_ratio: 0}
    for _ in range(2000):
        nats = sizes * (3 + rng.normal(size=8))
        for interval in held:
            low, high = interval(nats, sizes, **({"draws": 300} if interval is bootstrap_ratio else {}))
            held[interval] += low < 3 < high
    assert 0.92 < held[clustered_ratio] / 2000 < 0.97 and held[bootstrap_ratio] / 2000 < 0.89, held


def test_the_difference_between_arms_is_over_runs():
    mean, low, high = seed_difference([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert seed_difference([0.9], [0.1]) == (pytest.approx(0.8), -math.inf, math.inf)


def test_two_runs_or_clusters_have_a_finite_interval():
    """Student's t with one degree of freedom, whose 97.5 % quantile is 12.7062."""
    mean, low, high = seed_difference([0.6, 0.8], [0.5, 0.5])
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 12.7062 * 0.1, 0.2 + 12.7062 * 0.1), abs=1e-4)
    low, high = clustered_ratio([1.0, 3.0], [1, 1])
    assert (low, high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    assert clustered_ratio([1.0], [1]) == (-math.inf, math.inf)


def test_holm_equals_a_calculation_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1]) and holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "holm_p", "n", "verdict"),
    [
        (0.11, 0.2, 0.04, None, "holds"), (0.1, 0.2, 0.04, None, "undecided"),  # low must be above the effect
        (0.11, 0.2, 0.05, None, "undecided after Holm"), (0.11, 0.2, 0.049, None, "holds"),
        (-0.2, -0.11, 0.04, None, "the reverse holds"), (-0.2, -0.1, 0.04, None, "undecided"),
        (-0.2, -0.11, 0.05, None, "undecided after Holm"),
        (0.11, 0.15, 0.04, None, "holds, within the margin"), (0.11, 0.151, 0.04, None, "holds"),
        (-0.15, -0.11, 0.04, None, "the reverse holds, within the margin"),
        (-0.15, 0.15, 0.5, None, "does not hold"), (-0.151, 0.15, 0.5, None, "undecided"),
        (-0.15, 0.151, 0.5, None, "undecided"),
        (0.11, 0.2, 0.04, DECIDES, "holds"), (0.11, 0.2, 0.04, DECIDES - 1, "undecided: n = 999, 1000 decide"),
    ],
)  # fmt: skip
def test_a_verdict_at_each_of_its_borders(low, high, holm_p, n, verdict):
    assert decide(low, high, holm_p, effect=0.1, margin=0.15, n=n) == verdict
    assert brief(verdict) == verdict.split(":")[0]


def test_the_note_about_too_few_texts_names_their_numbers():
    assert too_few([{"n": DECIDES}]) == too_few([]) == ""
    assert too_few([{"n": 20}, {"n": DECIDES}]) == "There is no verdict for n = 20 texts: at least 1000 are needed."
    assert "n = 20 to 999 texts" in too_few([{"n": 999}, {"n": 20}, {"n": 50}])
    assert bits("0110").tolist() == [False, True, True, False]
