"""Tests that adapters train what they should and nothing else, and that they merge into the weights they computed."""

import dataclasses
from unittest import mock

import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.config import MarkerConfig, TaskConfig, TrainConfig
from nanometa.data.layout import IGNORE
from nanometa.data.markers import markers_of
from nanometa.data.tokenizer import CL, CR, META, SR
from nanometa.layers import loss
from nanometa.layers.loss import Objective, _SummedNats
from nanometa.model import GPT
from nanometa.training import adapters
from nanometa.training.adapters import attach, check_second, check_start, has_adapters, merge, rows_of_markers
from nanometa.training.distributed import autocast
from nanometa.training.optimizer import Optimizer, norms, part_of
from tests.test_loss import case
from tests.test_model import SMALL, inputs, sharpen, wake

CPU, MODES = torch.device("cpu"), ("markers", "lora")


def settings(train_only: str, second: str = "meta", **changes) -> TrainConfig:
    model = dataclasses.replace(SMALL, second_attention=second, bias=True, position="rope")
    lora = {"lora_r": 3, "lora_alpha": 12.0} if train_only == "lora" else {}
    return TrainConfig(model=model, init_from="out/x", train_only=train_only, **{**lora, **changes})


def trained_weights(cfg: TrainConfig) -> GPT:
    """Returns a model that looks as if it had been trained: every part of it matters."""
    return sharpen(wake(GPT(cfg.model, seed=3)))


def batch() -> tuple[torch.Tensor, ...]:
    """Returns tokens, targets, positions, meta_index and scored_index, with <|meta|> at some places."""
    tokens, positions, index = inputs(meta=60)
    targets = torch.where(tokens.roll(-1, 1) < 60, tokens.roll(-1, 1), IGNORE)
    return tokens, targets, positions, index, positions


def move(model: GPT, cfg: TrainConfig, steps: int = 5) -> Optimizer:
    """Trains the model as train_step does."""
    objective, optimizer = Objective(model), Optimizer(model, cfg)
    for _ in range(steps):
        (objective(*batch()) / 30).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1e-2)
    return optimizer


def hidden(model: GPT) -> torch.Tensor:
    tokens, _, positions, index, _ = batch()
    with torch.no_grad():
        return model.logits(model(tokens, positions, index))


# ----------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("second", ["meta", "none", "causal", "read_meta"])
@pytest.mark.parametrize("train_only", MODES)
def test_adapters_change_nothing_at_first_to_the_bit(train_only, second):
    cfg = settings(train_only, second)
    plain, model = trained_weights(cfg), attach(trained_weights(cfg), cfg, 1)
    assert torch.equal(hidden(model), hidden(plain)) and has_adapters(model) and not has_adapters(plain)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = {name.partition(".parametrizations.")[0] for name in names}
    expected = {"wte"}
    if train_only == "lora":
        blocks = ("attn", "second_attn") if plain.cfg.second.has_layer else ("attn",)
        expected |= {f"h.{i}.{block}.{layer}" for i in range(2) for block in blocks for layer in ("c_attn", "c_proj")}
    assert layers == expected and all(".parametrizations." in name for name in names)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("train_only", MODES)
def test_frozen_tensors_keep_their_bits_in_50_steps_with_weight_decay(train_only, optimizer):
    cfg = settings(train_only, optimizer=optimizer, weight_decay=0.1)
    before = trained_weights(cfg).state_dict()
    model = attach(trained_weights(cfg), cfg, 1)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    move(model, cfg, steps=50)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    after = merge(model).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if name.endswith(("attn.c_attn.weight", "attn.c_proj.weight"))}
    assert changed == {"wte.weight"} | (adapted if train_only == "lora" else set())
    rows = (before["wte.weight"] != after["wte.weight"]).any(1).nonzero().flatten().tolist()
    assert rows == [60]  # <|meta|>, but no content and no spare row


