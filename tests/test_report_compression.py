"""Tests the section of a report about forgotten context."""

import pytest

from nanometa.reports import compression
from tests.test_report import line as task_line
from tests.test_report_sections import cells_of, rendered

BITS = {"bits_per_byte": 1.25, "interval": [1.2, 1.3], "windows": 64, "realised": 0.5, "cache": 0.7}
RECALL = {"size": 4, "n": 200, "exact": 0.5, "interval": [0.43, 0.57], "token_accuracy": 0.75}
TEXT = {"n": 200, "agreement": 0.5, "f1_full": 0.75, "rouge_full": 0.625, "f1_text": 0.125, "loss_text": 2.5}


def line(measure: str, method: str, ratio: float | None, figures: dict, **other) -> dict:
    facts = {name: value for name, value in task_line().items() if name not in ("floors", "outcomes", "n")}
    own = {"eval": "compression", "measure": measure, "method": method, "ratio": ratio, "dataset": "data/x"}
    return {**facts, **own, **figures, **other}


@pytest.mark.parametrize("arms", [("sr",), ("sr", "clcr")])
def test_the_page_shows_all_measures(arms):
    lines = [
        line(measure, method, ratio, figures, arm=arm, run=arm)
        for arm in arms
        for measure, figures in (("bits", BITS), ("recall", RECALL), ("continuation", TEXT))
        for method, ratio in (("trained", 0.5), ("full", None))
    ]
    lines.append(line("bits", "window", 0.5, {"impossible": "too long"}))
    files = rendered({"compression": lines})
    rows = cells_of(files["report.html"])
    assert ("full", "50.0", "70.0", "1.2500", "1.2000 .. 1.3000", "64") in {row[:6] for row in rows}
    assert ("trained", "0.5", "4", "50.0", "43.0 .. 57.0", "75.0", "200") in {row[:7] for row in rows}
    assert ("trained", "0.5", "50.0", "0.750", "0.625", "0.125", "2.5000", "200") in {row[:8] for row in rows}
    assert files["compression_1.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change",
    [
        {"measure": "speed"},
        {"interval": [1]},
        {"realised": "half"},
        {"ratio": "0.5"},
        {"windows": 1.5},
        {"cache": 1e999},
    ],
)
def test_a_damaged_line_is_refused(change):
    good = line("bits", "trained", 0.5, BITS)
    compression.check(good)
    with pytest.raises(ValueError, match="."):
        compression.check({**good, **change})
