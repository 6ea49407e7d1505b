"""Tests which states of a checkpoint are taken for those of train.py."""

import copy

import pytest

from nanometa.training.state import check_state

STATE = {
    "step": 3,
    "best": {"step": 2, "loss": 1.5, "bits_per_byte": 2.5},
    "evaluated": 2,
    "guard": {"norms": [1.0, 2.0], "in_a_row": 0, "skipped": 0},
    "origin": "scratch",
    "content_before": 0,
    "config": {},
    "data": {
        "dataset": "data/x", "injection": "uniform", "chunk_content": 28, "chunk_markers": 4, "tokenizer": "",
        "shards": {"train_000000.bin": "0"}, "content_sha256": {},
    },
}  # fmt: skip


EVALUATION = {"step": 3, "windows": 5, "eval_s": 0.5, "figures": {"loss": 1.5, "bits_per_byte": 2.5, "tokens": 7}}


def test_a_state_of_this_version_and_of_earlier_ones_is_taken():
    check_state(STATE)
    check_state({key: value for key, value in STATE.items() if key not in ("evaluated", "guard", "content_before")})
    check_state({**STATE, "best": None, "evaluated": None, "stop_at": None})
    check_state({**STATE, "evaluation": None}), check_state({**STATE, "evaluation": EVALUATION})
    for end in (5, None):
        check_state({**STATE, "stop_at": {"step": 2, "exact": 0.5, "end": end}})


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("step", -1), ("step", True), ("step", 2**63), ("step", 1.0), ("best", []), ("best", {"step": 1}),
        ("best.loss", float("nan")), ("best.loss", float("inf")), ("best.loss", -1e-300), ("best.bits_per_byte", "1"),
        ("guard.norms", [1e308] * 100), ("guard.norms", "12"), ("guard.norms", None), ("guard.skipped", None),
        ("stop_at", 3), ("stop_at", {"step": 2}), ("stop_at", {"step": 2, "exact": 1, "end": 3}),
        ("stop_at", {"step": 2, "exact": 0.5, "end": -1}), ("stop_at", {"step": 2, "exact": 0.5, "end": 2.0}),
        ("evaluation", 3), ("evaluation", {"step": 2, "windows": 5, "eval_s": 0.5}),
        ("evaluation", EVALUATION | {"step": -1}),
        ("evaluation", EVALUATION | {"figures": {"loss": None, "bits_per_byte": 1.0}}),
        ("guard", []), ("origin", 3), ("config", None), ("data", []), ("data.shards", {"a": 1}), ("data.shards", None),
        ("data.injection", "none"), ("data.chunk_content", 0), ("data.chunk_markers", 2**21), ("data.tokenizer", None),
    ],
)  # fmt: skip
def test_a_value_that_training_could_not_use_is_refused(where, value):
    state = copy.deepcopy(STATE)
    *holders, name = where.split(".")
    holder = state
    for key in holders:
        holder = holder[key]
    holder[name] = value
    with pytest.raises((KeyError, TypeError, AttributeError, ValueError)):
        check_state(state)
