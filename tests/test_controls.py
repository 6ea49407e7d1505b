"""Tests the control arms: their parameter counts, and that every arm trains and generates text."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nanometa.config import TrainConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.command_line import load_config
from nanometa.data.layout import Draw, random_positions
from nanometa.data.loader import Windows
from nanometa.inference.generation import MarkerPlan, lay_out
from nanometa.inference.scoring import hidden_states, score, text_batch
from nanometa.model import GPT
from nanometa.training.checkpoint import Run, load_run
from tests.conftest import ROOT, TINY, cli, losses, override
from tests.reference.generate import next_logits

# windows of arms without markers contain only content
CONTROLS = {
    "random": ("--second_attention=random", "--random_fraction=0.25", "--dataset=data/n", "--block_size=28"),
    "widemlp": ("--second_attention=none", "--n_inner=192", "--dataset=data/n", "--block_size=28"),
    "pause": ("--second_attention=none", "--dataset=data/u", "--block_size=32"),
    "causal2_markers": ("--second_attention=causal", "--dataset=data/u", "--block_size=32"),
    "diagonal": ("--second_attention=diagonal", "--dataset=data/u", "--block_size=32"),
    "meta_mean": ("--second_attention=meta_mean", "--dataset=data/u", "--block_size=32"),
    "read_meta": ("--second_attention=read_meta", "--dataset=data/u", "--block_size=32", "--position=rope"),
    "unplaced": ("--meta_position=none", "--position=rope", "--dataset=data/u", "--block_size=32"),
    "unplaced_pause": ("--meta_position=none", "--second_attention=none", "--dataset=data/u", "--block_size=32"),
}


def test_every_second_attention_has_a_run_in_controls():
    trained = {setting.split("=")[1] for args in CONTROLS.values() for setting in args if "second_attention" in setting}
    others = {"meta", "causal"}  # tests/test_train.py trains these
    assert trained | others == set(SECOND_ATTENTIONS), "add a run of the new second attention to CONTROLS"


@pytest.mark.parametrize(
    ("size", "vocabulary", "counts"),
    [
        ("{}_gpt2", (50304, 50257), {"meta": 151_908_096, "widemlp": 151_898_880, "pause": 123_587_328}),
        ("tiny_{}", (4160, 4096), {"meta": 3_160_512, "widemlp": 3_159_744, "pause": 2_569_920}),
    ],
)
def test_controls_have_the_expected_numbers_of_parameters(size, vocabulary, counts):
    """The position table is not counted, because it depends on the window. The widened MLP lacks only ln_second."""
    found = {}
    like_meta = ("causal2", "random", "causal2_markers", "diagonal", "meta_mean", "read_meta")
    for arm in ("meta", "widemlp", "pause", *like_meta):
        cfg = load_config(TrainConfig, [f"{ROOT}/config/{size.format(arm)}.py", f"--vocab_size={vocabulary[0]}",
                                        f"--content_vocab_size={vocabulary[1]}"], config_file=True).model  # fmt: skip
        with torch.device("meta"):
            found[arm] = GPT(cfg).num_params(position_table=False)
        if arm == "widemlp":
            assert counts["meta"] - found[arm] == cfg.n_layer * cfg.n_embd
    assert found == {**counts, **dict.fromkeys(like_meta, counts["meta"])}
    assert 0.999 < found["widemlp"] / found["meta"] < 1


def train(workdir, name: str, *args: str):
    command = override(TINY, *CONTROLS[name], f"--run_name={name}", "--max_steps=12", "--learning_rate=3e-3", *args)
    result = cli("train.py", *command, cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    return workdir / "out" / name


@pytest.mark.parametrize("name", [name for name in CONTROLS if name != "random"])
def test_every_control_trains_and_generates_text(workdir, name):
    run_dir = train(workdir, name)
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.1
    saved = json.loads((run_dir / "config.json").read_text())["config"]["model"]
    for setting in CONTROLS[name]:
        key, value = setting[2:].split("=")
        assert key == "dataset" or str(saved[key]) == value
    result = cli("sample.py", f"--run=out/{name}", "--prompt=the cat", "--max_new_tokens=40", "--show_markers=yes",
                 cwd=workdir)  # fmt: skip
    out = result.stdout.decode()
    assert result.returncode == 0 and out.replace("<|meta|>", "").startswith("the cat"), result.stderr.decode()
    assert ("<|meta|>" in out) == ("data/u" in " ".join(CONTROLS[name]))


@pytest.fixture(scope="module")
def random_dir(workdir) -> Path:
    return train(workdir, "random", "--position=rope", "--seed=5")


def test_the_random_arm_is_evaluated_with_the_draws_of_its_seed(random_dir, workdir):
    assert losses(random_dir)[-1] < losses(random_dir)[0] - 0.1
    run, found = load_run(random_dir / "step_00000012"), {}
    for block in run.model.h:  # the weights started at zero and would still be zero if no position had been connected
        assert block.second_attn.c_proj.weight.abs().max() > 1e-3
    for seed in (5, 6):
        data = Windows(workdir / "data/n", "val", 28, "ignore", Draw(0.25, seed, "val"))
        batch = data.batch(np.arange(data.n_windows))
        with torch.no_grad():
            logits = run.model.logits(run.model(batch.tokens, batch.positions, batch.meta_index)).flatten(0, 1)
        found[seed] = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=-100).item()
    recorded = losses(random_dir, "final")[0]
    assert recorded == pytest.approx(found[5], rel=1e-6) and recorded != pytest.approx(found[6], rel=2e-6)


@pytest.fixture(scope="module")
def random_run(random_dir) -> Run:
    run = load_run(random_dir)
    for block in run.model.h:  # so that a wrong draw changes the text
        torch.nn.init.normal_(block.second_attn.c_proj.weight, std=0.3)
    return run


def test_the_random_arm_generates_with_one_fixed_draw_of_positions(random_run, workdir):
    ids = list(range(10))
    drawn = random_positions(np.array([0]), 28, 0.25, 5, "generated")[0]
    inside = torch.tensor([[position for position in drawn.tolist() if position < 10]])
    assert 0 < inside.numel() < 7 == len(drawn)
    model, tokens = random_run.model, torch.tensor([ids])
    ours = hidden_states(model, text_batch(random_run, ids))[0]
    assert torch.equal(ours, model(tokens, torch.arange(10)[None], inside)[0])
    idle = model(tokens, torch.arange(10)[None], torch.empty(1, 0, dtype=torch.long))[0]
    assert (ours - idle).abs().max() > 1e-2
    # later tokens do not change the states of earlier ones
    for n in range(1, 10):
        again = hidden_states(model, text_batch(random_run, ids[:n]))[0]
        torch.testing.assert_close(again, ours[:n], rtol=1e-4, atol=1e-5)
    result = cli("sample.py", "--run=out/random", "--prompt=the cat", "--max_new_tokens=60", cwd=workdir)
    assert result.returncode == 0 and result.stdout.startswith(b"the cat"), result.stderr.decode()


def test_the_random_arm_scores_text_with_the_draw_it_generates_with(random_run):
    plan = MarkerPlan.of_run(random_run)
    ids, nats = score(random_run, "the cat sat on a mat", plan)
    prefix = lay_out(random_run, np.array([], dtype=int), plan)
    precise = dataclasses.replace(random_run, model=copy.deepcopy(random_run.model).double())
    for token, value in zip(ids, nats, strict=True):
        assert value == pytest.approx(-next_logits(precise, prefix).log_softmax(-1)[token].item(), abs=1e-4)
        prefix.append(token)
