"""Tests the section of a report about LongPPL."""

import pytest

from nanometa.common.statistics import clustered_ratio
from nanometa.reports import longppl
from tests.test_report import line as task_line
from tests.test_report_sections import cells_of, rendered

FIGURES = {
    "dataset": "data/x", "content_sha256": "c" * 64, "text_sha256": "d" * 64, "evaluator": "out/judge/step_00000100",
    "evaluator_arm": "gpt2 + rope", "evaluator_sha256": "e" * 64, "length": 461, "short_length": 128,
    "short_stride": 32, "alpha": 2.0, "beta": -2.0, "pieces": 40, "documents": 9, "tokens": 18400,
    "perplexity": 12.345, "perplexity_interval": [11.5, 13.25], "bits_per_byte": 1.125, "candidates": 12000,
    "keys": 60, "share": 0.005, "key_tokens": 50, "longppl": 4.5, "longppl_interval": [3.25, 6.0],
    "key_bits_per_byte": 0.75, "key_median_lsd": 2.625, "document_key_nats": [30.0, 45.25],
    "document_key_tokens": [20, 30], "document_numbers": [0, 4],
}  # fmt: skip
NONE = {
    "alpha": 9.0, "keys": 0, "share": 0.0, "key_tokens": 0, "longppl": None, "longppl_interval": None,
    "key_bits_per_byte": None, "key_median_lsd": None, "document_key_nats": [], "document_key_tokens": [],
    "document_numbers": [],
}  # fmt: skip


def line(**other) -> dict:
    facts = {name: value for name, value in task_line().items() if name not in ("floors", "outcomes", "n")}
    return {**facts, "eval": "longppl", **FIGURES, **other}


def test_the_page_shows_every_line_and_the_difference_to_the_first():
    other = {"run": "second", "weights_sha256": "b" * 64}
    lines = [
        line(), line(**other, document_key_nats=[10.0, 35.25], longppl=3.5), line(**NONE), line(**other, **NONE),
        line(run="third", weights_sha256="f" * 64, content_sha256="g" * 64, longppl=7.25),
    ]  # fmt: skip
    files = rendered({"longppl": lines})
    assert files["longppl_1.png"].startswith(b"\x89PNG")
    rows = cells_of(files["report.html"])
    first = ("12.345", "11.500 .. 13.250", "1.1250", "50", "4.500", "3.250 .. 6.000", "0.7500", "60", "0.50", "2.62")
    assert first in {row[2:12] for row in rows}
    low, high = clustered_ratio([-20, -10], [20, 30])
    (second,) = [row for row in rows if row[:1] == ("second",) and "3.500" in row]
    assert second[9] == f"-0.6000 ({low:+.4f} .. {high:+.4f})"
    assert sum(row[6:7] == ("no key token",) for row in rows) == 2
    (third,) = [row for row in rows if row[:1] == ("third",) and "12.345" in row]
    assert third[6] == "7.250" and third[9] == "60"  # with other tokens there is no difference
    heads = [row[0] for row in rows if row and row[0].startswith("alpha ")]
    assert [head.split(";")[0] for head in heads] == ["alpha 2, beta -2", "alpha 9, beta -2"]


@pytest.mark.parametrize(
    "change",
    [
        {"longppl": None}, {"longppl_interval": [1]}, {"perplexity": "12"}, {"key_tokens": 51},
        {"document_key_nats": [1.0]}, {"document_key_tokens": [50, 0]}, {"document_numbers": ["0", 4]},
        {"document_key_nats": [1.0, "x"]}, {"share": float("1e999")}, {"evaluator": None}, {"keys": None},
    ],
)  # fmt: skip
def test_a_damaged_line_is_refused(change):
    longppl.check(line())
    longppl.check(line(**NONE, perplexity_interval=None))
    with pytest.raises(ValueError, match="."):
        longppl.check(line(**change))
