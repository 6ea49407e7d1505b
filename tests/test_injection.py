import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.common.keyed_random import Draws, permute, stable_key, uniform_bits
from nanometa.data.inject import inject, marker_places, strip

META = 99


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["uniform", "periodic", "none"]),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 6),
    st.integers(0, 2**63),
)
def test_stripping_the_markers_restores_the_content(injection, C, M, n_chunks, key):
    M = 0 if injection == "none" else M
    content = np.arange(n_chunks * C, dtype=np.uint32).reshape(n_chunks, C) % 90
    places = marker_places(injection, 7, n_chunks, C, M, key)
    tokens = inject(content, places, META)
    assert tokens.shape == (n_chunks, C + M) and (places.sum(1) == M).all()
    assert ((tokens == META) == places).all()
    assert (strip(tokens, META) == content.reshape(-1)).all()


@given(st.integers(0, 50), st.integers(1, 20), st.integers(0, 2**63))
def test_a_chunk_does_not_depend_on_the_chunks_computed_with_it(first, n_chunks, key):
    together = marker_places("uniform", first, n_chunks, 9, 4, key)
    alone = np.concatenate([marker_places("uniform", first + i, 1, 9, 4, key) for i in range(n_chunks)])
    assert (together == alone).all()


def chi_square(counts, expected):
    return float((((counts - expected) ** 2) / expected).sum())


def test_each_place_of_a_marker_is_equally_likely():
    """Chi-square of 922 + 102 places over 20,000 chunks, with 1023 degrees of freedom, within 5 standard deviations.

    Drawing M of n without replacement reduces the variance by the factor (n - M) / (n - 1).
    """
    C, M, chunks = 922, 102, 20_000
    counts = marker_places("uniform", 0, chunks, C, M, stable_key("chi")).sum(0)
    n = C + M
    statistic = chi_square(counts, chunks * M / n) / ((n - M) / (n - 1))
    assert abs(statistic - (n - 1)) < 5 * np.sqrt(2 * (n - 1))


def test_each_set_of_marker_places_is_equally_likely():
    """Chi-square of all 20 sets of 3 of 6 places (19 degrees of freedom; beyond 67, p is below 1e-6)."""
    places = marker_places("uniform", 0, 40_000, 3, 3, stable_key("sets"))
    sets = list(itertools.combinations(range(6), 3))
    codes = (places * 2 ** np.arange(6)).sum(1)
    counts = np.array([(codes == sum(2**i for i in chosen)).sum() for chosen in sets])
    assert counts.sum() == 40_000 and chi_square(counts, 2000.0) < 67


def test_other_keys_and_chunks_give_other_places():
    draws = [marker_places("uniform", first, 1, 50, 10, key).tobytes() for first in range(5) for key in (1, 2)]
    assert len(set(draws)) == 10


def test_periodic_markers_are_evenly_spaced():
    for C, M in ((922, 102), (461, 51), (7, 3), (1, 5)):
        where = np.flatnonzero(marker_places("periodic", 3, 1, C, M, 0)[0])
        gaps = np.diff(np.concatenate([[-1], where]))
        assert len(where) == M and where[-1] == C + M - 1 and gaps.max() - gaps.min() <= 1


def test_impossible_rules_are_refused():
    with pytest.raises(ValueError, match="no markers"):
        marker_places("none", 0, 1, 5, 2, 0)
    with pytest.raises(ValueError, match="unknown"):
        marker_places("sometimes", 0, 1, 5, 2, 0)


def splitmix64(seed: int, n: int) -> list[int]:
    """Implements the generator as its authors publish it, with Python's integers."""
    out, state = [], seed
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        out.append(z ^ (z >> 31))
    return out


@given(st.integers(0, 2**64 - 1))
def test_random_bits_equal_splitmix64(seed):
    assert uniform_bits(seed, np.arange(10)).tolist() == splitmix64(seed, 10)


def test_splitmix64_gives_the_published_outputs():
    """The first outputs for seed 1234567, as published with the reference implementation."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    image = permute(np.arange(n), n, key)
    assert sorted(image.tolist()) == list(range(n))
    some = np.array([0, n // 2, n - 1])
    assert (permute(some, n, key) == image[some]).all()


def test_permutations_are_uniform():
    """Every element reaches every place equally often: 12 x 12 cells over 6000 keys."""
    n, keys = 12, 6000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, stable_key(key))] += 1
    # (n - 1)^2 = 121 degrees of freedom; the bound is 5 standard deviations
    assert abs(chi_square(counts, keys / n) * (n - 1) / n - 121) < 5 * np.sqrt(2 * 121)


def test_draws_reach_both_ends_of_their_range():
    draws = Draws(stable_key("ends"))
    assert {draws.between(3, 6) for _ in range(200)} == {3, 4, 5, 6} and draws.between(7, 7) == 7
    assert {draws.below(3) for _ in range(200)} == {0, 1, 2} and draws.below(1) == 0
    assert {draws.choice("abc") for _ in range(200)} == {"a", "b", "c"}
    samples = [draws.sample(range(4), 2) for _ in range(500)]
    assert {tuple(of) for of in samples} == {(a, b) for a in range(4) for b in range(4) if a != b}
    assert sorted(draws.sample("abc", 3)) == ["a", "b", "c"] and draws.sample("abc", 0) == []
    with pytest.raises(ValueError, match="cannot draw 4 of 3 options without replacement"):
        draws.sample("abc", 4)


def test_draws_continue_beyond_their_first_block_of_bits():
    """The bits are made 256 at a time, and number i is output i of the generator."""
    draws, bits = Draws(5), uniform_bits(5, np.arange(600)).tolist()
    assert [draws.below(2**64) for _ in range(600)] == bits
