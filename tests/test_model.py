import dataclasses

import pytest
import torch
import transformers

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.model import GPT
from nanometa.training.hugging_face import from_hf, to_hf
from tests.reference import gpt as reference

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=64, content_vocab_size=60)
ARMS = tuple(SECOND_ATTENTIONS)
LAYERED = [name for name, second in SECOND_ATTENTIONS.items() if second.has_layer]
WITH_MARKERS = [name for name, second in SECOND_ATTENTIONS.items() if second.markers != "refused"]
# all valid combinations of second_attention and meta_position
ARMS_AND_PLACES = [(arm, place) for arm in ARMS for place in ("same", "none") if arm in WITH_MARKERS or place == "same"]


def build(seed=3, **changes) -> GPT:
    return GPT(dataclasses.replace(SMALL, **changes), seed).eval()


def wake(model: GPT, seed: int = 0) -> GPT:
    """Draws the second attention's output projections at random. At their initial zeros, no test of it could fail."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "second_attn.c_proj.weight" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def sharpen(model: GPT) -> GPT:
    """Draws large weights for queries and keys, because attention is nearly uniform at GPT-2's initial weights."""
    for name, p in model.named_parameters():
        if "c_attn.weight" in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def inputs(T=12, B=3, meta=61):
    torch.manual_seed(1)
    tokens = torch.randint(0, 60, (B, T))
    index = torch.tensor([[0, 3, 7], [2, 3, 11], [4, T, T]])
    for row in range(B):
        tokens[row, index[row][index[row] < T]] = meta
    return tokens, torch.arange(T).expand(B, T), index


def crowded():
    """Returns inputs() with more markers in a row than the window of any second attention."""
    tokens, positions, _ = inputs()
    rows = [[*range(12)], [0, 1, 2, 4, 5, 6, 7, 8, 9, 11], [4]]
    index = torch.tensor([row + [12] * (12 - len(row)) for row in rows])
    for row, at in enumerate(rows):
        tokens[row, at] = 61
    return tokens, positions, index


@pytest.mark.parametrize("of", [inputs, crowded])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize(("second", "meta_position"), ARMS_AND_PLACES)
def test_the_model_equals_the_reference(second, meta_position, position, of):
    """The definition is masked attention over all pairs of positions. Rows have different numbers of meta-tokens."""
    cfg = {"second_attention": second, "meta_position": meta_position, "position": position, "bias": True}
    model = sharpen(wake(build(**cfg))).double()
    for name, p in model.named_parameters():
        if name.endswith(("bias", "wpe.weight")):
            torch.nn.init.normal_(p, std=0.3)
    tokens, positions, index = of()
    # different values everywhere, so that a wrong key shows; the model does not look for ids
    tokens = torch.randint(0, 60, tokens.shape)
    members = torch.stack([torch.isin(torch.arange(12), row) for row in index])
    ours, expected = model(tokens, positions, index), reference.hidden_states(model, tokens, positions, members)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # angles and rotated q and k are in fp32
    others = reference.hidden_states(model, tokens, positions, members.roll(1, dims=1))
    if model.cfg.second.gathers or meta_position == "none":
        assert (others - expected).abs().max() > 1e-2  # the difference is larger than the tolerance


@pytest.mark.parametrize("dynamic", [None, 1.0, 3.0])  # the trained window is the whole window, or its first third
@pytest.mark.parametrize("second", [name for name, second in SECOND_ATTENTIONS.items() if second.window is not None])
def test_a_second_attention_reads_exactly_its_window_of_markers(second, dynamic):
    """Up to `window` markers, the arm equals meta. With causal attention silenced, a marker affects only the next
    ones."""
    window = SECOND_ATTENTIONS[second].window
    assert window < 12, "crowded() has 12 markers: give it more, so that this window can be told from meta"
    scale = {"position": "rope", "rope_scaling": "ntk", "rope_dynamic": True, "rope_factor": dynamic} if dynamic else {}
    model, meta = (wake(build(second_attention=name, n_layer=1, **scale)) for name in (second, "meta"))
    tokens, positions, index = crowded()
    ours, theirs = (m(tokens, positions, index) for m in (model, meta))
    at = index[1, window]
    torch.testing.assert_close(ours[1, :at], theirs[1, :at])
    assert (ours[0] != theirs[0]).any(-1).tolist() == [False] * window + [True] * (12 - window)
    torch.nn.init.zeros_(model.h[0].attn.c_proj.weight)
    before, changed = model(tokens, positions, index), tokens.clone()
    changed[0, 1] = 5
    differs = (model(changed, positions, index) != before).any(-1)
    assert differs[0].nonzero().flatten().tolist() == [*range(1, min(12, 1 + window))]


