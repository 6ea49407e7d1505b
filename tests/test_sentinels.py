"""Trains and samples with every config that has settings of markers, as a user would, and resumes it."""

import json
import re

import pytest

from nanometa.config import TrainConfig
from nanometa.config.checks import flat
from nanometa.probes import masks
from tests.conftest import TINY, TWO, cli, losses, override, refusal
from tests.training_runs import equal, final, run

CONFIGS = {name.removeprefix("tiny_"): cfg for name, cfg in masks.configs().items()}
SMALL = {"random_marks": 2, "sentence_tokens": 4, "max_span": 12, "eviction_window": 14}


def settings(name: str) -> list[str]:
    """Returns the settings of a config that are not the defaults, as arguments for the small datasets."""
    cfg, default = CONFIGS[name], flat(TrainConfig())
    stored = not cfg.markers.places_markers and "stdlib_uniform" in cfg.dataset
    size = 40 if cfg.has_markers(0) else 32 if stored else 28
    found = [f"--dataset=data/{'u' if stored else 'n'}", f"--block_size={size}", "--dropout=0.0"]
    for setting in ("second_attention", "position", "meta_position", "target_rule", "summary", *flat(cfg.markers)):
        value = flat(cfg)[setting]
        if value == default[setting]:
            continue
        value = SMALL.get(setting, value)
        found.append(f"--{setting}={value}" if not isinstance(value, tuple) else f"--{setting}")
        found += list(map(str, value)) if isinstance(value, tuple) else []
    if not any(part.startswith("--second_attention") for part in found):
        found.append("--second_attention=meta")
    if cfg.markers.marker_place == "span":
        found.append("--max_span=12")
    return found


FAST = ("clcr",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_every_scheme_trains_resumes_and_samples(workdir, name):
    given = settings(name)
    whole = run(workdir, f"{name}_whole", "--max_steps=8", "--save_interval=4", *given)
    parts = ("--save_interval=4", "--lr_decay_steps=8", *given)
    run(workdir, f"{name}_parts", "--max_steps=4", *parts)
    resumed = run(workdir, f"{name}_parts", "--max_steps=8", *parts, "--init_from=resume")
    assert equal(final(resumed), final(whole))
    arm = json.loads((whole / "config.json").read_text())["arm"]
    assert arm.endswith(CONFIGS[name].markers.label.replace("226", "14") + ", mean" * (name == "clcr_mean"))
    sampled = cli("sample.py", f"--run=out/{name}_whole", "--prompt=the cat\n sat", "--max_new_tokens=60",
                  "--show_markers=yes", "--temperature=0", cwd=workdir)  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr.decode()
    mark = {"sr": "<|sr|>", "clcr": "<|cl|><|cr|>", "meta_evict": "<|meta|>"}.get(name, "")
    assert mark in sampled.stdout.decode()
    forgets = CONFIGS[name].markers.evict != "nothing"
    assert ("# the cache held " in sampled.stderr.decode()) == forgets
    if name == "clcr":
        check_ratios(workdir, f"out/{name}_whole")
    shown = cli("train.py", *TINY, *given, "--show_batch=3", cwd=workdir)
    assert shown.returncode == 0 and mark in shown.stdout.decode()


def check_ratios(workdir, run_dir: str) -> None:
    """A sample of a run with mixed ratios may ask for one of its own, and then forgets so much."""

    def forgotten(*more: str) -> int:
        result = cli("sample.py", f"--run={run_dir}", "--max_new_tokens=27", "--temperature=0", *more, cwd=workdir)
        assert result.returncode == 0, result.stderr.decode()
        return int(re.search(r"forgotten: (\d+) tokens", result.stderr.decode())[1])

    kept = {ratio: forgotten(f"--compression_ratio={ratio}", "--seed=5") for ratio in (0, 0.3, 0.6)}
    assert kept[0] == 0 < kept[0.3] < kept[0.6]


@pytest.mark.parametrize(
    "name", ["clcr", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "clcr")]
)
def test_two_processes_and_accumulation_equal_one_process(workdir, name):
    args = ("--max_steps=10", "--eval_interval=10", *settings(name))
    one = run(workdir, f"{name}_one", *args)
    for other in (
        run(workdir, f"{name}_four", *args, "--micro_batch_size=2"),
        run(workdir, f"{name}_two", *args, "--micro_batch_size=2", launcher=TWO),
    ):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5, abs=1e-5)
        assert losses(other, "final") == pytest.approx(losses(one, "final"), rel=1e-5)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--marker_place=sentence", "--target_rule=skip"), "places markers in text without any, but data/u has 4"),
        (("--marker_place=sentence", "--closing_reads=segment", "--dataset=data/n", "--second_attention=none"),
         "target_rule=ignore lets markers predict the next token"),
        (("--marker_place=span", "--marks=clcr", "--evict=segment", "--dataset=data/n", "--target_rule=skip",
          "--second_attention=none", "--compression_ratio", "0.9", "--max_span=3"), "compression_ratio=0.9 cannot be"),
        (("--evict=segment", "--second_attention=random", "--dataset=data/n", "--block_size=28"),
         "second_attention=random is not implemented"),
        (("--evict=window", "--second_attention=meta"), "reads all markers, but evict=window forgets some"),
        (("--evict=segment", "--second_attention=none", "--dataset=data/n", "--block_size=28"),
         "need markers that close segments, and data/n has none"),
        (("--evict=segment", "--second_attention=none", "--position=rope", "--rope_scaling=yarn", "--rope_dynamic"),
         "rope_dynamic is not implemented"),
        (("--summary=mean",), "summary=mean stands for spans that are forgotten"),
        (("--sinks=3",), "--sinks has no effect: it is only used with --evict=segment|window"),
        (("--marker_place=newline", "--tasks", "parity"), "cannot be combined with tasks"),
        (("--marker_place=newline", "--marks=none"), "marks=none with marker_place=newline and evict=nothing changes"),
        (("--marker_place=newline", "--evict=window"), "evict=window has no segments, but marker_place=newline"),
        (("--evict=local", "--compression_ratio", "0.2", "0.4"), "has several values, but evict=local has one"),
        (("--compression_ratio", "1.5", "--evict=local"), "compression_ratio=(1.5,) is out of range"),
    ],
)  # fmt: skip
def test_combinations_without_meaning_are_refused_in_one_sentence(workdir, args, sentence):
    base = override((*TINY, "--dataset=data/u", "--block_size=32"), *args)
    before = sorted(workdir.rglob("*"))
    assert sentence in refusal(cli("train.py", *base, "--run_name=refused", cwd=workdir))
    assert sorted(workdir.rglob("*")) == before


