"""Compares layouts and batches with a reference of plain loops, and tests which positions are connected."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.config import GPTConfig, TrainConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.data.layout import (
    IGNORE,
    Draw,
    batch_of,
    connected_positions,
    draw_of,
    layout_of,
    places_of,
    random_positions,
    targets_of,
)
from tests.reference import batches as reference

MARKER, PAD = 99, 77


@st.composite
def marked_texts(draw):
    """Draws texts of unequal length, whose content ids are 1, 2, ..., so that an id identifies its token."""
    texts = []
    for _ in range(draw(st.integers(1, 4))):
        is_marker = draw(st.lists(st.booleans(), max_size=11))
        is_marker.insert(draw(st.integers(0, len(is_marker))), False)  # at least one content token
        numbers = np.cumsum(~np.array(is_marker))
        texts.append([MARKER if there else int(n) for there, n in zip(is_marker, numbers, strict=True)])
    return texts


def rounded(most: int, multiple: int, T: int) -> int:
    while most % multiple:
        most += 1
    return min(most, T)


@settings(max_examples=300, deadline=None)
@given(
    marked_texts(), st.sampled_from(["ignore", "skip"]), st.integers(0, 4), st.integers(1, 5), st.booleans(), st.data()
)
def test_a_batch_equals_the_reference(texts, rule, padding, multiple, random, data):
    T = max(map(len, texts)) + padding
    counted = [data.draw(st.sets(st.integers(1, 12))) for _ in texts]
    numbers = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=len(texts), max_size=len(texts))))
    draw = Draw(0.3, 5, "val") if random else None
    layouts = [layout_of(np.array(text), MARKER, width=T, pad=PAD) for text in texts]
    masks = [np.isin(layout.tokens, list(ids)) for layout, ids in zip(layouts, counted, strict=True)]
    targets = [targets_of(layout, rule, mask) for layout, mask in zip(layouts, masks, strict=True)]
    scored = [int((row != IGNORE).sum()) for row in targets]
    fixed = data.draw(st.none() | st.integers(max(scored), T))
    meta_index = connected_positions(layouts, MARKER, numbers, draw, multiple)
    ours = batch_of(layouts, targets, meta_index, fixed, multiple)

    connected = [[place for place, token in enumerate(text) if token == MARKER] for text in texts]
    meta_width = rounded(max(map(len, connected)), multiple, T)
    if random:
        connected = [random_positions(np.array([number]), T, *draw)[0].tolist() for number in numbers]
        meta_width = len(connected[0])
    scored_width = rounded(max(scored), multiple, T) if fixed is None else fixed
    expected = reference.batch(texts, MARKER, rule, T, PAD, connected, meta_width, scored_width, counted)
    for name, rows in expected.items():
        field = getattr(ours, name)
        assert field.dtype == torch.int64 and field.shape == (len(texts), len(rows[0])) and field.tolist() == rows, name


@settings(max_examples=100, deadline=None)
@given(marked_texts(), st.integers(0, 50), st.integers(0, 3))
def test_a_layout_numbers_only_its_content_tokens(texts, first, padding):
    text = texts[0]
    layout, number = layout_of(np.array(text), MARKER, first, len(text) + padding, PAD), first
    for place, token in enumerate(text + [PAD] * padding):
        is_content = place < len(text) and token != MARKER
        assert (layout.tokens[place], layout.positions[place]) == (token, place)
        assert layout.content[place] == (number if is_content else -1)
        number += is_content


def test_targets_follow_the_rule_and_an_unknown_rule_is_refused():
    layout = layout_of(np.array([1, MARKER, 2, 3]), MARKER)
    assert targets_of(layout, "ignore").tolist() == [IGNORE, 2, 3, IGNORE]
    assert targets_of(layout, "skip").tolist() == [2, IGNORE, 3, IGNORE]
    # in the middle of a stream, another content token precedes the first one
    assert targets_of(layout_of(np.array([MARKER, 7]), MARKER, first=3), "ignore").tolist() == [7, IGNORE]
    assert targets_of(layout_of(np.array([MARKER, 7]), MARKER), "ignore").tolist() == [IGNORE, IGNORE]
    with pytest.raises(ValueError, match="unknown target rule 'next'"):
        targets_of(layout, "next")


def test_an_index_that_is_too_narrow_is_refused():
    with pytest.raises(ValueError, match="a row has 2 positions, more than the 1"):
        places_of(np.array([[True, False, True]]), 1)


@pytest.mark.parametrize("second", SECOND_ATTENTIONS)
def test_only_the_random_arm_draws_positions(second):
    cfg = TrainConfig(model=GPTConfig(second_attention=second, random_fraction=0.2), seed=8)
    assert draw_of(cfg, "val") == (Draw(0.2, 8, "val") if second == "random" else None)