@pytest.mark.parametrize("silent", ["", "attn", "second_attn"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_moving_meta_tokens_without_a_position_changes_nothing(position, silent):
    """With one or both attentions active, nothing changes. With a position, or for a content token, the output
    changes."""
    tokens, positions, index = inputs()
    # different values everywhere, so that a wrong key shows; the model does not look for ids
    tokens = torch.randint(0, 60, tokens.shape)
    moved, elsewhere = positions.clone(), positions.clone()
    moved[0, 3], moved[0, 7], moved[2, 4] = 9, 1, 0
    elsewhere[0, 4], elsewhere[0, 5] = 10, 2
    for meta_position in ("same", "none"):
        model = sharpen(wake(build(position=position, meta_position=meta_position)))
        for name, p in model.named_parameters():
            if silent and f".{silent}.c_proj" in name:
                torch.nn.init.zeros_(p)
        here, there = model(tokens, positions, index), model(tokens, moved, index)
        if meta_position == "none":
            assert torch.equal(here, there)
        else:
            assert (here - there).abs().amax((1, 2))[0] > 1e-3
        # otherwise no attention of content tokens is left that depends on their positions
        if silent != "attn" or position == "learned":
            assert (here - model(tokens, elsewhere, index)).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("second", WITH_MARKERS)
def test_without_markers_meta_position_has_no_effect(second, position):
    same, none = (wake(build(second_attention=second, position=position, meta_position=m)) for m in ("same", "none"))
    tokens, positions, index = inputs()
    for empty in (torch.empty(3, 0, dtype=torch.long), torch.full((3, 2), 12)):
        assert torch.equal(same(tokens, positions, empty), none(tokens, positions, empty))
    assert not torch.equal(same(tokens, positions, index), none(tokens, positions, index))


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize(("second", "meta_position"), ARMS_AND_PLACES)
def test_a_token_does_not_affect_earlier_positions(second, meta_position, position):
    model = wake(build(second_attention=second, position=position, meta_position=meta_position))
    tokens, positions, index = inputs()
    before = model.logits(model(tokens, positions, index))
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 60
        after = model.logits(model(changed, positions, index))
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_meta_attention_connects_only_later_meta_tokens(position):
    """With causal attention silenced, a change of a meta-token affects only later meta-tokens."""
    model = wake(build(second_attention="meta", position=position))
    for block in model.h:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
    tokens, positions, index = inputs()
    before = model(tokens, positions, index)
    changed = tokens.clone()
    changed[0, 3] = 5
    differs = (model(changed, positions, index) != before).any(-1)
    assert differs[0].nonzero().flatten().tolist() == [3, 7] and not differs[1:].any()


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("second", ["meta", "diagonal", "read_meta"])
def test_without_markers_the_model_equals_gpt2_to_the_bit(second, position):
    meta, plain = (
        wake(build(second_attention=second, position=position, bias=True)),
        build(second_attention="none", position=position, bias=True),
    )
    for block in meta.h:
        torch.nn.init.ones_(block.second_attn.c_proj.bias)
    plain.load_state_dict({k: v for k, v in meta.state_dict().items() if "second" not in k})
    tokens, positions, _ = inputs()
    for index in (torch.empty(3, 0, dtype=torch.long), torch.full((3, 2), 12)):
        assert torch.equal(meta(tokens, positions, index), plain(tokens, positions, index))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("second", WITH_MARKERS)
def test_no_index_means_that_there_are_no_markers(second, dynamic):
    scale = {"rope_scaling": "ntk", "rope_dynamic": True, "rope_factor": 3.0} if dynamic else {}
    model = wake(build(second_attention=second, position="rope", **scale))
    tokens, positions, _ = inputs()
    empty = torch.empty(3, 0, dtype=torch.long)
    assert torch.equal(model(tokens, positions, None), model(tokens, positions, empty))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_what_ordinary_tokens_get_from_the_second_attention(position):
    """With causal attention silenced, one block, and a change at one position: which positions notice it."""
    tokens, positions, index = inputs()
    changes = {  # the changed position -> the positions of row 0 that differ; its markers are at 0, 3 and 7
        ("meta", 3): {3, 7}, ("meta", 5): {5}, ("diagonal", 3): {3},
        ("meta_mean", 3): {3, *range(4, 12)}, ("meta_mean", 5): {5, 6, *range(8, 12)},
        ("read_meta", 3): {3, *range(4, 12)}, ("read_meta", 5): {5},
    }  # fmt: skip
    for (second, at), expected in changes.items():
        model = wake(build(second_attention=second, position=position, n_layer=1))
        torch.nn.init.zeros_(model.h[0].attn.c_proj.weight)
        before, changed = model(tokens, positions, index), tokens.clone()
        changed[0, at] = (changed[0, at] + 1) % 60
        differs = (model(changed, positions, index) != before).any(-1)
        assert set(differs[0].nonzero().flatten().tolist()) == expected and not differs[1:].any()


def test_step_0_is_gpt2_in_every_arm_and_shared_weights_are_equal():
    models = {arm: build(second_attention=arm) for arm in ARMS}
    tokens, positions, index = inputs()
    outputs = {arm: model(tokens, positions, index) for arm, model in models.items()}
    for arm in LAYERED:
        assert torch.equal(outputs[arm], outputs["none"])
        for name, p in models["none"].named_parameters():
            assert torch.equal(p, models[arm].get_parameter(name)), name
    meta = models["meta"].state_dict()
    for control in (models[arm].state_dict() for arm in LAYERED):
        assert meta.keys() == control.keys() and all(torch.equal(meta[name], control[name]) for name in meta)
    assert not torch.equal(meta["h.0.attn.c_attn.weight"], meta["h.1.attn.c_attn.weight"])
    assert not torch.equal(meta["h.0.attn.c_attn.weight"], build(seed=4).state_dict()["h.0.attn.c_attn.weight"])
    # a control's window has fewer positions; its rows of the position table are the same
    short = build(second_attention="none", block_size=10).state_dict()["wpe.weight"]
    assert torch.equal(short, meta["wpe.weight"][:10])


def test_every_parameter_gets_a_gradient_once_the_output_projections_are_not_zero():
    model = wake(build())
    model(*inputs()).sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name != "wpe.weight"
    )


def test_the_large_models_have_the_papers_numbers_of_parameters():
    """151.9M with meta-attention and 123.6M without it, excluding the position table (the paper: 152M and 124M)."""
    counts = {}
    for arm in ARMS:
        with torch.device("meta"):
            model = GPT(GPTConfig(second_attention=arm, vocab_size=50304, content_vocab_size=50257))
        counts[arm] = model.num_params(position_table=False)
        groups = model.param_groups(0.1)
        assert sum(p.numel() for group in groups for p in group["params"]) == model.num_params()
        assert all(p.dim() >= 2 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])
    assert {counts[arm] for arm in LAYERED} == {151_908_096}
    assert counts["meta"] == 123_587_328 + 12 * (4 * 768**2 + 768)
    assert counts["none"] == 123_587_328


