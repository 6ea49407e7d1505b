"""Trains markers and LoRA from a plain run on the command line, and uses the results as any other run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.training.checkpoint import load_run, open_run
from nanometa.training.dataset import open_windows
from nanometa.training.distributed import Dist
from nanometa.training.evaluation import evaluate
from tests.conftest import TINY, TWO, cli, losses, override, refusal
from tests.test_sentinels import settings
from tests.training_runs import equal, final, metrics, run

PLAIN = ("--dataset=data/n", "--block_size=28", "--second_attention=none", "--position=rope")
LORA = ("--init_from=out/plain", "--train_only=lora", "--lora_r=4")


def sentinels(name: str, position: str = "rope") -> list[str]:
    """Returns the settings of config/tiny_sr.py or tiny_clcr.py for the small datasets."""
    return override(tuple(settings(name)), f"--position={position}")


@pytest.fixture(scope="module")
def plain(workdir) -> Path:
    """A run without markers, whose tokenizer has room for them."""
    return run(workdir, "plain", "--max_steps=6", "--eval_interval=6", *PLAIN)


@pytest.fixture(scope="module")
def tuned(workdir, plain) -> Path:
    """Sentence sentinels, trained with LoRA in a plain run, without interruption."""
    return run(workdir, "tuned", "--max_steps=8", "--save_interval=4", "--eval_interval=4", *LORA, *sentinels("sr"))


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_run(run_dir).model.state_dict()


def steps(run_dir: Path) -> Path:
    return run_dir / (run_dir / "latest").read_text().strip()


# ----------------------------------------------------------------------------- training


def test_lora_in_text_without_markers_starts_at_the_loss_of_its_base(workdir, plain):
    """It is the control: the same steps without sentinels."""
    control = run(workdir, "control", "--max_steps=4", *PLAIN, *LORA)
    assert losses(control, "val")[0] == losses(plain, "val")[-1]
    was, now = state(steps(plain)), state(steps(control))
    for weights in (was, now):
        weights["wte.weight"] = weights["wte.weight"][:300]  # rows that no text of either run has become the mean
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    assert changed == {f"h.{i}.attn.{layer}.weight" for i in range(2) for layer in ("c_attn", "c_proj")}
    log = (control / "train.log").read_text()
    trained = 2 * 4 * (32 + 96 + 32 + 32)
    assert f"; {trained:,} of them are trained, by AdamW without weight decay" in log
    line = next(line for line in metrics(control) if line["kind"] == "train")
    assert line["grad_norm_attn"] > 0 and "grad_norm_mlp" not in line


def test_a_plain_run_learns_sentence_sentinels(workdir, plain, tuned):
    was, now = state(steps(plain)), state(steps(tuned))
    n, row = 300, 301  # content rows, and <|sr|>
    assert torch.equal(now["wte.weight"][:n], was["wte.weight"][:n])
    rows = now["wte.weight"][n:]
    mean = was["wte.weight"][:n].mean(0)
    torch.testing.assert_close(rows[[0, 2, 3]], mean.expand(3, -1))
    assert (rows[1] - mean).norm() > 1e-3
    frozen = {name for name in was if not name.endswith(("attn.c_attn.weight", "attn.c_proj.weight", "wte.weight"))}
    assert all(torch.equal(was[name], now[name]) for name in frozen) and len(frozen) > 8
    assert losses(tuned, "val")[-1] < losses(tuned, "val")[0]
    saved = safetensors.torch.load_file(steps(tuned) / "optimizer.safetensors")
    assert {name.split(".parametrizations.")[0].split(".")[-1] for name in saved} == {"wte", "c_attn", "c_proj"}
    whole = safetensors.torch.load_file(steps(plain) / "optimizer.safetensors")
    assert sum(p.nbytes for p in saved.values()) < sum(p.nbytes for p in whole.values()) / 8
    assert saved["wte.parametrizations.weight.original1/exp_avg"].shape == (1, 32) and row == n + 1


PARTS = ("--save_interval=4", "--eval_interval=4", "--lr_decay_steps=8", "--lora_r=4", "--train_only=lora")


def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_bit(workdir, tuned):
    run(workdir, "parts", "--max_steps=4", *PARTS, "--init_from=out/plain", *sentinels("sr"))
    resumed = run(workdir, "parts", "--max_steps=8", *PARTS, "--init_from=resume", *sentinels("sr"))
    assert equal(final(resumed), final(tuned))
    assert any(name.endswith(".parametrizations.weight.0.A") for name in final(resumed))


@pytest.fixture(scope="module")
def two(workdir, plain) -> Path:
    """The run `tuned` on two processes."""
    args = (*PARTS, "--max_steps=8", "--micro_batch_size=4", "--init_from=out/plain", *sentinels("sr"))
    return run(workdir, "two", *args, launcher=TWO)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tuned, two):
    assert losses(two) == pytest.approx(losses(tuned), rel=1e-5, abs=1e-5)
    assert final(two).keys() == final(tuned).keys()


@pytest.mark.slow
def test_an_interrupted_run_on_two_processes_equals_an_uninterrupted_one_to_the_bit(workdir, two):
    args = (*PARTS, "--micro_batch_size=4", *sentinels("sr"))
    run(workdir, "two_parts", "--max_steps=4", *args, "--init_from=out/plain", launcher=TWO)
    resumed = run(workdir, "two_parts", "--max_steps=8", *args, "--init_from=resume", launcher=TWO)
    assert equal(final(resumed), final(two))


def test_compression_sentinels_start_with_different_rows(workdir, plain):
    """Equal rows would differ by the mask alone. The noise depends on the seed and the marker."""
    rows = {}
    for name, seed in (("clcr", 1337), ("clcr_seed", 7)):
        args = (f"--seed={seed}", "--max_steps=1", "--learning_rate=1e-30", "--min_lr=0", "--init_from=out/plain")
        found = run(workdir, name, *args, "--train_only=markers", *sentinels("clcr"))
        rows[name] = state(steps(found))["wte.weight"][300:304]
        assert "noise from N(0, 0.02) was added to the rows of <|cl|> and <|cr|>" in (found / "train.log").read_text()
    mean = state(steps(plain))["wte.weight"][:300].mean(0)
    for found in rows.values():
        torch.testing.assert_close(found[:2], mean.expand(2, -1))  # the run has neither <|meta|> nor <|sr|>
        noise = found[2:] - mean
        assert 0.012 < noise.std() < 0.028 and (noise[0] - noise[1]).norm() > 0.05
    assert not torch.allclose(rows["clcr"][2], rows["clcr_seed"][2])


@pytest.mark.slow
def test_training_everything_from_a_plain_run_with_markers_works_too(workdir, plain):
    whole = run(workdir, "whole", "--max_steps=3", "--init_from=out/plain", *sentinels("sr"))
    assert not torch.equal(state(steps(whole))["wte.weight"][:300], state(steps(plain))["wte.weight"][:300])


@pytest.mark.slow
def test_sentinels_of_the_base_stay_as_trained_and_others_become_the_mean(workdir, tuned):
    """A base that was trained with <|sr|> keeps its row; <|cl|> and <|cr|>, which it never saw, start at the mean."""
    args = ("--max_steps=1", "--learning_rate=1e-30", "--min_lr=0", "--init_from=out/tuned", "--train_only=markers")
    again = run(workdir, "again", *args, *sentinels("sr"))
    was = state(tuned)
    assert torch.equal(state(steps(again))["wte.weight"], was["wte.weight"])
    other = run(workdir, "other", *args, *sentinels("clcr"))
    rows = state(steps(other))["wte.weight"][300:304]
    assert torch.equal(rows[1], was["wte.weight"][301])
    assert (rows[2:] - was["wte.weight"][:300].mean(0)).abs().max() < 0.1
    assert "except those of <|cl|> and <|cr|>, which are the mean" in (other / "train.log").read_text()


@pytest.mark.slow
def test_learned_positions_suffice_if_markers_share_those_of_text(workdir):
    """The base has 28 positions, and the windows with sentinels have 40, of which the text takes 28."""
    learned = [*PLAIN[:3], "--position=learned"]
    run(workdir, "learned", "--max_steps=2", *learned)
    given = sentinels("sr", position="learned")
    found = run(workdir, "learned_sr", "--max_steps=2", "--init_from=out/learned", "--train_only=lora", *given)
    was, now = state(steps(workdir / "out/learned"))["wpe.weight"], state(steps(found))["wpe.weight"]
    assert now.shape == (40, 32) and torch.equal(now[:28], was)
    assert "rows 28 .. 39 of wpe.weight are new, and no text of the run uses them" in (found / "train.log").read_text()
    same = override(tuple(given), "--meta_position=same")
    refused = cli("train.py", *override((*TINY, *same), "--init_from=out/learned", "--run_name=x"), cwd=workdir)
    assert "wpe.weight is (28, 32)" in refusal(refused)


# ----------------------------------------------------------------------------- use


def test_evaluations_samples_and_probes_see_a_plain_model(workdir, tuned):
    loaded = load_run(tuned)
    assert loaded.model.state_dict().keys() == open_run(tuned).empty_model().state_dict().keys()
    sampled = cli("sample.py", "--run=out/tuned", "--prompt=the cat\n sat", "--max_new_tokens=20", "--temperature=0",
                  "--show_markers=yes", cwd=workdir)  # fmt: skip
    assert sampled.returncode == 0 and b"<|sr|>" in sampled.stdout, sampled.stderr.decode()
    evaluated = cli("eval.py", "compression", "--run=out/tuned", "--methods", "trained", "--measure", "bits",
                    "--windows=4", "--output=tuned.jsonl", cwd=workdir)  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr.decode()
    line = json.loads((workdir / "tuned.jsonl").read_text().splitlines()[0])
    assert line["parameters"] == load_run(workdir / "out/plain").model.num_params()


def test_the_merged_model_has_the_validation_loss_of_training(workdir, tuned, monkeypatch):
    """As evaluated in training, unmerged, on all windows."""
    monkeypatch.chdir(workdir)
    loaded = load_run(steps(tuned))
    data = open_windows(loaded.config, "val")
    figures = evaluate(loaded.model, data, loaded.config, Dist(0, 0, 1, torch.device("cpu")))
    assert figures["loss"] == losses(tuned, "final")[-1]


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--train_only=lora",), "train_only=lora freezes the weights that a run starts from, and init_from=scratch"),
        (("--train_only=lora", "--init_from=auto"), "init_from=auto gives none"),
        (("--lora_r=8",), "--lora_r has no effect: it is only used with --train_only=lora, but train_only=all"),
        (("--lora_alpha=8", "--train_only=markers"), "--lora_alpha has no effect"),
        (("--init_from=out/plain", "--train_only=lora", "--lora_r=33"), "lora_r=33 is above n_embd=32"),
        (("--init_from=out/plain", "--train_only=markers"), "train_only=markers has nothing to train, because data/n"),
        (("--train_only=lra",), "did you mean 'lora'"),
        (("--train_only=lora", "--dry_run", "--n_accelerators=1"), "init_from=scratch gives none"),
        (
            ("--init_from=out/plain", "--train_only=markers", "--dry_run", "--n_accelerators=1"),
            "has nothing to train",
        ),
        (("--branch_from=out/plain/step_00000006", "--train_only=lora"), "train_only=lora differs from train_only=all"),
    ],
)
def test_settings_that_do_not_fit_are_refused(workdir, plain, monkeypatch, args, sentence):
    monkeypatch.chdir(workdir)
    with pytest.raises(UserError, match=sentence) as refused:
        train.main(override((*TINY, *PLAIN), "--run_name=refused", *args))
    assert "\n" not in str(refused.value) and not (workdir / "out/refused").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--train_only=all", "train_only=all differs from train_only=lora"),
        ("--train_only=markers", "train_only=markers differs from train_only=lora"),
        ("--lora_r=5", "lora_r=5 differs from lora_r=4"),
        ("--lora_alpha=5", "lora_alpha=5.0 differs from lora_alpha=32.0"),
    ],
)
def test_a_resumed_run_trains_the_same_part(workdir, tuned, monkeypatch, change, sentence):
    monkeypatch.chdir(workdir)
    given = override(("--train_only=lora", "--lora_r=4"), change)
    if not any(arg == "--train_only=lora" for arg in given):
        given = [arg for arg in given if not arg.startswith("--lora_r")]
    args = override((*TINY, *sentinels("sr")), "--run_name=tuned", "--init_from=resume", "--max_steps=9", *given)
    with pytest.raises(UserError, match=re.escape(sentence)):
        train.main(args)


def test_a_checkpoint_whose_config_says_something_else_is_refused(workdir, tuned, tmp_path):
    folder = shutil.copytree(steps(tuned), tmp_path / "step_00000008")
    saved = open_run(folder)
    for change in ({"train_only": "all"}, {"lora_r": 5}):
        saved.state = {**saved.state, "config": {**saved.state["config"], **change}}
        with pytest.raises(UserError, match="does not fit its config"):
            saved.load_into(saved.empty_model(), "cpu")


def test_a_dry_run_counts_what_is_trained(workdir, plain, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    args = override((*TINY, *sentinels("sr")), *LORA, "--run_name=x", "--n_accelerators=1", "--dry_run")
    train.main(args)
    out = capsys.readouterr().out
    factors = 2 * 4 * (32 + 96 + 32 + 32)
    assert f"  trained (train_only=lora)       {(factors + 32) / 1e6:9.3f} M\n" in out
    total = load_run(plain).model.num_params() + factors
    assert f"  total                           {total / 1e6:9.3f} M\n" in out
