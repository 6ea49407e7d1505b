"""Tests the schedules against their formulas, Muon's updates, and wsd runs that branch from one trunk."""

import dataclasses
import json

import pytest
import torch

from nanometa.config import GPTConfig, TrainConfig
from nanometa.model import GPT
from nanometa.training.optimizer import MUON_BATCH, Muon, Optimizer, learning_rate, norms, part_of
from tests.conftest import cli, override, refusal
from tests.training_runs import BASE, equal, final, metrics, run

CFG = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64, content_vocab_size=60, bias=True)


def rates(**changes) -> list[float]:
    cfg = dataclasses.replace(CFG, **changes)
    return [learning_rate(step, cfg) for step in range(200)]


def test_every_schedule_begins_with_a_linear_warm_up():
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(schedule=schedule)[:11] == pytest.approx([(i + 1) / 11 for i in range(11)])


def test_cosine_decays_to_min_lr_and_stays_there():
    found = rates()
    assert found[60] == pytest.approx(0.55) and found[110] == pytest.approx(0.1) == found[199]
    assert found[10:111] == sorted(found[10:111], reverse=True)
    assert rates(lr_decay_steps=60)[60] == pytest.approx(0.1)


def test_wsd_is_constant_and_then_decays_as_one_minus_square_root():
    found = rates(schedule="wsd", decay_fraction=0.2)  # the decay takes the last 22 of 110 steps
    assert set(found[10:89]) == {1.0} and found[89] < 1 and found[110] == pytest.approx(0.1) == found[199]
    assert found[88 + 11] == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5))
    assert set(rates(schedule="constant")[10:]) == {1.0}


def test_the_constant_part_of_wsd_does_not_depend_on_the_number_of_steps():
    assert rates(schedule="wsd", max_steps=100)[:80] == rates(schedule="wsd", max_steps=1000)[:80]


def model_with_gradients() -> GPT:
    model = GPT(SHAPE, seed=1)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


def test_muon_updates_exactly_the_matrices_of_the_blocks():
    model = model_with_gradients()
    muon, adamw = Optimizer(model, dataclasses.replace(CFG, optimizer="muon")).parts
    names = {id(p): name for name, p in model.named_parameters()}
    mine = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert mine == {name for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    assert "wte.weight" not in mine and len(mine) == 2 * 6
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert mine | rest == set(names.values()) and not mine & rest


def test_muon_updates_are_near_orthogonal_and_of_the_size_of_adamws():
    """All singular values of an update are about equal, and its root mean square is 0.2 learning rates."""
    model = model_with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Optimizer(model, dataclasses.replace(CFG, optimizer="muon", weight_decay=0.0)).step(0.01)
    for name, p in model.named_parameters():
        update = (p.detach() - before[name]).float()
        assert p.grad is None and update.abs().max() > 0
        if name.startswith("h.") and p.dim() == 2:
            values = torch.linalg.svdvals(update) / (0.01 * 0.2 * max(p.shape) ** 0.5)
            assert 0.5 < values.min() and values.max() < 1.35, (name, values)
            assert update.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)


