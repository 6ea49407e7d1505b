"""Tests rotary positions and their scalings against the formulas and against Hugging Face's implementation."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, Rescale
from nanometa.layers.rope import attention_factor, fixed_scale, rope_speeds, rope_tables, rotate
from nanometa.model import GPT
from nanometa.training.context_extension import interpolated, scaling_of, stretched
from tests.reference import gpt as reference
from tests.reference import rope as formulas
from tests.test_model import ARMS, WITH_MARKERS, crowded, inputs, sharpen, wake

SCALINGS = ("none", "pi", "ntk", "yarn")
SCALES = [("none", False)] + [(name, dynamic) for name in SCALINGS[1:] for dynamic in (False, True)]
PLACES = ("same", "none", "none_first", "none_second")
ARMS_AND_ALL_PLACES = [(arm, place) for arm in ARMS for place in PLACES if arm in WITH_MARKERS or place == "same"]
# a window of 4 that was extended to 12, so that most positions of a test lie beyond the trained window
STRETCHED = {"position": "rope", "block_size": 12, "rope_factor": 3.0, "yarn_beta_fast": 0.9, "yarn_beta_slow": 0.05}


def small(scaling: str, dynamic: bool = False, **changes) -> GPTConfig:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64, "content_vocab_size": 60, "bias": True}
    factor = {"rope_factor": 1.0} if scaling == "none" else {"rope_scaling": scaling, "rope_dynamic": dynamic}
    return GPTConfig(**{**shape, **STRETCHED, **factor, **changes})


def build(cfg: GPTConfig) -> GPT:
    return sharpen(wake(GPT(cfg, 3))).eval()


@settings(max_examples=200, deadline=None)
@given(
    scaling=st.sampled_from(SCALINGS[1:]), ramp=st.sampled_from(("code", "paper")), half=st.integers(2, 64),
    theta=st.floats(100, 1e6), window=st.integers(16, 8192), factor=st.integers(1, 64),
    betas=st.tuples(st.floats(0.1, 4), st.floats(5, 64)),
)  # fmt: skip
def test_rotation_speeds_equal_the_formulas(scaling, ramp, half, theta, window, factor, betas):
    cfg = GPTConfig(
        n_head=1, n_embd=2 * half, block_size=window * factor, position="rope", rope_theta=theta, rope_scaling=scaling,
        rope_factor=factor, yarn_ramp=ramp, yarn_beta_slow=betas[0], yarn_beta_fast=betas[1],
    )  # fmt: skip
    expected = torch.tensor([formulas.speed(cfg, d, factor) for d in range(half)])
    scale = fixed_scale(cfg, torch.device("cpu"))
    torch.testing.assert_close(rope_speeds(cfg, scale), expected, rtol=2e-5, atol=0)
    assert attention_factor(cfg, scale).item() ** 2 == pytest.approx(formulas.temperature(cfg, factor), rel=1e-5)


def llama(rope: dict, D: int, window: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=D, num_attention_heads=1, max_position_embeddings=window, rope_parameters=rope)


@pytest.mark.parametrize("D", [16, 64, 128])
@pytest.mark.parametrize("window", [256, 1024, 4096])
@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 8.0])
def test_rotation_speeds_equal_those_of_hugging_face(D, window, factor):
    """attention_factor has the same meaning in both: None is YaRN's own temperature, and 1.0 switches it off."""
    base = {"rope_theta": 10000.0, "factor": factor}
    for name, theirs, more in (
        ("pi", "linear", {}),
        ("yarn", "yarn", {"original_max_position_embeddings": window}),
        ("yarn", "yarn", {"original_max_position_embeddings": window, "attention_factor": 1.0}),
    ):
        cfg = GPTConfig(
            n_head=1, n_embd=D, block_size=round(window * factor), position="rope", rope_scaling=name,
            rope_factor=factor, yarn_attention_factor=more.get("attention_factor"),
        )  # fmt: skip
        found = llama({**base, **more, "rope_type": theirs}, D, round(window * factor))
        speeds, temperature = ROPE_INIT_FUNCTIONS[theirs](found, "cpu")
        scale = fixed_scale(cfg, torch.device("cpu"))
        torch.testing.assert_close(rope_speeds(cfg, scale), speeds, rtol=1e-5, atol=0)
        assert attention_factor(cfg, scale).item() == pytest.approx(temperature, rel=1e-6)
    # In transformers, NTK is always dynamic, with the scale of a text of this length.
    cfg = GPTConfig(n_head=1, n_embd=D, block_size=window, position="rope", rope_scaling="ntk", rope_dynamic=True)
    found = llama({"rope_theta": 10000.0, "factor": 1.0, "rope_type": "dynamic"}, D, window)
    length = round(window * factor)
    speeds, _ = ROPE_INIT_FUNCTIONS["dynamic"](found, "cpu", seq_len=length)
    torch.testing.assert_close(rope_speeds(cfg, torch.tensor(length / window)), speeds, rtol=1e-4, atol=0)


