"""Tests the readings of "no position" with rotary positions that probes/rotations.py defines."""

import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.probes.positions import under, useless
from tests.reference import gpt as reference
from tests.test_model import WITH_MARKERS, crowded, inputs
from tests.test_positions import META, restless, turned


@pytest.mark.parametrize("of", [inputs, crowded])
@pytest.mark.parametrize("second", WITH_MARKERS)
@torch.no_grad()
def test_readings_of_no_position_equal_the_reference_under_yarn(second, of):
    """YaRN's factor on q and k stays where no rotation is left. Rows are full of markers, or have a few."""
    model = restless(second, "rope", rope_scaling="yarn", rope_factor=3.0)
    tokens, positions, index = of()
    members = torch.stack([torch.isin(torch.arange(12), row) for row in index])
    tokens = torch.where(members, META, tokens.clamp(max=59))
    for name in ("no_position_pairs", "no_position_zeros"):
        expected = reference.hidden_states(model, tokens, positions, members, turn=turned(name, members))
        with under(model, META, name):
            torch.testing.assert_close(model(tokens, positions, index), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_pairs_and_zeros_take_the_position_of_a_marker_out_of_products():
    """Shifting all tokens before the last marker changes no product of two of them. An angle of 0 at the marker leaves
    their position in the products with it; the two other readings do not."""
    model = restless("none", "rope")
    tokens, _, _ = inputs()
    tokens = torch.where(tokens == META, 5, tokens)[:, :6]
    tokens[:, 5] = META
    index, positions = torch.full((3, 1), 5), torch.arange(6).expand(3, 6)
    shifted = torch.where(positions == 5, 5, positions + 7)
    moved = {}
    for name in ("full", "no_position", "no_position_pairs", "no_position_zeros"):
        with under(model, META, name):
            here, there = (model(tokens, at, index)[:, 5] for at in (positions, shifted))
        moved[name] = (here - there).abs().max() > 1e-3
    assert moved == {"full": True, "no_position": True, "no_position_pairs": False, "no_position_zeros": False}


def test_a_dynamic_scale_is_refused():
    model = restless("meta", "rope", rope_scaling="ntk", rope_dynamic=True)
    assert "dynamic rotary scale" in useless("no_position_pairs", model.cfg)
    with pytest.raises(UserError, match="rotates each key differently"), under(model, META, "no_position_zeros"):
        pass
    assert not model._forward_pre_hooks
