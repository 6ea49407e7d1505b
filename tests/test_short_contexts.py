"""Tests the windows of short contexts against loops over positions, and against texts that are read alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanometa.data.layout import FOREVER
from nanometa.layers.short_contexts import cut_windows, short_contexts, short_states, states_of


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_every_position_has_one_state_with_a_context_of_the_promised_length(T, length, stride, whole):
    stride, length = sorted((1 + stride % T, 1 + length % T))
    contexts = short_contexts(T, length, stride, whole)
    starts = contexts.starts.tolist()
    assert starts == sorted(starts) and all(0 <= start <= T - length for start in starts)
    assert len(contexts.state) == T - contexts.first and contexts.first == (0 if whole else length)
    for position, state in zip(range(contexts.first, T), contexts.state.tolist(), strict=True):
        window, offset = divmod(state, length)
        assert starts[window] + offset == position
        if position >= length:
            assert length - stride <= offset < length
            if starts[window] < T - length:  # only the last window may end before a whole stride
                assert starts[window] % stride == 0
        else:
            assert window == 0 and starts[0] == 0


@pytest.mark.parametrize("T,length,stride", [(5, 6, 1), (5, 3, 4), (5, 3, 0)])
def test_impossible_windows_are_refused(T, length, stride):
    with pytest.raises(ValueError, match="do not satisfy"):
        short_contexts(T, length, stride)


def test_a_cut_window_is_the_text_read_alone():
    """The reference walks over the positions of every window."""
    rng = np.random.default_rng(0)
    B, T, K = 2, 11, 4
    tokens = torch.from_numpy(rng.integers(0, 9, (B, T)))
    positions = torch.arange(T).expand(B, T).clone()
    meta_index = torch.tensor([[1, 5, 6], [3, T, T]])
    reads_from = torch.from_numpy(rng.integers(0, 3, (B, T)))
    read_until = torch.where(torch.from_numpy(rng.random((B, T)) < 0.5), torch.arange(T) + 2, FOREVER)
    contexts = short_contexts(T, K, 3, whole=True)
    cut = cut_windows((tokens, positions, meta_index, reads_from, read_until), contexts)
    row = 0
    for text in range(B):
        for start in contexts.starts.tolist():
            for k in range(K):
                assert cut[0][row, k] == tokens[text, start + k]
                assert cut[1][row, k] == k
                assert cut[3][row, k] == max(0, reads_from[text, start + k] - start)
                until = read_until[text, start + k].item()
                assert cut[4][row, k] == (FOREVER if until == FOREVER else until - start)
            inside = [i - start for i in meta_index[text].tolist() if start <= i < start + K]
            assert cut[2][row].tolist() == inside + [K] * (3 - len(inside))
            row += 1
    assert row == len(cut[0])


def test_what_the_batch_does_not_limit_stays_unlimited():
    tokens = torch.arange(6)[None]
    contexts = short_contexts(6, 3, 2)
    assert cut_windows((tokens, tokens, None, None, None), contexts)[2:] == (None, None, None)


def test_the_states_are_those_of_the_positions():
    contexts = short_contexts(10, 4, 3, whole=True)
    tokens = torch.arange(20).view(2, 10)
    cut = cut_windows((tokens, tokens, None, None, None), contexts)[0]
    assert torch.equal(states_of(cut[..., None], contexts)[..., 0], tokens)


@pytest.mark.parametrize("at_once", [None, 1, 2, 3])
def test_windows_that_are_read_in_parts_give_the_same_states(at_once):
    contexts = short_contexts(20, 4, 3, whole=True)
    tokens = torch.arange(60).view(3, 20)
    found = short_states(lambda tokens, *rest: tokens[..., None], (tokens, tokens, None, None, None), contexts, at_once)
    assert torch.equal(found[..., 0], tokens)
