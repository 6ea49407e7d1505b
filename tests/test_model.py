import dataclasses

import pytest
import torch
import transformers

from config import GPTConfig, UserError
from model import GPT, from_hf, to_hf

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=64, content_vocab_size=60)
ARMS = ("meta", "causal", "none")


def build(seed=3, **changes) -> GPT:
    return GPT(dataclasses.replace(SMALL, **changes), seed).eval()


def wake(model: GPT, seed: int = 0) -> GPT:
    """Random second projections: at their initial zero no test of the second attention could fail."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "second_attn.c_proj.weight" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def inputs(T=12, B=3, meta=61):
    torch.manual_seed(1)
    tokens = torch.randint(0, 60, (B, T))
    index = torch.tensor([[0, 3, 7], [2, 3, 11], [4, T, T]])
    for row in range(B):
        tokens[row, index[row][index[row] < T]] = meta
    return tokens, torch.arange(T).expand(B, T), index


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("second", ARMS)
def test_a_token_changes_nothing_before_it(second, position):
    model = wake(build(second_attention=second, position=position))
    tokens, positions, index = inputs()
    before = model.logits(model(tokens, positions, index))
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 60
        after = model.logits(model(changed, positions, index))
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_meta_tokens_reach_later_meta_tokens_and_only_them(position):
    """With causal attention silenced, a meta-token's change is seen at later meta-tokens alone."""
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
def test_without_markers_the_meta_model_is_gpt2_to_the_bit(position):
    meta, plain = (
        wake(build(second_attention="meta", position=position)),
        build(second_attention="none", position=position),
    )
    plain.load_state_dict({k: v for k, v in meta.state_dict().items() if "second" not in k})
    tokens, positions, _ = inputs()
    for index in (torch.empty(3, 0, dtype=torch.long), torch.full((3, 2), 12)):
        assert torch.equal(meta(tokens, positions, index), plain(tokens, positions, index))


def test_step_0_is_gpt2_in_every_arm_and_shared_weights_are_equal():
    models = {arm: build(second_attention=arm) for arm in ARMS}
    tokens, positions, index = inputs()
    outputs = {arm: model(tokens, positions, index) for arm, model in models.items()}
    for arm in ("meta", "causal"):
        assert torch.equal(outputs[arm], outputs["none"])
        for name, p in models["none"].named_parameters():
            assert torch.equal(p, models[arm].get_parameter(name)), name
    meta, causal = models["meta"].state_dict(), models["causal"].state_dict()
    assert meta.keys() == causal.keys() and all(torch.equal(meta[name], causal[name]) for name in meta)
    assert not torch.equal(meta["h.0.attn.c_attn.weight"], meta["h.1.attn.c_attn.weight"])
    assert not torch.equal(meta["h.0.attn.c_attn.weight"], build(seed=4).state_dict()["h.0.attn.c_attn.weight"])
    # a control's window has fewer positions; the rows that it has are the same
    short = build(second_attention="none", block_size=10).state_dict()["wpe.weight"]
    assert torch.equal(short, meta["wpe.weight"][:10])


def test_every_parameter_gets_a_gradient_from_the_second_step_on():
    model = wake(build())
    model(*inputs()).sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name != "wpe.weight"
    )


def test_parameter_counts_of_the_paper():
    """151.9M with meta-attention and 123.6M without, the position table not counted (the paper: 152M and 124M)."""
    counts = {}
    for arm in ARMS:
        with torch.device("meta"):
            model = GPT(GPTConfig(second_attention=arm, vocab_size=50304, content_vocab_size=50257))
        counts[arm] = model.num_params(position_table=False)
        groups = model.param_groups(0.1)
        assert sum(p.numel() for group in groups for p in group["params"]) == model.num_params()
        assert all(p.dim() >= 2 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])
    assert counts["meta"] == counts["causal"] == 123_587_328 + 12 * (4 * 768**2 + 768) == 151_908_096
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


def test_logits_of_hugging_faces_gpt2_both_ways():
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
    ):
        with pytest.raises(UserError, match="Hugging Face"):
            to_hf(build(**changes))


def test_rope_depends_on_distance_alone():
    model = wake(build(position="rope"))
    tokens, positions, index = inputs()
    here = model.logits(model(tokens, positions, index))
    there = model.logits(model(tokens, positions + 5000, index))
    torch.testing.assert_close(
        there[..., :60], here[..., :60], rtol=1e-3, atol=1e-4
    )  # fp32 angles of some 5000 radians


def test_ids_that_no_position_predicts_have_no_probability():
    model = build()
    logits = model.logits(model(*inputs()))
    assert torch.isinf(logits[..., 60:]).all() and torch.isfinite(logits[..., :60]).all()


def test_dropout_is_dead_in_evaluation():
    tokens, positions, index = inputs()
    lively, without = build(dropout=0.5), build(dropout=0.0)
    assert torch.equal(lively(tokens, positions, index), without(tokens, positions, index))
    lively.train()
    assert not torch.equal(lively(tokens, positions, index), without(tokens, positions, index))


def test_the_vocabulary_must_be_known():
    with pytest.raises(UserError, match="vocab_size"):
        GPT(dataclasses.replace(SMALL, vocab_size=None))
    with pytest.raises(UserError, match="content_vocab_size=70"):
        GPT(dataclasses.replace(SMALL, content_vocab_size=70))
