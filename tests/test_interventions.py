"""Tests the conditions of probe.py ablation: each changes exactly the attention that it names."""

import copy
import dataclasses

import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.model import GPT, Context
from nanometa.probes.interventions import CONDITIONS, INTACT, changed_attention, inapplicable, record_norms
from tests.reference import gpt as reference
from tests.test_attention_probe import hooks
from tests.test_model import LAYERED, WITH_MARKERS, crowded, inputs
from tests.test_positions import META, restless

SCALED = {"rope_scaling": "yarn", "rope_factor": 3.0}
KINDS = [("learned", {}), ("rope", {}), ("rope", SCALED)]


def applicable(m: GPTConfig, has_markers: bool = True) -> list[str]:
    return [name for name in CONDITIONS if not inapplicable(name, m, has_markers)]


# ----------------------------------------------------------------------------- conditions


def altered(condition: str, is_marker: torch.Tensor):
    """Returns the definition of a condition as a change of dense masks."""
    T = is_marker.size(1)

    def alter(which: str, allowed: torch.Tensor) -> torch.Tensor:
        if (condition, which) == ("diagonal", "second"):
            return torch.where(is_marker[:, :, None], torch.eye(T, dtype=torch.bool), allowed)
        if (condition, which) == ("hidden_markers", "first"):
            return allowed & ~(~is_marker[:, :, None] & is_marker[:, None, :])
        return allowed

    return alter


def muted(model: GPT) -> GPT:
    """Returns a copy whose second attention has an output of zeros."""
    silent = copy.deepcopy(model)
    for name, p in silent.named_parameters():
        if ".second_attn.c_proj." in name:
            torch.nn.init.zeros_(p)
    return silent


def members_of(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    T = tokens.size(1)
    return torch.stack([torch.isin(torch.arange(T), row) for row in index])


@pytest.mark.parametrize("of", [inputs, crowded])
@pytest.mark.parametrize(("position", "scale"), KINDS)
@pytest.mark.parametrize("second", WITH_MARKERS)
@torch.no_grad()
def test_conditions_equal_the_reference(second, position, scale, of):
    """The definition is attention over all pairs under dense masks, in double precision. No two conditions agree."""
    model = restless(second, position)
    model.cfg = dataclasses.replace(model.cfg, **scale)
    tokens, positions, index = of()
    members = members_of(tokens, index)
    tokens = torch.where(members, META, tokens.clamp(max=59))  # crowded() has a marker that no index names
    expected, found = {}, {}
    for name in (INTACT, *applicable(model.cfg)):
        slow = muted(model) if name == "off" else model
        expected[name] = reference.hidden_states(slow, tokens, positions, members, alter=altered(name, members))
        with changed_attention(model, META, name):
            found[name] = model(tokens, positions, index)
    assert len(found) == 1 + (1 if second == "none" else 2 if SECOND_ATTENTIONS[second].window == 1 else 3)
    for name, hidden in found.items():
        for other, theirs in expected.items():
            if name == other:  # angles and rotated q and k are in fp32
                torch.testing.assert_close(hidden, theirs, rtol=1e-5, atol=1e-5)
            else:
                assert (hidden - theirs).abs().max() > 1e-2, (name, other)


@torch.no_grad()
def test_the_diagonal_of_the_meta_arm_is_the_diagonal_arm():
    model, tokens = restless("meta", "rope"), inputs()
    other = restless("diagonal", "rope")
    other.load_state_dict(model.state_dict())
    with changed_attention(model, META, "diagonal"):
        found = model(*tokens)
    torch.testing.assert_close(found, other(*tokens), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_diagonal_and_off_hold_under_a_dynamic_rotary_scale():
    """With a dynamic scale the model replaces its attentions, and heads return other values than those of sdpa."""
    model = restless("meta", "rope")
    model.cfg = dataclasses.replace(model.cfg, rope_scaling="ntk", rope_dynamic=True, rope_factor=3.0)
    tokens, positions, index = inputs()
    assert "dynamic rotary scale" in inapplicable("hidden_markers", model.cfg, True)
    for name in ("diagonal", "off"):
        slow = muted(model) if name == "off" else model
        expected = reference.hidden_states(slow, tokens, positions, tokens == META, alter=altered(name, tokens == META))
        with changed_attention(model, META, name):
            torch.testing.assert_close(model(tokens, positions, index), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", SECOND_ATTENTIONS)
def test_off_also_applies_without_markers(second):
    m = GPTConfig(second_attention=second)
    assert applicable(m, has_markers=False) == (["off"] if second in LAYERED else [])


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, UserError("why")])
def test_a_condition_leaves_no_hooks_behind(end):
    model = restless("meta", "rope")
    for name in (INTACT, *CONDITIONS):
        try:
            with changed_attention(model, META, name), record_norms(model):
                assert hooks(model) > 0
                if end:
                    raise end
        except (KeyboardInterrupt, UserError):
            assert end
        assert hooks(model) == 0


@pytest.mark.parametrize("second", LAYERED)
@torch.no_grad()
def test_norms_are_those_of_what_the_layer_adds(second):
    """Compares with the same model read block by block, with and without its second attention."""
    model = restless(second, "learned")
    tokens, positions, index = inputs()
    with record_norms(model) as ratios:
        model(tokens, positions, index)
        model(tokens, positions, index)  # the list holds the last forward only
    entering = []
    for block in model.h:
        block.register_forward_pre_hook(lambda block, args: entering.append(args[0]))
    model(tokens, positions, index)
    assert len(ratios) == len(model.h)
    members = members_of(tokens, index)
    for block, x, ratio in zip(model.h, entering[:], ratios, strict=True):
        before = x + block.attn(block.ln_1(x))
        second_attn, mlp = block.second_attn, copy.deepcopy(block.mlp)
        torch.nn.init.zeros_(block.mlp.c_proj.weight)
        torch.nn.init.zeros_(block.mlp.c_proj.bias)
        after = block(x, Context(index))
        block.mlp.load_state_dict(mlp.state_dict())
        expected = (after - before).norm(dim=-1) / before.norm(dim=-1)
        torch.testing.assert_close(ratio.double(), expected, rtol=1e-5, atol=1e-7)
        if second_attn.__class__.__name__ == "MetaAttention":
            assert (ratio[~members] == 0).all()
