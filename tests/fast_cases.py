"""Chooses the cases of a parametrized test that run in the fast tests. The others are marked slow.

Which cases are chosen depends on their order alone, so a new value of a list gets its share of fast cases by itself."""

import itertools

import pytest


def slow(case):
    """Returns a case that runs in the slow tests only."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)


def every(n: int, cases) -> list:
    """Returns all cases; the first one and every n-th after it are fast."""
    return [case if number % n == 0 else slow(case) for number, case in enumerate(cases)]


def diagonal(first, *others) -> list[tuple]:
    """Returns the product of lists; every value of the first list has one fast case, in which the others take turns.

    Values that are tuples are joined: diagonal([("a", 1)], "xy") has the cases ("a", 1, "x") and ("a", 1, "y")."""
    rows, found = list(itertools.product(*others)), []
    for number, value in enumerate(first):
        own = value if isinstance(value, tuple) else (value,)
        found += [(*own, *row) if at == number % len(rows) else slow((*own, *row)) for at, row in enumerate(rows)]
    return found