def test_yarn_has_the_published_ramp_and_temperatures():
    """The bounds of the ramp in YaRN's code, and its temperatures, which all implementations share."""
    for D, window, low, high in ((128, 4096, 20, 46), (64, 1024, 5, 18), (64, 512, 3, 16), (32, 256, 0, 7)):
        cfg = GPTConfig(n_head=1, n_embd=D, block_size=window * 4, position="rope", rope_scaling="yarn", rope_factor=4)
        speeds = rope_speeds(cfg, torch.tensor(4.0))
        share = speeds / rope_speeds(dataclasses.replace(cfg, rope_scaling="pi"), torch.tensor(4.0)) / 4
        assert (share[: low + 1] == 1).all() and share[low + 1] < 1
        torch.testing.assert_close(share[high:], torch.full_like(share[high:], 0.25))
        assert share[high - 1] > 0.251
    for s, root, factor in ((2, 1.0693, 1.143), (4, 1.1386, 1.296), (8, 1.2079, 1.459), (32, 1.3466, 1.813)):
        found = attention_factor(cfg, torch.tensor(float(s))).item()
        assert (round(found, 4), round(found**2, 3)) == (root, factor)


@pytest.mark.parametrize(("scaling", "dynamic"), SCALES)
@pytest.mark.parametrize(("second", "place"), ARMS_AND_ALL_PLACES)
@pytest.mark.parametrize("of", [inputs, crowded])
def test_the_model_equals_the_reference(scaling, dynamic, second, place, of):
    """Every query has its own scale, over all pairs of positions, in both attentions."""
    model = build(small(scaling, dynamic, second_attention=second, meta_position=place)).double()
    tokens, positions, index = of()
    tokens = torch.randint(0, 60, tokens.shape)
    members = torch.stack([torch.isin(torch.arange(12), row) for row in index])
    ours, expected = model(tokens, positions, index), reference.hidden_states(model, tokens, positions, members)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)  # angles and rotated q and k are in fp32
    if scaling != "none":
        model.cfg = small("none", second_attention=second, meta_position=place)
        plain = model(tokens, positions, index)
        assert (plain - expected).abs().max() > 1e-2  # the difference is larger than the tolerance


@pytest.mark.parametrize("scaling", SCALINGS[1:])
@pytest.mark.parametrize("second", ["meta", "causal"])
def test_a_scale_of_one_equals_plain_rope_to_the_bit(scaling, second):
    """With a factor of 1, and with a dynamic scale at all positions of the trained window, whatever follows."""
    tokens, positions, index = inputs()
    plain = build(small("none", second_attention=second))
    model = build(small(scaling, second_attention=second, rope_factor=1.0))
    assert torch.equal(model(tokens, positions, index), plain(tokens, positions, index))
    model = build(small(scaling, True, second_attention=second))  # trained in windows of 4
    assert torch.equal(*(m(tokens[:, :4], positions[:, :4], index[:, :1].clamp(max=4)) for m in (model, plain)))
    whole, first = model(tokens, positions, index), model(tokens[:, :4], positions[:, :4], index.clamp(max=4))
    torch.testing.assert_close(whole[:, :4], first)
    assert not torch.allclose(whole[:, 5:], plain(tokens, positions, index)[:, 5:], atol=1e-3)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_with_any_scaling_only_distances_matter(scaling):
    model = build(small(scaling))
    tokens, positions, index = inputs()
    here, there = (model.logits(model(tokens, positions + by, index)) for by in (0, 50))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    stretched_apart = model.logits(model(tokens, positions * 2, index))
    assert (here - stretched_apart)[..., :60].abs().max() > 1e-3


@pytest.mark.parametrize(("scaling", "dynamic"), SCALES)
def test_a_token_does_not_affect_earlier_positions(scaling, dynamic):
    """This also holds for a dynamic scale, which does not depend on later text."""
    model = build(small(scaling, dynamic))
    tokens, positions, index = inputs()
    before = model(tokens, positions, index)
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 60
        after = model(changed, positions, index)
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])


def test_yarns_temperature_is_applied_once():
    """At distance 0, rotation multiplies the product of q and k only by the temperature. 1.0 switches it off."""
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64).float()
    for given_factor, root in ((None, 0.1 * math.log(3) + 1), (1.0, 1.0), (1.3, 1.3)):
        cfg = small("yarn", yarn_attention_factor=given_factor)
        cos, sin = rope_tables(torch.arange(5)[None], cfg, fixed_scale(cfg, torch.device("cpu")))
        product = (rotate(q, cos, sin) * rotate(k, cos, sin)).sum(-1)
        torch.testing.assert_close(product, (q * k).sum(-1) * root**2)


