"""Tests the sample texts of a run: they come from the present weights, and the run does not notice them."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.inference.generation import MarkerPlan, generate, lay_out
from nanometa.inference.training_samples import NEW_TOKENS, TrainingSamples
from nanometa.training.checkpoint import load_run
from tests.conftest import TWO, override
from tests.runs import run_on
from tests.training_runs import BASE, equal, final, metrics, run

ARGS = ("--max_steps=25", "--dropout=0.1", "--micro_batch_size=4")


def samples_in(folder: Path) -> dict[int, str]:
    """Returns the samples in the log of a run by step."""
    found = re.findall(r"^step +([\d,]+)  sample: (.*)$", (folder / "train.log").read_text(), re.M)
    return {int(step.replace(",", "")): text for step, text in found}


def text_of(folder: Path, prompt: str) -> str:
    """Returns what a checkpoint generates, as one line of the log."""
    loaded = load_run(folder)
    plan, tokenizer = MarkerPlan.of_run(loaded), loaded.tokenizer
    ids = lay_out(loaded, tokenizer.encode_prompt(prompt), plan)
    ids += list(generate(loaded, ids, plan, NEW_TOKENS))
    return tokenizer.decode(token for token in ids[ids.index(tokenizer.eot) + 1 :] if token < tokenizer.n_content)


@pytest.fixture(scope="module")
def sampled(workdir) -> Path:
    return run(workdir, "sampled", *ARGS, "--sample_interval=10", "--sample_prompt=the cat", "--keep=9")


def test_a_sample_is_what_the_checkpoint_of_the_step_generates(sampled):
    samples = samples_in(sampled)
    assert list(samples) == [10, 20, 25] and len(set(samples.values())) == 3
    for step, text in samples.items():
        expected = text_of(sampled / f"step_{step:08d}", "the cat")
        assert text == "".join(c if c.isprintable() else repr(c)[1:-1] for c in expected)
        assert text.startswith("the cat")


def test_samples_change_no_bit_of_the_run(workdir, sampled):
    plain = run(workdir, "unsampled", *ARGS, "--keep=9")
    assert not samples_in(plain)
    assert metrics(sampled) == metrics(plain) and equal(final(sampled), final(plain))
    lines = [json.loads(line)["kind"] for line in (sampled / "metrics.jsonl").read_text().splitlines()]
    assert set(lines) == {"train", "val", "final"}


def test_a_sample_leaves_the_model_and_the_random_generators_alone(workdir):
    loaded = run_on(workdir / "data/u", dropout=0.5)
    loaded.model.train()
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    samples = TrainingSamples(loaded, "the", torch.float32)
    first, second = samples.text(), samples.text()
    assert first == second and first.startswith("the") and len(first) > NEW_TOKENS // 2
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.random.get_state()[1].tolist() == states[1]
    assert all(module.training for module in loaded.model.modules())
    assert equal(dict(loaded.model.state_dict()), before)
    assert all(p.requires_grad and p.grad is None for p in loaded.model.parameters())
    loaded.model.eval()
    assert samples.text() == first  # without the dropout of training


def test_a_failed_sample_says_why_and_ends_nothing(workdir):
    loaded = run_on(workdir / "data/n")
    samples = TrainingSamples(loaded, "", torch.float32)
    with torch.no_grad():
        loaded.model.wte.weight.fill_(float("nan"))
    assert samples.text().startswith("(none: the logits of out/small are not finite")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--sample_interval=0",), "sample_interval=0 is out of range: it must be at least 1, or None"),
        (("--sample_prompt=x",), "--sample_prompt has no effect: it is only used with --sample_interval"),
        (("--sample_interval=5", f"--sample_prompt={'the cat sat ' * 40}"), "positions with its markers, but"),
        (("--sample_interval=5", "--sample_prompt=a<|meta|>", "--dataset=data/n", "--block_size=28",
          "--second_attention=none"),
         "cannot be continued: the text contains <|meta|>, and out/refused was trained without such markers"),
    ],
)  # fmt: skip
def test_a_sample_that_the_run_cannot_make_is_refused_at_the_start(workdir, monkeypatch, args, sentence):
    monkeypatch.chdir(workdir)
    with pytest.raises(UserError) as refused:
        train.main(override(BASE, "--run_name=refused", "--max_steps=1", *args))
    assert sentence in str(refused.value)
    assert not (workdir / "out/refused").exists()


@pytest.mark.slow
def test_two_processes_print_the_samples_of_one(workdir, sampled):
    args = ("--max_steps=25", "--sample_interval=10", "--sample_prompt=the cat", "--micro_batch_size=4")
    two = run(workdir, "sampled_two", *args, launcher=TWO)
    one = run(workdir, "sampled_one", *args)
    assert list(samples_in(two)) == [10, 20, 25] and samples_in(two)[10] == samples_in(one)[10]
    plain = run(workdir, "plain_two", "--max_steps=25", "--micro_batch_size=4", launcher=TWO)
    assert metrics(two) == metrics(plain) and equal(final(two), final(plain))
