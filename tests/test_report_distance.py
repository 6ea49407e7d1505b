"""Tests the tables of the loss by distance since the last marker: pairs are subtracted over the same blocks only."""

import numpy as np
import pytest

from nanometa.common.statistics import clustered_ratio
from nanometa.evals.blocks import DISTANCES
from nanometa.reports import depth, distance
from tests.test_report import line as task_line
from tests.test_report_sections import cells_of, rendered


def line(arm: str, shift: float = 0.0, draw: int = 0, blocks: int = 4, **other) -> dict:
    """Returns a line of eval.py perplexity whose loss in bin i is 2 + i + shift, up to a noise that all runs share."""
    rng = np.random.default_rng(draw)
    facts = task_line(arm=arm)
    tokens = {name: rng.integers(5, 20, size=(blocks, bins)) for name, bins in (("distance", 9), ("position", 2))}
    sums = {}
    for name, n in tokens.items():
        noise = rng.normal(size=n.shape)
        sums[f"block_{name}"] = {"nats": (n * (2 + np.arange(n.shape[1]) + shift) + noise).tolist(),
                                 "tokens": n.tolist()}  # fmt: skip
    own = {"eval": "perplexity", "length": 96, "window": 96, "stride": 96, "bucket": 64, "markers": "trained",
           "draw": draw, "loss": 2.5, "bits_per_byte": 1.5, "perplexity": 12.0, "tokens": 100, "dataset": "data/x",
           "content_sha256": "a" * 64, "target_rule": "ignore", **sums}  # fmt: skip
    return {**{name: facts[name] for name in facts if name not in ("floors", "outcomes", "n")}, **own, **other}


def test_differences_are_paired_over_blocks_and_draws():
    first, second = (
        [line(arm, shift, draw) for draw in (0, 1)] for arm, shift in (("meta + rope", 0.25), ("pause", 0))
    )
    found = distance.paired(first, second, "distance")
    assert len(found) == 1 + len(DISTANCES)
    for mean, low, high in found:  # the noise is the same in both, so that the difference has none
        assert (mean, low, high) == pytest.approx((0.25, 0.25, 0.25))
    mine, theirs = (
        [of[0] | {"block_distance": {"nats": [[3.0], [4.0]], "tokens": [[1], [2]]}}] for of in (first, second)
    )
    mine[0]["block_distance"] = {"nats": [[3.5], [4.0]], "tokens": [[1], [2]]}
    expected = (0.5 / 3, *clustered_ratio(np.array([0.5, 0]), np.array([1, 2])))
    assert distance.paired(mine, theirs, "distance") == [pytest.approx(expected)]


def test_runs_with_other_tokens_are_not_subtracted():
    assert distance.paired([line("meta")], [line("pause", blocks=5)], "distance") is None
    assert distance.paired([line("meta")], [line("pause", draw=1)], "distance") is None
    assert distance.paired([line("meta", blocks=1)], [line("pause", blocks=1)], "position") == [None, None]


def test_the_page_shows_means_and_differences():
    lines = [
        line("meta + rope"),
        line("pause + rope", 0.5),
        line("gpt2 + rope", blocks=3),
        line("meta + rope", length=99),
    ]
    rows = cells_of(rendered({"perplexity": lines})["report.html"])
    (head,) = {row for row in rows if row[:2] == ("arm", "run") and "33+" in row}
    assert head[3:-1] == ("at a marker", "1", "2", "3–4", "5–8", "9–16", "17–32", "33+", "before the first")
    assert ("arm", "run", "figure", "0–63", "64–95", "command") in rows
    differences = [row for row in rows if len(row) > 2 and row[2] == "minus meta + rope"]
    assert len(differences) == 2 and all(row[0] == "pause + rope" for row in differences)
    assert all(cell == "+0.5000 (+0.5000 .. +0.5000)" for row in differences for cell in row[3:])


@pytest.mark.parametrize(
    ("sums", "why"),
    [
        (3, "block_distance is not a table of nats"),
        ({"nats": [[1.0]]}, "block_distance is not a table of tokens"),
        ({"nats": [[1.0]], "tokens": [[1, 2]]}, "nats and tokens of different shapes"),
        ({"nats": [[1.0], [1.0, 2.0]], "tokens": [[1], [1, 2]]}, "nats and tokens of different shapes"),
        ({"nats": [["x"]], "tokens": [[1]]}, "has nats that are no numbers"),
        ({"nats": [[1.0]], "tokens": [[1]]}, "does not have one column for each bin"),
        ({"nats": [[1.0] * 9], "tokens": [[-1] * 9]}, "has tokens that are no counts"),
    ],
)
def test_damaged_sums_are_refused(sums, why):
    depth.check(line("meta"))
    depth.check({name: value for name, value in line("meta").items() if not name.startswith("block_")})
    with pytest.raises(ValueError, match=why):
        depth.check(line("meta", block_distance=sums))
