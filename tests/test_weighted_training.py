"""Trains with weighted losses as a user would: rules, scorers, branches, resumed runs, several processes, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.config.weight_settings import NORMALIZED, WEIGHTINGS
from nanometa.data.loader import Windows, window_order
from nanometa.data.nats import StoredNats
from nanometa.evals.nats import nats_of, training_windows
from nanometa.training.checkpoint import load_run
from nanometa.training.weighted_loss import lengths_of
from tests.conftest import TWO, cli, override, refusal
from tests.training_runs import BASE, equal, final, run

DENSE = ("--weighting=dense", "--short_length=8", "--short_stride=6")
ROPE = ("--position=rope", "--dropout=0.0")
FIGURES = {"weighted_loss", "weight_mean", "weight_sd", "weight_max", "effective_share", "key_share"}


def lines(folder, kind: str = "train") -> list[dict]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def trunk(workdir):
    """A run with the usual loss, which the weighted runs continue."""
    return run(workdir, "trunk", "--max_steps=4", "--save_interval=4", "--schedule=constant", *ROPE)


@pytest.fixture(scope="module")
def scorer(workdir):
    """A run without markers, with the tokenizer of the others."""
    args = ("--second_attention=none", "--dataset=data/n", "--block_size=28", "--max_steps=3", *ROPE)
    return run(workdir, "scorer", *args)


FAST = ("dense", "longce", "after_markers")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*WEIGHTINGS, "uniform")]
)
def test_every_weighting_branches_from_one_trunk(workdir, trunk, name):
    args = (
        "--max_steps=6",
        "--schedule=constant",
        f"--branch_from={trunk}/step_00000004",
        f"--weighting={name}",
        *ROPE,
    )
    found = lines(run(workdir, f"branch_{name}", *args))
    assert [line["step"] for line in found] == [5, 6]
    if name == "uniform":
        assert not FIGURES & found[0].keys()
        return
    plain = lines(run(workdir, f"plain_{name}", *args[:3], *ROPE))
    assert found[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)  # the reported loss has no weights
    assert found[1]["loss"] != plain[1]["loss"]  # but the updates have
    for line in found:
        assert line.keys() >= FIGURES and 0 < line["effective_share"] < 1 and line["weight_sd"] > 0
        assert line["weight_max"] > 1 and line["weighted_loss"] != pytest.approx(line["loss"], rel=1e-6)
        if name in NORMALIZED:
            assert line["weight_mean"] == pytest.approx(1, abs=1e-6)


def test_weights_that_start_later_leave_the_steps_before_as_they_are(workdir):
    plain = run(workdir, "plain", "--max_steps=6", *ROPE)
    later = run(workdir, "later", "--max_steps=6", "--weight_after=3", *DENSE, *ROPE)
    ours, theirs = lines(later), lines(plain)
    assert [line["loss"] for line in ours[:3]] == [line["loss"] for line in theirs[:3]]
    assert ours[3]["loss"] == pytest.approx(theirs[3]["loss"], rel=1e-6)
    assert [line["grad_norm"] for line in ours[:3]] == [line["grad_norm"] for line in theirs[:3]]
    assert ours[3]["grad_norm"] != theirs[3]["grad_norm"] and ours[5]["loss"] != theirs[5]["loss"]
    assert [FIGURES <= line.keys() for line in ours] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "extra",
    [
        ("--weighting=longce", "--weight_norm=batch"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--weighting=permuted",), marks=pytest.mark.slow),
    ],
)
def test_processes_and_accumulation_do_not_change_the_weights(workdir, extra):
    args = ("--max_steps=5", "--eval_interval=5", *override(DENSE, *extra), *ROPE)
    name = extra[0].removeprefix("--weighting=") if extra else "dense"
    one = run(workdir, f"{name}_one", *args)
    two = run(workdir, f"{name}_two", *args, "--micro_batch_size=2", launcher=TWO)
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        for figure in (*FIGURES, "loss", "grad_norm"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4, abs=1e-5), figure


def test_longce_normalized_over_the_batch_has_the_gradient_of_its_weights_divided_by_their_mean(workdir):
    args = ("--max_steps=1", "--short_length=8", "--short_stride=6", "--weighting=longce", *ROPE)
    (published,) = lines(run(workdir, "published", *args))
    (normed,) = lines(run(workdir, "normed", *args, "--weight_norm=batch"))
    assert published["weight_mean"] == normed["weight_mean"] != pytest.approx(1, abs=1e-4)
    assert normed["grad_norm"] * normed["weight_mean"] == pytest.approx(published["grad_norm"], rel=1e-5)


def test_a_resumed_run_ends_with_the_same_weights(workdir, scorer):
    args = (*override(DENSE, "--weighting=sparse"), f"--scorer={scorer}", "--lr_decay_steps=8", *ROPE)
    whole = run(workdir, "whole", "--max_steps=8", "--save_interval=4", *args)
    run(workdir, "parts", "--max_steps=4", "--save_interval=4", *args)
    resumed = run(workdir, "parts", "--max_steps=8", "--save_interval=4", *args, "--init_from=resume")
    assert equal(final(resumed), final(whole))
    arm = json.loads((whole / "config.json").read_text())["arm"]
    assert arm == "meta, sparse 0.2"


def test_the_tasks_can_be_trained_with_weights(workdir):
    args = ("--tasks", "parity", "--train_length=64", "--max_steps=3", "--init_from=scratch", *DENSE, *ROPE)
    command = override(BASE, *args, "--run_name=task", "--loss_on=all")
    dropped = [arg for arg in command if not arg.startswith("--eval_windows")]
    result = cli("train.py", *dropped, cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    assert all(line["weight_mean"] == pytest.approx(1, abs=1e-6) for line in lines(workdir / "out/task"))


# ----------------------------------------------------------------------------- scorers


@pytest.fixture(scope="module")
def stored(workdir, scorer):
    """Nats of data/u, computed by the scorer."""
    args = ("--dataset=data/u", "--short_length=8", "--short_stride=6", "--content=28", "--name=s")
    result = cli("eval.py", "nats", f"--run={scorer}/step_00000003", *args, cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    assert "train with --scorer=data/u/nats/s" in result.stdout.decode()
    return workdir / "data/u/nats/s"


def test_stored_nats_train_like_the_scorer_that_computed_them(workdir, scorer, stored):
    """They are rounded to fp16, a relative error of 0.0005 at most."""
    args = ("--max_steps=3", "--weighting=dense", *ROPE)
    short = ("--short_length=8", "--short_stride=6")
    frozen = run(workdir, "frozen", *args, *short, f"--scorer={scorer}/step_00000003")
    column = run(workdir, "column", *args, "--scorer=data/u/nats/s")
    itself = run(workdir, "itself", *args, *short)
    for ours, theirs, other in zip(lines(column), lines(frozen), lines(itself), strict=True):
        assert ours["weight_sd"] == pytest.approx(theirs["weight_sd"], rel=0.01)
        assert ours["weighted_loss"] == pytest.approx(theirs["weighted_loss"], rel=1e-3)
        assert other["weight_sd"] != pytest.approx(theirs["weight_sd"], rel=0.01)


def test_one_file_of_nats_serves_datasets_with_and_without_markers(workdir, stored):
    args = ("--second_attention=none", "--dataset=data/n", "--block_size=28", "--max_steps=2", *ROPE)
    found = lines(run(workdir, "unmarked", *args, "--weighting=dense", "--scorer=data/u/nats/s"))
    assert all(line["weight_mean"] == pytest.approx(1, abs=1e-6) for line in found)
    placed = ("--marker_place=newline", "--second_attention=none", "--dataset=data/n", "--block_size=40")
    found = lines(
        run(workdir, "placed", *placed, "--max_steps=2", "--weighting=dense", "--scorer=data/u/nats/s", *ROPE)
    )
    assert all(line["weight_mean"] == pytest.approx(1, abs=1e-6) for line in found)


def test_stored_nats_are_those_of_the_content_in_its_order(workdir, scorer, stored):
    again = cli("eval.py", "nats", f"--run={scorer}", "--dataset=data/n", "--short_length=8", "--short_stride=6",
                "--content=28", "--name=same", cwd=workdir)  # fmt: skip
    assert again.returncode == 0, again.stderr.decode()
    ours, theirs = StoredNats(workdir / "data/n/nats/same"), StoredNats(stored)
    windows = np.arange(ours.about.windows)
    assert ours.about.windows == theirs.about.windows > 10 and ours.read(windows).mean() > 1
    assert (ours.read(windows)[:-1] > 0).all()  # also where a marker stands between a window and the next
    np.testing.assert_allclose(ours.read(windows), theirs.read(windows), rtol=2e-3)


def test_damaged_nats_are_refused(workdir, stored):
    broken = workdir / "data/u/nats/broken"
    shutil.copytree(stored, broken)
    values = bytearray((broken / "train_000000.bin").read_bytes())
    values[5] ^= 64
    (broken / "train_000000.bin").write_bytes(values)
    command = override(BASE, "--weighting=dense", f"--scorer={broken}", "--run_name=refused", *ROPE)
    assert "is damaged or missing" in refusal(cli("train.py", *command, cwd=workdir))
    (broken / "nats.json").write_text("{}")
    assert "is damaged" in refusal(cli("train.py", *command, cwd=workdir))


def test_a_resumed_run_may_not_have_another_scorer(workdir, scorer):
    args = ("--max_steps=2", "--save_interval=2", *DENSE, *ROPE)
    run(workdir, "started", *args, f"--scorer={scorer}")
    other = run(workdir, "scorer_2", "--second_attention=none", "--dataset=data/n", "--block_size=28", "--max_steps=1",
                "--seed=7", *ROPE)  # fmt: skip
    shutil.move(scorer, workdir / "out/aside")
    shutil.copytree(other, scorer)
    try:
        command = override(BASE, *args, f"--scorer={scorer}", "--run_name=started", "--init_from=resume")
        assert "has other weights than when" in refusal(cli("train.py", *command, cwd=workdir))
    finally:
        shutil.rmtree(scorer)
        shutil.move(workdir / "out/aside", scorer)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--weight_lambda=0.5",), "--weight_lambda has no effect: it is only used with --weighting=dense|permuted"),
        (("--weighting=sparse", "--weight_lambda=0.5"), "--weight_lambda has no effect"),
        (("--weighting=dense", "--weight_norm=batch"), "--weight_norm has no effect"),
        (("--weighting=after_markers", "--short_length=8"), "--short_length has no effect"),
        (("--scorer=out/x",), "--scorer has no effect"),
        (("--weight_after=3",), "--weight_after has no effect"),
        (("--weighting=dense", "--weight_lambda=1.5"), "weight_lambda=1.5 is out of range"),
        (("--weighting=sparse", "--weight_kappa=0"), "weight_kappa=0.0 is out of range"),
        (("--weighting=ppmi", "--weight_shift=0"), "weight_shift=0.0 is out of range"),
        (("--weighting=dense", "--short_length=28"), "short_length=28 is no short context, because a window has 28"),
        (("--weighting=dense", "--short_length=4", "--short_stride=5"), "be at most short_length=4"),
        (("--weighting=dense", "--short_stride=9"), "short_stride=9 is above short_length=7"),
        (("--weighting=dense", "--scorer=out/nothing"), "there is no checkpoint in 'out/nothing'"),
        (("--weighting=after_markers", "--dataset=data/n", "--block_size=28", "--second_attention=none"),
         "weighting=after_markers has no effect, because data/n has no markers"),
        (("--weighting=dense", "--tasks", "parity", "--scorer=out/scorer"), "scores stored text"),
    ],
)  # fmt: skip
def test_what_a_weighting_cannot_be_combined_with_is_refused(workdir, args, sentence):
    base = override((*BASE, "--run_name=refused", *ROPE), *args)
    base = [arg for arg in base if not ("--tasks" in args and arg.startswith("--eval_windows"))]
    assert sentence in refusal(cli("train.py", *base, cwd=workdir))
    assert not (workdir / "out/refused").exists()


def test_scorers_that_do_not_fit_the_run_are_refused(workdir, trunk, stored):
    for args, sentence in (
        (("--scorer=out/trunk",), "was trained as the arm meta, and a scorer reads the content"),
        (("--scorer=data/u/nats/s", "--short_length=9"), "short_length=9 differs from the 8"),
        (("--scorer=data/u/nats/s", "--block_size=64"), "belong to other windows (content 28"),
        (("--init_from=resume", "--run_name=trunk"), "a resumed run cannot change this"),
    ):
        command = override((*BASE, "--run_name=refused", *ROPE), "--weighting=dense", *args)
        assert sentence in refusal(cli("train.py", *command, cwd=workdir))
        assert not (workdir / "out/refused").exists()


def test_nats_that_cannot_be_computed_are_refused(workdir, trunk, stored):
    for args, sentence in (
        (("--content=30",), "content=30 is not a whole number of the 28-token chunks"),
        (("--short_length=28",), "short_length=28 is no short context"),
        (("--name=s",), "data/u/nats/s exists already"),
        (("--name=a/b",), "name='a/b' is out of range"),
        (("--run=out/trunk",), "was trained as the arm meta, and a scorer reads the content tokens alone"),
    ):
        base = override(("--run=out/scorer", "--dataset=data/u", "--short_length=8"), *args)
        assert sentence in refusal(cli("eval.py", "nats", *base, cwd=workdir))


def test_the_estimate_counts_the_forward_passes_of_the_scorer(workdir):
    command = override(BASE, *DENSE, *ROPE, "--dry_run", "--n_accelerators=1")
    shown = cli("train.py", *command, cwd=workdir)
    assert shown.returncode == 0, shown.stderr.decode()
    assert "weights of the loss" in shown.stdout.decode()


# ----------------------------------------------------------------------------- looking at weights


def test_the_weights_of_a_window_are_those_of_training(workdir, trunk, scorer):
    """The figures of a training step are computed from the same numbers that eval.py weights shows."""
    branch = ("--max_steps=5", "--schedule=constant", f"--branch_from={trunk}/step_00000004", *DENSE, *ROPE)
    (line,) = lines(run(workdir, "looked", *branch))
    windows = window_order(4, 8, Windows(workdir / "data/u", "train", 32, "ignore").n_windows, 1337)
    command = ("eval.py", "weights", f"--run={trunk}/step_00000004", *DENSE, "--output=weights.jsonl", "--windows")
    result = cli(*command, *map(str, windows), cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    shown = [json.loads(text) for text in (workdir / "weights.jsonl").read_text().splitlines()]
    assert [one["window"] for one in shown] == windows.tolist()
    weights = [weight for one in shown for weight in one["weights"] if weight is not None]
    # the last target of a window lies behind it, and is not shown
    assert max(weights) <= line["weight_max"] + 1e-3 and np.mean(weights) == pytest.approx(1, abs=0.05)
    assert np.std(weights) == pytest.approx(line["weight_sd"], rel=0.1)
    for one in shown:
        for marker, weight in zip(one["markers"], one["weights"], strict=True):
            assert not (marker and weight is not None)
    assert " nats, " in result.stdout.decode() and " with a short context" in result.stdout.decode()
    page = cli("report.py", "weights.jsonl", "--output=page", cwd=workdir)
    assert page.returncode == 0, page.stderr.decode()
    html = (workdir / "page/report.html").read_text()
    assert html.count('<p class="weights">') == 8 and "&lt;|meta|&gt;" in html and 'title="weight ' in html


def test_a_weight_stands_at_its_target_and_never_at_a_pad(workdir):
    """Windows that close fewer segments than they have room for end with pads."""
    args = ("--marker_place=newline", "--second_attention=none", "--dataset=data/n", "--block_size=40", "--max_steps=1")
    run(workdir, "padded", *args, *ROPE)
    command = ("eval.py", "weights", "--run=out/padded", *DENSE, "--output=padded.jsonl", "--windows", "0", "1", "2")
    assert cli(*command, cwd=workdir).returncode == 0
    for one in map(json.loads, (workdir / "padded.jsonl").read_text().splitlines()):
        text = [at for at, marker in enumerate(one["markers"]) if not marker]
        assert len(text) > 28  # 28 content tokens, and pads
        weighted = [at for at, weight in enumerate(one["weights"]) if weight is not None]
        assert weighted == text[28 - len(weighted) : 28] and len(weighted) in (27, 28)


def test_a_scorer_whose_losses_are_not_finite_is_refused(workdir, scorer):
    """`sparse` would keep the targets whose nats are NaN, as those with the largest difference."""
    broken = load_run(scorer)
    torch.nn.init.constant_(broken.model.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match="is not finite"):
        nats_of(broken, training_windows(workdir / "data/n", 28), lengths_of(28, 28, 8, 6))


def test_weights_that_cannot_be_shown_are_refused(workdir, trunk):
    for args, sentence in (
        ((), "weighting=uniform gives every target the weight 1"),
        (("--weighting=dense", "--windows", "100000"), "window 100000 does not exist"),
        (("--weighting=dense", "--scorer=out/trunk"), "a scorer reads the content tokens alone"),
        (("--weighting=dense", "--weight_kappa=0.3"), "--weight_kappa has no effect"),
        (("--weighting=dense", "--weight_after=3"), "weight_after=3 has no effect, because no step is trained"),
    ):
        assert sentence in refusal(cli("eval.py", "weights", "--run=out/trunk", *args, cwd=workdir))
