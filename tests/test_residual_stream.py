"""Tests probes/residual_stream.py: recording states changes nothing, and a replaced state changes only later
outputs."""

import contextlib

import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.probes.residual_stream import record_states, replace_state, stream_modules
from tests.test_model import build, inputs, sharpen, wake

ARMS = [(second, position) for second in SECOND_ATTENTIONS for position in ("learned", "rope")]
ROWS = torch.tensor([3, 7, 10])


def awake(second: str = "meta", position: str = "rope"):
    return sharpen(wake(build(second_attention=second, position=position, bias=True)))


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def picked(state: torch.Tensor) -> torch.Tensor:
    return state[torch.arange(3), ROWS]


@pytest.mark.parametrize(("second", "position"), ARMS)
@torch.no_grad()
def test_recorded_states_are_the_outputs_of_the_blocks(second, position):
    model, (tokens, positions, index) = awake(second, position), inputs()
    plain = model(tokens, positions, index)
    outputs = []
    with contextlib.ExitStack() as stack:
        for block in model.h:
            stack.enter_context(block.register_forward_hook(lambda block, inputs, output: outputs.append(output)))
        with record_states(model) as read:
            assert torch.equal(model(tokens, positions, index), plain)
    assert len(read) == model.cfg.n_layer + 1 == 1 + len(outputs) and not any(state.requires_grad for state in read)
    embedded = model.wte(tokens) + (model.wpe(positions) if position == "learned" else 0)
    assert torch.equal(read[0], embedded)
    assert all(torch.equal(state, output) for state, output in zip(read[1:], outputs, strict=True))
    assert torch.equal(model.ln_f(read[-1]), plain)


def test_states_come_from_the_last_forward_pass_without_gradient():
    model, (tokens, positions, index) = awake(), inputs()
    with record_states(model) as read:
        model(tokens, positions, index)
        first = list(read)
        model(tokens.flip(0), positions, index.flip(0)).sum().backward()
    assert len(read) == 3 and not any(state.requires_grad for state in read)
    for old, new in zip(first, read, strict=True):
        torch.testing.assert_close(new.flip(0), old, rtol=1e-5, atol=1e-5)
        assert not torch.equal(new, old)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("second", "position"), ARMS)
@torch.no_grad()
def test_a_replaced_state_changes_only_later_layers_and_positions(second, position, layer):
    model, (tokens, positions, index) = awake(second, position), inputs()
    with record_states(model) as read:
        plain = model(tokens, positions, index)
    with replace_state(model, layer, ROWS[:, None], picked(read[layer])[:, None]):
        assert torch.equal(model(tokens, positions, index), plain)
    new = picked(read[layer]).flip(0)  # the state of another text
    with replace_state(model, layer, ROWS[:, None], new[:, None]), record_states(model) as seen:
        changed = model(tokens, positions, index)
    assert torch.equal(picked(seen[layer]), new)
    assert all(torch.equal(seen[i], read[i]) for i in range(layer))
    for row, t in enumerate(ROWS.tolist()):
        if row == 1:  # flip leaves the middle row in place, so its state is its own
            assert torch.equal(changed[row], plain[row])
            continue
        assert torch.equal(changed[row, :t], plain[row, :t])
        moved = (changed[row, t:] - plain[row, t:]).abs().amax(dim=-1)
        assert moved[0] > 1e-3
        # causal attention passes the change on to later positions, except for a change of the input of ln_f
        assert (moved[1:] > 1e-6).all() if layer < 2 else (moved[1:] == 0).all()
    assert torch.equal(model(tokens, positions, index), plain)


@torch.no_grad()
def test_the_hook_of_an_outer_with_block_runs_first():
    model, (tokens, positions, index) = awake(), inputs()
    with record_states(model) as read:
        model(tokens, positions, index)
        before = picked(read[1])
        with replace_state(model, 1, ROWS[:, None], torch.zeros(3, 1, 16)):
            model(tokens, positions, index)
            assert torch.equal(picked(read[1]), before)
    with replace_state(model, 1, ROWS[:, None], torch.zeros(3, 1, 16)), record_states(model) as read:
        model(tokens, positions, index)
    assert not picked(read[1]).any()


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, UserError("why")])
def test_no_hook_is_left_after_the_with_block(end):
    model, (tokens, positions, index) = awake(), inputs()
    for hold, n in (
        (record_states(model), len(stream_modules(model))),
        (replace_state(model, 1, ROWS[:, None], torch.zeros(3, 1, 16)), 1),
    ):
        with contextlib.suppress(KeyboardInterrupt, UserError), hold:
            assert hooks(model) == n
            model(tokens, positions, index)
            if end:
                raise end
        assert hooks(model) == 0
    with pytest.raises(IndexError), replace_state(model, 1, ROWS[:, None] + 12, torch.zeros(3, 1, 16)):
        model(tokens, positions, index)
    assert hooks(model) == 0


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_missing_layer_is_refused(layer):
    model = awake()
    with (
        pytest.raises(UserError, match=f"there is no layer {layer}: this model has states 0"),
        replace_state(model, layer, ROWS[:, None], torch.zeros(3, 1, 16)),
    ):
        pass
    assert hooks(model) == 0
