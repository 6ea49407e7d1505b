"""Compares arms on the same texts. Texts can tell two checkpoints apart, but only seeds can tell two arms apart."""

import itertools
from dataclasses import dataclass, replace

from scipy import stats as distributions

from nanometa.common.statistics import bits, decide, holm, mcnemar, paired_difference, seed_difference
from nanometa.reports.lines import Arm, Panel, order

SEEDS = 5  # with fewer seeds there is no verdict on arms


@dataclass(frozen=True)
class Difference:
    """The difference of two arms in one cell, first minus second, as a share, or the reason why they were not
    compared."""

    first: Arm
    second: Arm
    panel: Panel
    length: int
    seeds: tuple[int, ...]
    refused: str = ""
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0
    p: float | None = None
    holm: float | None = None
    verdict: str = ""


def pairs(arms: list[Arm]) -> list[tuple[Arm, Arm, Panel, int]]:
    """Returns all pairs of arms with the same training, each with a cell that both have, in the order of the cells."""
    found = [
        (first, second, panel, length)
        for first, second in itertools.combinations(arms, 2)
        if first.training == second.training
        for panel, length in first.lines
        if (panel, length) in second.lines
    ]
    return sorted(found, key=lambda row: (order(row[2]), row[0].training.length, row[3]))


def unequal(first: dict, second: dict) -> str:
    """Returns the reason why two lines are not about the same texts, or "" if they are."""
    for name in ("n", "tokens_per_item"):
        if first[name] != second[name]:
            return f"{name} {first[name]:g} against {second[name]:g}"
    # the shares of shortcuts depend only on the texts
    return "" if first["floors"] == second["floors"] else "the texts differ, because the shortcuts' shares differ"


def between_checkpoints(arms: list[Arm]) -> list[Difference]:
    """Compares runs of the same seed on the same texts by McNemar's test and Newcombe's interval, with Holm's
    correction over all comparisons."""
    rows = []
    for first, second, panel, length in pairs(arms):
        mine, yours = first.lines[panel, length], second.lines[panel, length]
        shared = sorted(mine.keys() & yours.keys())
        if not shared:
            rows.append(Difference(first, second, panel, length, (), "no seed in common"))
        for seed in shared:
            row = Difference(first, second, panel, length, (seed,))
            if why := _refusal(first, second, mine[seed], yours[seed]):
                rows.append(replace(row, refused=why))
                continue
            right = [bits(line["outcomes"]) for line in (mine[seed], yours[seed])]
            mean, low, high = paired_difference(*right)
            undecided = "undecided: 1 seed"  # McNemar's test is about these two checkpoints only
            rows.append(replace(row, mean=mean, low=low, high=high, p=mcnemar(*right), verdict=undecided))
    return _adjusted(rows)


def between_arms(arms: list[Arm], effect: float, margin: float) -> list[Difference]:
    """Compares arms in cells with two or more shared seeds by Student's t over the seeds, and adds a verdict. Holm's
    family is all cells with enough seeds to decide."""
    rows = []
    for first, second, panel, length in pairs(arms):
        mine, yours = first.lines[panel, length], second.lines[panel, length]
        shared = tuple(sorted(mine.keys() & yours.keys()))
        if len(shared) < 2:
            continue
        row = Difference(first, second, panel, length, shared)
        if why := next(filter(None, (_refusal(first, second, mine[seed], yours[seed]) for seed in shared)), ""):
            rows.append(replace(row, refused=why))
            continue
        exact = [[of[seed]["exact"] for seed in shared] for of in (mine, yours)]
        mean, low, high = seed_difference(*exact)
        p = beyond(mean, high - mean, effect, len(shared)) if len(shared) >= SEEDS else None
        rows.append(replace(row, mean=mean, low=low, high=high, p=p))
    return [replace(row, verdict=verdict(row, effect, margin)) for row in _adjusted(rows)]


def _refusal(first: Arm, second: Arm, mine: dict, yours: dict) -> str:
    cannot = [arm.label for arm, line in ((first, mine), (second, yours)) if "impossible" in line]
    return f"impossible for {' and '.join(cannot)}" if cannot else unequal(mine, yours)


def _adjusted(rows: list[Difference]) -> list[Difference]:
    """Returns the rows with Holm's p, whose family is all rows that have a p."""
    adjusted = iter(holm([row.p for row in rows if row.p is not None]))
    return [row if row.p is None else replace(row, holm=next(adjusted)) for row in rows]


def beyond(mean: float, half: float, effect: float, seeds: int) -> float:
    """Returns the p that belongs to the interval mean +- half over seeds. It is below 0.05 if and only if the interval
    lies beyond +-effect."""
    if abs(mean) <= effect:
        return 1.0
    if half == 0:
        return 0.0
    t = (abs(mean) - effect) / half * distributions.t.ppf(0.975, seeds - 1)
    return min(1.0, 2 * float(distributions.t.sf(t, seeds - 1)))


def verdict(row: Difference, effect: float, margin: float) -> str:
    """Returns the verdict of common.statistics.decide if there are enough seeds."""
    if row.refused:
        return "not compared"
    if row.holm is None:
        return f"undecided: {len(row.seeds)} seeds, but at least {SEEDS} are needed"
    return decide(row.low, row.high, row.holm, effect, margin)