@pytest.mark.parametrize("most", [MUON_BATCH, 30])  # all matrices of a shape at once, or one by one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_muon_makes_the_updates_of_torchs_muon(monkeypatch, dtype, most):
    monkeypatch.setattr("nanometa.training.optimizer.MUON_BATCH", most)
    # torch's Muon always computes in bfloat16, so in fp32 the updates agree only up to its rounding
    monkeypatch.setattr("nanometa.training.optimizer.pick_dtype", lambda dtype_name, device: (dtype, ""))
    shapes, generator = [(6, 4), (4, 6), (5, 5), (6, 4), (4, 6)], torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    batched = Muon(ours, weight_decay=0.1)
    single = torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in (batched, single):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=3 * 0.1 * 0.2 * 2.5 * 0.02)  # 2 % of three updates
        assert batched.state[a].keys() == single.state[b].keys()
        torch.testing.assert_close(batched.state[a]["momentum_buffer"], single.state[b]["momentum_buffer"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_applies_only_to_matrices(optimizer):
    model = model_with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizer(model, dataclasses.replace(CFG, optimizer=optimizer, weight_decay=0.5)).step(0.1)
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if p.dim() == 2 else 1)
        torch.testing.assert_close(p.detach(), expected)


def test_norms_by_part_add_up_to_the_norm_of_the_model():
    model = model_with_gradients()
    found = {name: value.item() for name, value in norms(model).items()}
    parts = {part_of(name) for name, _ in model.named_parameters()}
    assert parts == {"embeddings", "attn", "second_attn", "mlp", "norms"}
    for kind, tensors in (("weight", list(model.parameters())), ("grad", [p.grad for p in model.parameters()])):
        whole = sum(tensor.double().square().sum().item() for tensor in tensors)
        assert sum(found[f"{kind}_norm_{part}"] ** 2 for part in parts) == pytest.approx(whole, rel=1e-5)
    assert found["weight_norm"] ** 2 == pytest.approx(sum(found[f"weight_norm_{part}"] ** 2 for part in parts))


def test_a_resumed_run_with_muon_equals_an_uninterrupted_one_to_the_bit(workdir):
    straight = run(workdir, "muon", "--optimizer=muon", "--max_steps=12", "--save_interval=6")
    run(workdir, "muon2", "--optimizer=muon", "--max_steps=6", "--lr_decay_steps=12")
    resumed = run(workdir, "muon2", "--optimizer=muon", "--max_steps=12", "--init_from=resume", "--lr_decay_steps=12")
    assert equal(final(straight), final(resumed))
    assert any(name.endswith("/momentum_buffer") for name in final(straight))
    lines = metrics(straight)
    assert lines[-1]["bits_per_byte"] < 0.99 * lines[0]["bits_per_byte"]
    assert lines[1]["weight_norm_second_attn"] > 0 and lines[2]["grad_norm_mlp"] > 0
    args = (*BASE, "--run_name=muon2", "--init_from=resume", "--max_steps=15")
    assert "optimizer=adamw differs from optimizer=muon of out/muon2/" in refusal(
        cli("train.py", *override(args), cwd=workdir)
    )


def test_branches_of_a_trunk_equal_wsd_runs_of_their_length(workdir):
    wsd = ("--schedule=wsd", "--decay_fraction=0.25", "--save_interval=1")
    trunk = run(workdir, "trunk", "--schedule=constant", "--max_steps=9", "--save_interval=3", "--keep=9")
    for steps, branch_at in ((8, 6), (12, 9)):
        alone = run(workdir, f"alone{steps}", *wsd, f"--max_steps={steps}")
        before = {path: path.stat().st_mtime_ns for path in trunk.rglob("*")}
        branch_from = f"--branch_from=out/trunk/step_{branch_at:08d}"
        branch = run(workdir, f"branch{steps}", *wsd, f"--max_steps={steps}", branch_from)
        assert equal(final(branch), final(alone))
        assert metrics(branch)[-1] == metrics(alone)[-1]
        assert f"started from branch of out/trunk/step_{branch_at:08d} (scratch)" in (branch / "train.log").read_text()
        assert {path: path.stat().st_mtime_ns for path in trunk.rglob("*")} == before
        assert json.loads((branch / "config.json").read_text())["config"]["branch_from"].endswith(f"{branch_at:08d}")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--branch_from=out/nothing"], "branch_from=out/nothing is not a checkpoint: name a run"),
        (
            ["--branch_from=out/trunk2"],
            "is not a checkpoint: the checkpoints of out/trunk2 are step_00000003",
        ),
        (["--branch_from=out/trunk2/BEST"], "contains weights but no optimizer state: give a step_ folder"),
        (
            ["--branch_from=out/trunk2/step_00000003", "--max_steps=2"],
            "max_steps=2 is less than the 3 steps that out/trunk2/step_00000003 has done",
        ),
        (
            ["--branch_from=out/trunk2/step_00000003", "--seed=5"],
            "seed=5 differs from seed=1337 of out/trunk2/step_00000003",
        ),
        (["--branch_from=out/trunk2/step_00000003", "--init_from=resume"], "both given"),
    ],
)
def test_impossible_branches_are_refused(workdir, args, sentence):
    if not (workdir / "out/trunk2").exists():
        run(workdir, "trunk2", "--schedule=constant", "--max_steps=3", "--save_interval=3")
    best = next((workdir / "out/trunk2").glob("best_*")).name
    args = [arg.replace("BEST", best) for arg in args]
    base = (*BASE, "--run_name=fails", "--max_steps=9")
    error = refusal(cli("train.py", *override(base, *args), cwd=workdir))
    assert sentence in error
    assert not (workdir / "out/fails").exists()