def test_a_run_without_markers_trains_the_matrices_alone():
    cfg = settings("lora", "none")
    model = attach(trained_weights(cfg), cfg, 0)
    assert torch.equal(model.wte.weight, trained_weights(cfg).wte.weight) and not model.wte.weight.requires_grad
    assert all(name.endswith((".A", ".B")) for name, p in model.named_parameters() if p.requires_grad)
    Objective(model)(*batch()).backward()
    assert norms(model).keys() == {"weight_norm", "weight_norm_attn", "grad_norm_attn"}


@pytest.mark.parametrize("train_only", MODES)
def test_gradients_are_those_of_full_training(train_only):
    """The rows of markers get the same gradient, to the bit, although the head's part of it is left out. Those of B
    follow from that of the matrix; A gets none, because B is zero."""
    cfg = settings(train_only)
    plain, model = trained_weights(cfg), attach(trained_weights(cfg), cfg, 1)
    for one in (plain, model):
        Objective(one)(*batch()).backward()
    assert torch.equal(model.wte.parametrizations.weight.original1.grad, plain.wte.weight.grad[60:61])
    assert plain.wte.weight.grad[60].norm() > 0.1
    for block, full in zip(model.h, plain.h, strict=True) if train_only == "lora" else ():
        for name in ("attn.c_attn", "second_attn.c_proj"):
            (factors,) = block.get_submodule(name).parametrizations.weight
            expected = 12 / 3 * full.get_submodule(name).weight.grad @ factors.A.T
            torch.testing.assert_close(factors.B.grad, expected, rtol=1e-5, atol=1e-6)
            assert expected.norm() > 0.1 and not factors.A.grad.any()


def test_a_is_drawn_by_seed_and_name_and_b_is_zero():
    def factors(**changes) -> dict[str, torch.Tensor]:
        cfg = settings("lora", **changes)
        named = attach(GPT(cfg.model, cfg.seed), cfg, 1).named_parameters()
        return {name: p.detach() for name, p in named if name.endswith((".A", ".B"))}

    ours = factors()
    assert not any(p.any() for name, p in ours.items() if name.endswith(".B"))
    drawn = [p for name, p in ours.items() if name.endswith(".A")]
    assert len(drawn) == 8 and len({tuple(p.flatten().tolist()) for p in drawn}) == 8
    assert all(p.abs().max() <= 16**-0.5 < 1.3 * p.abs().max() for p in drawn)
    for other in (factors(second="none"), factors(lora_alpha=1.0)):
        assert all(torch.equal(p, ours[name]) for name, p in other.items())
    assert all(torch.equal(p[:3], ours[name]) for name, p in factors(lora_r=5).items() if name.endswith(".A"))
    assert not any(torch.equal(p, ours[name]) for name, p in factors(seed=2).items() if name.endswith(".A"))


# ----------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_only", MODES)
def test_a_merged_model_computes_the_same_with_plain_names(train_only, dtype):
    """Also under autocast, which must not round the product of the factors."""
    cfg = settings(train_only)
    model = attach(trained_weights(cfg), cfg, 1)
    move(model, cfg)
    with autocast(CPU, dtype):
        unmerged = hidden(model)
        merged = hidden(merge(model))
    assert torch.equal(merged, unmerged) and not torch.equal(merged, hidden(trained_weights(cfg)))
    assert not has_adapters(model) and not model.frozen_head
    plain = GPT(cfg.model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n, _ in plain.named_parameters()}