def test_an_evaluation_that_cannot_place_the_markers_of_a_run_says_so(workdir):
    run(workdir, "sr_refused", "--max_steps=1", *settings("sr"))
    for command in (("eval.py", "perplexity"), ("eval.py", "passkey"), ("eval.py", "tasks"), ("probe.py", "ablation")):
        found = refusal(cli(*command, "--run=out/sr_refused", cwd=workdir))
        assert "was trained with special markers (sr sentence own segment)" in found
    typed = cli("sample.py", "--run=out/sr_refused", "--prompt=the<|sr|> cat", cwd=workdir)
    assert "the prompt contains a marker, but out/sr_refused" in refusal(typed)
    found = refusal(cli("sample.py", "--run=out/sr_refused", "--compression_ratio=0.5", cwd=workdir))
    assert "compression_ratio=0.5 needs a run that was trained to save a share of its context" in found
    assert cli("sample.py", "--run=out/sr_refused", "--meta=none", "--max_new_tokens=3", cwd=workdir).returncode == 0


def test_a_run_with_the_positions_of_the_tokens_before_is_read_by_what_supports_it(workdir):
    run(workdir, "previous", "--max_steps=1", "--dataset=data/u", "--block_size=32", "--meta_position=previous")
    assert "(meta_position=previous)" in refusal(cli("eval.py", "perplexity", "--run=out/previous", cwd=workdir))
    args = ("--run=out/previous", "--windows=4", "--output=previous.jsonl")
    assert cli("eval.py", "compression", *args, cwd=workdir).returncode == 0


def test_a_run_that_extends_the_window_takes_over_the_markers_and_a_task_run_its_limits(workdir):
    run(workdir, "base_sr", "--max_steps=1", *settings("sr"))
    extended = (
        "--init_from=out/base_sr",
        "--dataset=data/n",
        "--rope_scaling=yarn",
        "--rope_factor=2",
        "--max_steps=1",
    )
    folder = workdir / "out/longer"
    base = override((*TINY, "--run_name=longer"), *extended)
    base = [arg for arg in base if not arg.startswith(("--n_", "--dropout"))]
    result = cli("train.py", *base, cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["markers"]["marker_place"] == "sentence" and config["model"]["block_size"] == 80
    wrong = cli("train.py", *override(tuple(base), "--run_name=wrong", "--marker_place=newline"), cwd=workdir)
    assert "marker_place=newline differs from marker_place=sentence of the model in out/base_sr" in refusal(wrong)

    run(workdir, "base_evict", "--max_steps=1", *settings("meta_evict"))
    tasks = ("--tasks", "parity", "--train_length=48", "--level=easy", "--max_steps=1", "--eval_windows=4")
    base = [arg for arg in TINY if not arg.startswith(("--n_", "--eval_windows"))]
    for name, more, evict in (("kept", (), "segment"), ("typed", ("--evict=nothing",), "nothing")):
        args = (*base, *tasks, *more, "--init_from=out/base_evict", f"--run_name={name}")
        result = cli("train.py", *args, cwd=workdir)
        assert result.returncode == 0, result.stderr.decode()
        assert json.loads((workdir / f"out/{name}/config.json").read_text())["config"]["markers"]["evict"] == evict
