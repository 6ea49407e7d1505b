"""Tests runs that continue in a longer window, and runs that are only read in one."""

import dataclasses
import json

import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.config import Rescale
from nanometa.data.inject import strip
from nanometa.evals import perplexity
from nanometa.evals import tasks as task_eval
from nanometa.evals.common import read_split
from nanometa.evals.perplexity import PerplexityEval
from nanometa.evals.tasks import TasksEval
from nanometa.train import main as train_main
from nanometa.training.checkpoint import load_run
from nanometa.training.context_extension import interpolated, rescaled
from tests.conftest import TINY, cli, losses, override, refusal
from tests.training_runs import equal, final

TEXT = (*TINY, "--dataset=data/u", "--block_size=32", "--max_steps=8")
# the settings that are not of the model; those of the model come from the base run
MODEL = ("--n_layer", "--n_head", "--n_embd", "--block_size", "--position", "--second_attention")
LONGER = [arg for arg in TEXT if not arg.startswith(MODEL)]


def train(workdir, name, *args, base=TEXT):
    result = cli("train.py", *override(base, f"--run_name={name}", *args), cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    return workdir / "out" / name


@pytest.fixture(scope="module")
def rope(workdir):
    return train(workdir, "rope", "--position=rope", "--target_rule=skip")


@pytest.fixture(scope="module")
def four(workdir, rope):
    return train(workdir, "four", "--init_from=out/rope", "--rope_scaling=yarn", "--rope_factor=4", base=LONGER)


def test_a_run_continues_in_a_longer_window(workdir, rope, four):
    """The model's settings, weights and target rule come from the base run. The new window is four chunks long."""
    was, now = load_run(rope).config, load_run(four).config
    assert (now.model.block_size, now.model.original_block_size) == (4 * was.model.block_size, was.model.block_size)
    assert (now.model.rope_scaling, now.model.position, now.target_rule) == ("yarn", "rope", "skip")
    assert now.model.n_embd == was.model.n_embd and now.model.second_attention == "meta"
    said = (four / "train.log").read_text()
    assert f"windows of {4 * was.model.block_size} positions" in said and "out/rope" in said
    still = train(
        workdir, "still", "--init_from=out/rope", "--rope_scaling=yarn", "--rope_factor=4", "--max_steps=1",
        "--learning_rate=1e-30", "--min_lr=0", base=LONGER,
    )  # fmt: skip
    weights = [load_run(folder).model.state_dict() for folder in (rope, still)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-12)


def test_a_resumed_extension_equals_an_uninterrupted_one(workdir, four):
    args = ("--rope_scaling=yarn", "--rope_factor=4", "--lr_decay_steps=8")
    train(workdir, "halves", "--init_from=out/rope", *args, "--max_steps=5", base=LONGER)
    halves = train(workdir, "halves", "--init_from=resume", *args, base=LONGER)
    assert equal(final(halves), final(four)) and losses(halves) == losses(four)


def test_extended_runs_extend_further_and_learn_tasks(workdir, four):
    """Factors are relative to the window before any extension, and an extended run can be fine-tuned on tasks."""
    eight = train(
        workdir,
        "eight",
        "--init_from=out/four",
        "--rope_scaling=yarn",
        "--rope_factor=8",
        "--yarn_ramp=paper",
        base=LONGER,
    )
    m = load_run(eight).config.model
    assert (m.block_size, m.original_block_size, m.yarn_ramp) == (256, 32, "paper")
    plain = train(workdir, "plain", "--init_from=out/rope", "--rope_factor=4", base=LONGER)
    m = load_run(plain).config.model
    assert (m.block_size, m.rope_scaling, m.original_block_size) == (128, "none", 32)
    tasks = train(
        workdir, "tasks", "--init_from=out/four", "--tasks", "parity", "--train_length=64", "--level=easy",
        "--max_steps=2", base=LONGER,
    )  # fmt: skip
    assert load_run(tasks).config.model == load_run(four).config.model
    lines = evaluated(workdir, task_eval, TasksEval(run=str(tasks), lengths=(64,), n=4))
    assert [(line["arm"], line["scaling"]) for line in lines] == [("meta + rope, yarn 4x", "yarn 4x")]


@pytest.fixture(scope="module")
def learned(workdir):
    return train(workdir, "learned", "--position=learned")


def test_a_learned_position_table_is_interpolated(workdir, learned):
    args = ("--init_from=out/learned", "--rope_scaling=pi", "--rope_factor=2", "--learning_rate=1e-30", "--min_lr=0")
    longer = train(workdir, "learned2", *args, "--max_steps=1", base=LONGER)
    table, found = (load_run(folder).model.wpe.weight for folder in (learned, longer))
    torch.testing.assert_close(found, interpolated(table, 2.0, 64), rtol=0, atol=1e-12)
    assert "wpe.weight is interpolated from 32 to 64 positions" in (longer / "train.log").read_text()
    # reading the base run with interpolation gives the same table without training
    read = rescaled(load_run(learned), Rescale("pi", 2.0))
    assert torch.equal(read.model.wpe.weight, interpolated(table, 2.0, 64)) and read.config.model.block_size == 64


def evaluated(workdir, which, config) -> list[dict]:
    output = workdir / "lines.jsonl"
    output.unlink(missing_ok=True)
    which.main(dataclasses.replace(config, output=str(output), device="cpu"))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_run_is_read_with_any_scaling_at_any_length(workdir, rope):
    """Scaling changes the predictions; dynamic scaling does so only beyond the trained window."""
    found = {}
    for how in (None, ("pi", 3.0), ("ntk", 3.0), ("yarn", 3.0), ("yarn", 1.0, True), ("none", 3.0)):
        run = load_run(rope)
        for block in run.model.h:
            block.attn.c_attn.weight.data *= 30  # eight steps leave attention nearly uniform
        run = rescaled(run, Rescale(*how) if how else Rescale())
        content = strip(read_split(run, workdir / "data/u", 400), run.tokenizer.meta)
        for length in (32, 96):
            found[how, length] = perplexity.measure_perplexity(run, [content], length, length, 64)["loss"]
    assert found[None, 96] == found[("none", 3.0), 96]
    assert found[None, 32] == pytest.approx(found[("yarn", 1.0, True), 32], abs=1e-6)
    for length, different in ((32, 4), (96, 5)):
        losses_ = sorted({round(loss, 4) for (_, at), loss in found.items() if at == length})
        assert len(losses_) == different


def test_json_lines_name_the_scaling_that_a_run_was_read_with(workdir, rope):
    cfg = PerplexityEval(run=str(rope), dataset=str(workdir / "data/u"), markers=("none",), max_tokens=100)
    for rescale, scaling in (
        (Rescale(), "none"),
        (Rescale("yarn", 3.0), "yarn 3x"),
        (Rescale("ntk", 1.0, True), "ntk dynamic"),
        (Rescale("none", 4.0), "none 4x"),
    ):
        (line,) = evaluated(workdir, perplexity, dataclasses.replace(cfg, rescale=rescale, lengths=(64,)))
        given = "" if rescale.rope_scaling is None else f", read with {scaling}"
        assert (line["scaling"], line["arm"]) == (scaling, f"meta + rope{given}")


def test_sampling_uses_the_longer_window(workdir, rope):
    """The prompt has more positions than the trained window."""
    args = ("sample.py", "--run=out/rope", f"--prompt={'the cat ' * 20}", "--max_new_tokens=20", "--device=cpu")
    assert "the model's window has 32" in refusal(cli(*args, cwd=workdir))
    written = cli(*args, "--rope_scaling=yarn", "--rope_factor=4", cwd=workdir)
    assert written.returncode == 0, written.stderr.decode()
    assert written.stdout.decode().startswith("the cat " * 20)


REFUSALS = {
    "dynamic": (("--rope_scaling=yarn", "--rope_dynamic"), "rope_dynamic=True only works for reading a trained run"),
    "part": (("--rope_scaling=pi", "--rope_factor=1.3"), "rope_factor=1.3 would turn 32 positions into 41.60"),
    "chunks": (
        ("--rope_scaling=pi", "--rope_factor=1.5"),
        "block_size=48 is not a whole number of the 32-position chunks",
    ),
    "shape": (
        ("--rope_scaling=yarn", "--rope_factor=4", "--n_layer=3"),
        "n_layer=3 differs from n_layer=2 of the model in out/rope",
    ),
    "window": (
        ("--rope_scaling=yarn", "--rope_factor=4", "--block_size=64"),
        "block_size=64 differs from the 128 positions that out/rope",
    ),
    "no base": (
        ("--init_from=scratch", "--rope_factor=4"),
        "extends the window of a trained run, and no run is given: add --init_from=out/NAME",
    ),
    "other base": (("--init_from=out/learned", "--rope_scaling=yarn", "--rope_factor=4"), "needs position=rope"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_settings_are_refused(case, workdir, rope, learned, monkeypatch):
    monkeypatch.chdir(workdir)
    args, sentence = REFUSALS[case]
    with pytest.raises(UserError) as refused:
        train_main(override((*LONGER, "--init_from=out/rope", "--run_name=refused"), *args))
    assert sentence in str(refused.value)
    assert not (workdir / "out/refused").exists()


def test_an_extended_run_cannot_continue_without_its_scaling(workdir, four, monkeypatch):
    args = override(TEXT, "--position=rope", "--init_from=out/four", "--run_name=refused", "--target_rule=skip")
    monkeypatch.chdir(workdir)
    with pytest.raises(UserError, match="rope_scaling=none, but out/four"):
        train_main(args)