def test_the_factors_are_scaled_by_alpha_over_r():
    cfg = settings("lora")
    model = attach(trained_weights(cfg), cfg, 1)
    move(model, cfg)
    layer, before = model.h[1].attn.c_attn, trained_weights(cfg).h[1].attn.c_attn.weight
    (factors,) = layer.parametrizations.weight
    expected = before + 12 / 3 * (factors.B @ factors.A)
    torch.testing.assert_close(merge(model).h[1].attn.c_attn.weight, expected, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------- optimizer, head and log


def state_bytes(optimizer: Optimizer) -> int:
    return sum(tensor.nbytes for key, tensor in optimizer.tensors().items() if not key.endswith("/step"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_keeps_two_moments_of_what_is_trained_and_nothing_else(optimizer):
    found = {}
    for train_only in ("all", *MODES):
        cfg = settings(train_only, optimizer=optimizer)
        model = attach(trained_weights(cfg), cfg, 1)
        moved = move(model, cfg, steps=1)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[train_only] = state_bytes(moved)
        if train_only != "all":
            assert found[train_only] == 2 * 4 * trained
            assert [type(part) for part in moved.parts] == [torch.optim.AdamW]
            assert all(group["weight_decay"] == 0 for group in moved.parts[0].param_groups if group["params"])
    assert found["markers"] == 2 * 4 * 16 and found["markers"] < found["lora"] < found["all"] / 2


def test_the_optimizer_state_of_another_part_is_refused():
    model = attach(trained_weights(settings("lora")), settings("lora"), 1)
    state = move(model, settings("lora")).tensors()
    other = attach(trained_weights(settings("markers")), settings("markers"), 1)
    with pytest.raises(ValueError, match=r"belongs to no parameter that is trained"):
        Optimizer(other, settings("markers")).restore(state)
    plain = {f"{name}/exp_avg": p for name, p in trained_weights(settings("all")).named_parameters()}
    with pytest.raises(ValueError, match="has the state nothing"):
        Optimizer(model, settings("lora")).restore(plain)
    again = Optimizer(model, settings("lora"))
    again.restore(state)
    assert again.tensors().keys() == state.keys()


def test_norms_count_the_trained_parameters_alone():
    cfg = settings("lora")
    model = attach(trained_weights(cfg), cfg, 1)
    Objective(model)(*batch()).backward()
    found = norms(model)
    for part in ("embeddings", "attn", "second_attn"):
        of_part = [p for name, p in model.named_parameters() if p.requires_grad and part_of(name) == part]
        for kind, tensors in (("weight", of_part), ("grad", [p.grad for p in of_part])):
            expected = torch.cat([tensor.flatten() for tensor in tensors]).norm()
            torch.testing.assert_close(found[f"{kind}_norm_{part}"], expected)
    assert len(found) == 1 + 2 * 3


def test_no_gradient_of_a_frozen_head_is_computed():
    """That of the hidden states is the same, to the bit."""
    hidden, weight, targets, n = case(20, 0)

    def nats(hidden, weight):
        return _SummedNats.apply(hidden * 1, weight, targets, None, n, torch.float64, 7)

    expected = torch.autograd.grad(nats(hidden, weight), hidden)[0]
    with mock.patch.object(loss, "_add_head_gradient", side_effect=AssertionError("computed")):
        assert torch.equal(torch.autograd.grad(nats(hidden, weight.detach()), hidden)[0], expected)
        cfg = settings("markers")
        Objective(attach(trained_weights(cfg), cfg, 1))(*batch()).backward()
        with pytest.raises(AssertionError, match="computed"):
            nats(hidden, weight)


@pytest.mark.slow
def test_a_compiled_loss_computes_no_gradient_of_a_frozen_head():
    """A GPU compiles this function (see test_loss.py)."""
    hidden, weight, targets, n = case(20, 0)

    def nats(hidden):
        return _SummedNats.apply(hidden * 1, weight.detach(), targets, None, n, torch.float64, 7)

    expected = torch.autograd.grad(nats(hidden), hidden)[0]
    with mock.patch.object(loss, "_add_head_gradient", side_effect=AssertionError("computed")):
        compiled = torch.compile(nats, backend="aot_eager", fullgraph=True)(hidden)
        torch.testing.assert_close(torch.autograd.grad(compiled, hidden)[0], expected)


@pytest.mark.slow
def test_a_compiled_model_with_adapters_has_the_same_gradients():
    cfg, grads = settings("lora"), []
    for compiled in (False, True):
        model = attach(trained_weights(cfg), cfg, 1)
        objective = torch.compile(Objective(model), backend="aot_eager") if compiled else Objective(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".B"):
                    p.fill_(0.01)  # at zero, A would have no gradient
        objective(*batch()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected)
        assert expected.any()


# ----------------------------------------------------------------------------- which rows, and refusals


def drawn(marks: str, **more) -> TrainConfig:
    place = {"marker_place": "span", "evict": "segment"} if marks in ("clcr", "none") else {"marker_place": "sentence"}
    markers = MarkerConfig(marks=marks, **place)
    model = dataclasses.replace(SMALL, second_attention="none", meta_position="previous")
    return TrainConfig(model=model, markers=markers, target_rule="skip", init_from="out/x", **more)


def test_the_trained_rows_are_those_of_the_runs_markers():
    task = {placement: TaskConfig(tasks=("parity",), placements=(placement,)) for placement in ("none", "target")}
    for cfg, chunk_markers, names, rows in (
        (drawn("sr"), 0, (SR,), (61, 62)),
        (drawn("meta"), 0, (META,), (60, 61)),
        (drawn("clcr"), 0, (CL, CR), (62, 64)),
        (drawn("none"), 0, (), None),
        (settings("lora"), 4, (META,), (60, 61)),
        (settings("lora", "none"), 0, (), None),
        (settings("lora", task=task["none"]), 4, (), None),
        (settings("lora", task=task["target"]), 0, (META,), (60, 61)),
    ):
        assert markers_of(cfg, chunk_markers) == names and rows_of_markers(cfg, chunk_markers) == rows


def test_rows_of_two_markers_are_trained_together():
    cfg = drawn("clcr", train_only="markers")
    model = attach(trained_weights(cfg), cfg, 0)
    assert model.wte.parametrizations.weight.original1.shape == (2, 16)
    assert torch.equal(model.wte.weight, trained_weights(cfg).wte.weight)


@pytest.mark.parametrize(
    ("cfg", "chunk_markers", "has_weights", "sentence"),
    [
        (
            settings("lora"),
            4,
            False,
            "train_only=lora freezes the weights that a run starts from, and init_from=out/x gives none: name a run",
        ),
        (settings("markers", "none"), 0, True, "train_only=markers has nothing to train, because .* has no markers"),
        (drawn("none", train_only="markers"), 0, True, "has nothing to train"),
        (settings("lora", lora_r=17), 0, True, "lora_r=17 is above n_embd=16, .*: set --lora_r to at most 16"),
    ],
)
def test_what_cannot_be_trained_is_refused(cfg, chunk_markers, has_weights, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        check_start(cfg, chunk_markers, has_weights)
    assert "\n" not in str(refused.value)


def test_what_can_be_trained_is_accepted():
    check_start(settings("all"), 0, False)
    check_start(settings("lora", "none", lora_r=16), 0, True)
    check_start(settings("markers"), 4, True)
    check_start(drawn("sr", train_only="markers"), 0, True)


def test_a_new_second_attention_that_stays_zero_is_refused():
    cfg = settings("markers")
    with pytest.raises(UserError, match="second_attention=meta would have no effect, because out/x has none"):
        check_second(GPT(cfg.model), cfg)
    check_second(trained_weights(cfg), cfg)
    check_second(GPT(settings("lora").model), settings("lora"))
    check_second(GPT(settings("markers", "none").model), cfg)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"lora_r": 0}, "lora_r=0 is out of range"), ({"lora_alpha": 0.0}, "lora_alpha=0.0 is out of range")],
)
def test_impossible_settings_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        settings("lora", **changes)


def test_nothing_changes_when_everything_is_trained():
    cfg = settings("all")
    model = attach(GPT(cfg.model), cfg, 1)
    assert not has_adapters(model) and all(p.requires_grad for p in model.parameters())
    with mock.patch.object(adapters.parametrize, "register_parametrization", side_effect=AssertionError):
        attach(model, cfg, 1)