def test_tables_are_fp32_under_autocast():
    """bf16 cannot represent all integers above 256."""
    cfg = small("yarn", block_size=9000)
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rope_tables(torch.arange(9000)[None], cfg, fixed_scale(cfg, torch.device("cpu")))
    assert cos.dtype == sin.dtype == torch.float32
    assert len(cos[0, 0, :, 0].unique()) > 4000


@pytest.mark.parametrize("dynamic", [False, True])
def test_autocast_changes_outputs_only_by_rounding(dynamic):
    """The positions are far above 256, where bf16 would round them to others."""
    model = build(small("yarn", dynamic))
    tokens, positions, index = inputs()
    tokens, positions = torch.randint(0, 60, tokens.shape), positions + 3001
    exact = model(tokens, positions, index)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens, positions, index)
    misplaced = model(tokens, positions.bfloat16().long(), index)
    error, apart = ((x.float() - exact).norm() / exact.norm() for x in (rounded, misplaced))
    assert error < 0.05 < apart


# ----------------------------------------------------------------------------- extended windows


def test_an_interpolated_table_is_the_old_one_at_fractional_positions():
    table = torch.randn(5, 3, dtype=torch.float64)
    longer = interpolated(table, 2.5, 12)
    for m in range(12):
        at = min(m / 2.5, 4)
        low = math.floor(at)
        expected = table[low] if low == 4 else table[low] * (low + 1 - at) + table[low + 1] * (at - low)
        torch.testing.assert_close(longer[m], expected)
    assert torch.equal(interpolated(table, 1.0, 5), table)


def test_factors_are_relative_to_the_window_before_any_extension():
    base = GPTConfig(position="rope", block_size=512)
    four = stretched(base, "yarn", 4.0)
    assert (four.block_size, four.original_block_size, scaling_of(four)) == (2048, 512, "yarn 4x")
    eight = stretched(four, "yarn", 8.0)
    assert (eight.block_size, eight.original_block_size) == (4096, 512)
    assert stretched(eight, "none", 1.0) == base
    plain = stretched(base, "none", 4.0)  # a longer window without scaling
    assert (plain.block_size, plain.original_block_size, scaling_of(plain), scaling_of(base)) == (
        2048,
        512,
        "none 4x",
        "",
    )
    assert scaling_of(stretched(base, "ntk", 4.0, rope_dynamic=True)) == "ntk dynamic"
    with pytest.raises(UserError, match="would turn 512 positions into 665.60, which is not a whole number: "):
        stretched(base, "pi", 1.3)
    learned = stretched(GPTConfig(block_size=512), "pi", 2.0)
    with pytest.raises(UserError, match="interpolated before, by a factor of 2: extend the run that this"):
        stretched(learned, "pi", 4.0)


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"rope_dynamic": True}, "rope_dynamic has no effect with rope_scaling=none: add --rope_scaling=yarn"),
        ({"rope_factor": 4.0, "position": "learned"}, "rope_scaling=none by 4 needs position=rope"),
        ({"rope_scaling": "yarn", "rope_factor": 0.5}, "rope_factor=0.5 is out of range"),
        ({"rope_scaling": "yarn", "yarn_beta_slow": 40.0}, "yarn_beta_slow=40.0 is out of range"),
        ({"rope_scaling": "yarn", "yarn_attention_factor": 0.0}, "yarn_attention_factor=0.0 is out of range"),
        ({"rope_scaling": "ntk", "n_head": 8}, "needs heads of more than one pair"),
        ({"rope_scaling": "yarn", "rope_factor": 5.0}, "does not divide block_size=12"),
        ({"rope_scaling": "yarn", "position": "learned"}, "rope_scaling=yarn by 1 needs position=rope"),
        (
            {"rope_scaling": "pi", "rope_dynamic": True, "position": "learned"},
            "pi, rope_dynamic by 1 needs position=rope",
        ),
        ({"meta_position": "none_first", "position": "learned"}, "meta_position=none_first needs position=rope"),
    ],
)
def test_bad_settings_are_refused(settings_, sentence):
    with pytest.raises(UserError) as refusal:
        GPT(small("none", **settings_))
    assert sentence in str(refusal.value)
    for how, sentence in (
        ({"rope_factor": 2.0}, "rope_factor=2 needs --rope_scaling"),
        ({"rope_dynamic": True}, "rope_dynamic needs --rope_scaling"),
        ({"rope_scaling": "yarn"}, "by a factor of 1 changes nothing"),
    ):
        with pytest.raises(UserError, match=sentence):
            Rescale(**how)