def hf_model(seed=0):
    torch.manual_seed(seed)
    cfg = transformers.GPT2Config(
        vocab_size=64, n_positions=12, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(cfg).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_weights_convert_from_and_to_hugging_face_with_equal_logits():
    theirs, ours = hf_model(), build(second_attention="none", bias=True)
    tokens, positions, index = inputs()
    ours.load_state_dict(from_hf(theirs.state_dict()))
    expected = theirs(tokens).logits[..., :60]
    torch.testing.assert_close(ours.logits(ours(tokens, positions, index))[..., :60], expected, rtol=1e-5, atol=1e-5)

    back = hf_model(seed=9)
    back.load_state_dict(to_hf(ours))
    torch.testing.assert_close(back(tokens).logits[..., :60], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), to_hf(ours).values(), strict=True))


def test_conversion_refuses_what_gpt2_cannot_hold():
    for changes in (
        {"second_attention": "meta", "bias": True},
        {"second_attention": "none", "position": "rope", "bias": True},
        {"second_attention": "none", "meta_position": "none", "bias": True},
    ):
        with pytest.raises(UserError, match="Hugging Face"):
            to_hf(build(**changes))


def test_with_rope_only_distances_matter():
    model = wake(build(position="rope"))
    tokens, positions, index = inputs()
    here = model.logits(model(tokens, positions, index))
    there = model.logits(model(tokens, positions + 5000, index))
    torch.testing.assert_close(
        there[..., :60], here[..., :60], rtol=1e-3, atol=1e-4
    )  # fp32 angles of about 5000 radians


def test_markers_and_spare_ids_have_no_probability():
    model = build()
    logits = model.logits(model(*inputs()))
    assert torch.isinf(logits[..., 60:]).all() and torch.isfinite(logits[..., :60]).all()


@pytest.mark.parametrize("second", ["meta", "meta_mean", "read_meta", "none"])
def test_activation_checkpointing_changes_no_bit_of_a_gradient(second):
    """Tests activation checkpointing with dropout, whose masks must be the same when they are drawn again."""
    gradients = []
    for recompute in (False, True):
        model = wake(build(second_attention=second, dropout=0.3)).train()
        model.recompute = recompute
        torch.manual_seed(5)
        run = []
        for block in model.h:
            block.register_forward_pre_hook(lambda block, _, run=run: run.append(block))
        model.logits(model(*inputs()))[..., :61].sum().backward()
        assert len(run) == len(model.h) * (1 + recompute)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_dropout_is_off_in_evaluation():
    tokens, positions, index = inputs()
    lively, without = build(dropout=0.5), build(dropout=0.0)
    assert torch.equal(lively(tokens, positions, index), without(tokens, positions, index))
    lively.train()
    assert not torch.equal(lively(tokens, positions, index), without(tokens, positions, index))


def test_a_model_needs_the_sizes_of_the_vocabulary():
    with pytest.raises(UserError, match="vocab_size=None .* must both be numbers, .*: take them from the dataset's"):
        GPT(dataclasses.replace(SMALL, vocab_size=None))
    with pytest.raises(UserError, match="content_vocab_size=70 must lie in 1 .. vocab_size=64, .*: take both from"):
        GPT(dataclasses.replace(SMALL, content_vocab_size=70))
