"""Tests training on tasks, and its evaluation by eval.py tasks."""

import itertools
import json
import types

import numpy as np
import pytest
import safetensors.torch
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws
from nanometa.config import GPTConfig, TaskConfig, TrainConfig
from nanometa.config.command_line import load_config
from nanometa.config.tasks import LEVELS, PLACEMENTS, TASKS, cells_of
from nanometa.data.layout import IGNORE
from nanometa.data.tokenizer import Tokenizer
from nanometa.evals.common import facts_of
from nanometa.evals.tasks import measure_tasks, sentence
from nanometa.inference.generation import MarkerPlan, generate
from nanometa.layers.scores import Scores
from nanometa.model import GPT
from nanometa.report import sections_of
from nanometa.reports.files import read
from nanometa.tasks import example
from nanometa.tasks.example import Maker
from nanometa.tasks.source import Answers, TaskWindows
from nanometa.train import main as train_main
from nanometa.training import messages
from nanometa.training.base_run import base_of, with_base
from nanometa.training.checkpoint import load_run
from tests.conftest import ROOT, TINY, TWO, cli, losses, manifest, override, refusal
from tests.training_runs import equal, final, metrics

TEXT = (*TINY, "--dataset=data/u", "--block_size=96", "--position=rope")
MODEL = ("--n_layer", "--n_head", "--n_embd", "--block_size", "--position", "--dataset", "--second_attention")
TUNE = [arg for arg in override(TEXT, "--batch_size=16", "--micro_batch_size=16") if not arg.startswith(MODEL)]


def pretrain(workdir, name, *args):
    result = cli("train.py", *override(TEXT, f"--run_name={name}", "--max_steps=10", *args), cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    return f"out/{name}"


def tune(workdir, name, base, *args, tasks=("parity",), **how):
    fixed = [*TUNE, f"--init_from={base}", f"--run_name={name}", "--train_length=96", "--level=easy"]
    args = override(fixed, *args)
    result = cli("train.py", *args, "--tasks", *tasks, cwd=workdir, **how)
    assert result.returncode == 0, result.stderr.decode()[-3000:] + result.stdout.decode()[-2000:]
    return workdir / "out" / name


@pytest.fixture(scope="module")
def bases(workdir):
    return {
        "meta": pretrain(workdir, "base_meta"),
        "learned": pretrain(workdir, "base_learned", "--position=learned"),
        "plain": pretrain(workdir, "base_plain", "--dataset=data/n", "--block_size=84", "--second_attention=none"),
    }


def test_fine_tuning_on_tasks_keeps_model_tokenizer_and_target_rule(workdir, bases):
    base = pretrain(workdir, "base_skip", "--target_rule=skip")
    run_dir = tune(workdir, "tuned", base, "--max_steps=20", "--placements=every", "--learning_rate=1e-2", tasks=TASKS)
    tuned, was = load_run(run_dir), load_run(workdir / base)
    assert tuned.config.model == was.config.model and tuned.config.target_rule == "skip"
    assert tuned.tokenizer.fingerprint == was.tokenizer.fingerprint
    origin, seen = facts_of(tuned)["origin"], 10 * 8 * 84  # steps x windows x content tokens
    assert origin["weights"].startswith(f"weights of {base}/best_00000010/model.safetensors (sha256 ")
    assert (
        origin["dataset"] == "data/u"
        and origin["train_sha256"] == manifest(workdir / "data/u")["splits"]["train"]["content_sha256"]
    )
    assert origin["content_tokens"] == facts_of(was)["origin"]["content_tokens"] == seen
    lines = metrics(run_dir)
    assert {f"exact_{task}" for task in TASKS} | {f"tokens_{task}" for task in TASKS} <= lines[-1].keys()
    trained = [line["loss"] for line in lines if line["kind"] == "train"]
    assert np.mean(trained[-5:]) < 0.8 * np.mean(trained[:2])
    # the facts that sampling needs are kept
    assert MarkerPlan.of_run(tuned).M == was.state["data"]["chunk_markers"] > 0


def test_marker_rows_of_an_arm_without_markers_start_at_the_mean(workdir, bases):
    run_dir = tune(workdir, "tuned_plain", bases["plain"], "--max_steps=1", "--learning_rate=1e-9", "--min_lr=0")
    run, before = load_run(run_dir / "step_00000001"), load_run(workdir / bases["plain"])
    rows, n = run.model.wte.weight, run.tokenizer.n_content
    assert torch.allclose(rows[run.tokenizer.meta], before.model.wte.weight[:n].mean(0), atol=1e-6)
    assert torch.allclose(rows[:n], before.model.wte.weight[:n], atol=1e-6)


@pytest.mark.slow
def test_marker_rows_that_were_trained_on_tasks_are_kept(workdir, bases):
    """The weights of an arm without markers are fine-tuned, which trains the marker's row, and then used for another
    run."""
    further = tune(workdir, "tuned_further", bases["plain"], "--max_steps=20", "--learning_rate=1e-2")
    again = tune(workdir, "tuned_again", f"{further}", "--max_steps=1", "--learning_rate=1e-9", "--min_lr=0")
    runs = [load_run(folder) for folder in (further, again / "step_00000001")]
    rows = [run.model.wte.weight[run.tokenizer.meta] for run in runs]
    mean = load_run(workdir / bases["plain"]).model.wte.weight[: runs[0].tokenizer.n_content].mean(0)
    assert torch.allclose(*rows, atol=1e-6) and not torch.allclose(rows[0], mean, atol=1e-4)


def test_a_resumed_task_run_equals_an_uninterrupted_one(workdir, bases):
    args = ("--curriculum_steps=12", "--train_length=192")
    tasks = ("parity", "copying", "--placements", "background", "target")
    straight = tune(workdir, "t_straight", bases["meta"], "--max_steps=20", *args, tasks=tasks)
    tune(workdir, "t_resumed", bases["meta"], "--max_steps=13", *args, "--lr_decay_steps=20", tasks=tasks)
    resumed = tune(workdir, "t_resumed", "resume", "--max_steps=20", *args, "--lr_decay_steps=20", tasks=tasks)
    assert equal(final(resumed), final(straight))
    # the content tokens of its base run, also after the resume
    assert load_run(resumed).state["content_before"] == 10 * 8 * 84
    assert [line for line in metrics(resumed) if (line["step"], line["kind"]) != (13, "val")] == metrics(straight)


@pytest.mark.slow
def test_two_processes_with_two_micro_batches_train_on_tasks_like_one(workdir, bases):
    args = ("--curriculum_steps=12", "--train_length=192", "--max_steps=20")
    tasks = ("parity", "copying", "--placements", "background", "target")
    straight = tune(workdir, "t_one", bases["meta"], *args, tasks=tasks)
    args += ("--micro_batch_size=4",)
    other = tune(workdir, "t_two", bases["meta"], *args, tasks=tasks, launcher=TWO)
    assert losses(other) == pytest.approx(losses(straight), rel=2e-5, abs=2e-5)
    ours, theirs = (next(line for line in metrics(run) if line["kind"] == "final") for run in (straight, other))
    for name in ("exact_parity", "exact_parity_background", "exact_parity_target", "exact_copying_target"):
        assert theirs[name] == pytest.approx(ours[name], abs=0.01)
    assert theirs["tokens"] == ours["tokens"]


def test_a_partial_validation_reads_every_task_and_placement_equally_often(tokenizer):
    task = TaskConfig(tasks=tuple(TASKS), placements=("target", "none"), train_length=96, level="easy")
    data = TaskWindows(TrainConfig(model=GPTConfig(), task=task, eval_windows=64), "val", tokenizer)
    for n in (len(data.makers), 64, data.n_windows):
        kinds = [window % len(data.makers) for window in data.sample(n)]
        assert {kinds.count(kind) for kind in range(len(data.makers))} == {n // len(data.makers)}, n
    with pytest.raises(UserError, match=f"eval_windows=7 is too few .* set --eval_windows={len(data.makers)} or more"):
        TaskWindows(TrainConfig(model=GPTConfig(), task=task, eval_windows=7), "val", tokenizer)


def answers_to(task: TaskConfig, windows: np.ndarray, exact: np.ndarray) -> Answers:
    """Returns the counts of texts with answers of one id and a line end, of which the id is right in `exact` (B,)."""
    answers = Answers(task, torch.device("cpu"))
    right = torch.stack([torch.from_numpy(exact), torch.ones(len(exact), dtype=torch.bool)], dim=1)
    answers.add(windows, torch.tensor([[5, 9]] * len(exact)), right)
    return answers


def test_validation_counts_each_placement_apart_and_merged(tokenizer):
    """The maker that wrote a text decides its task and placement, whatever part of the split is read, and the counts of
    processes add up."""
    task = TaskConfig(
        tasks=("parity", "copying"), placements=("none", "target", "every"), train_length=96, level="easy"
    )
    data = TaskWindows(TrainConfig(model=GPTConfig(), task=task), "val", tokenizer)
    windows = data.sample(151)  # not a multiple of the six cells
    exact = np.random.default_rng(0).random(151) < 0.6
    makers = [data.makers[window % len(data.makers)] for window in windows]
    figures = answers_to(task, windows, exact).figures()
    wanted = {}
    for name in task.tasks:
        mine = [right for right, maker in zip(exact, makers, strict=True) if maker.name == name]
        wanted |= {f"exact_{name}": np.mean(mine), f"tokens_{name}": np.mean(mine)}
        for at in task.placements:
            cell = [r for r, maker in zip(exact, makers, strict=True) if (maker.name, maker.placement) == (name, at)]
            wanted[f"exact_{name}_{at}"] = np.mean(cell)
    assert figures == pytest.approx(wanted) and len(set(wanted.values())) > 4
    parts = [answers_to(task, windows[rank::3], exact[rank::3]) for rank in range(3)]
    parts[0].sums += parts[1].sums + parts[2].sums
    assert parts[0].figures() == figures
    cells = cells_of({**figures, "loss": 9.0}, task.tasks)
    assert cells == {f"{n} with {at}": figures[f"exact_{n}_{at}"] for n in task.tasks for at in task.placements}


def test_with_one_placement_the_figures_are_those_of_the_tasks_alone():
    task = TaskConfig(tasks=("parity", "copying"), placements=("none",))
    figures = answers_to(task, np.arange(4), np.array([True, False, True, True])).figures()
    assert figures == {"exact_parity": 1.0, "tokens_parity": 1.0, "exact_copying": 0.5, "tokens_copying": 0.5}
    assert cells_of(figures, task.tasks) == {"parity": 1.0, "copying": 0.5}
    assert not {f"{name}_{at}" for name in TASKS for at in PLACEMENTS} & set(TASKS)  # or figures would mix up


def test_a_validation_line_names_the_lowest_cell_of_several_placements():
    figures = {"exact_parity": 0.75, "exact_parity_none": 0.5, "exact_parity_every": 1.0, "loss": 1.0, "tokens": 9,
               "endoftext_loss": None}  # fmt: skip
    line = messages.evaluation_line(3, figures, ("parity",), None, "all 2 texts", 1.0, False)
    assert "exact answers: parity 75.0% (lowest: parity with none 50.0%); loss" in line
    del figures["exact_parity_none"], figures["exact_parity_every"]
    assert "lowest" not in messages.evaluation_line(3, figures, ("parity",), None, "all 2 texts", 1.0, False)


def test_the_curriculum_grows_in_five_phases():
    task = TaskConfig(tasks=TASKS, train_length=512, curriculum_steps=100, level="hard")
    cfg = TrainConfig(task=task, batch_size=8, micro_batch_size=8)
    windows = TaskWindows(cfg, "train", Tokenizer.gpt2())
    reached = [windows.reached(step) for step in (0, 19, 20, 40, 60, 80, 99, 100, 10**6)]
    lengths = [longest for longest, _ in reached]
    assert lengths == [56, 56, 97, 169, 294, 512, 512, 512, 512]
    assert [len(levels) for _, levels in reached] == [1, 1, 2, 2, 3, 3, 3, 3, 3]
    for step, longest in ((0, 56), (60, 294)):
        seen = [len(windows.example(8 * step + i).ids) for i in range(8)]
        assert max(seen) <= longest
    uniform = TaskWindows(TrainConfig(task=TaskConfig(tasks=TASKS, train_length=512)), "train", Tokenizer.gpt2())
    seen = [len(uniform.example(i).ids) for i in range(400)]
    assert 250 < np.mean(seen) < 300 and min(seen) < 60 and max(seen) > 500


@pytest.mark.parametrize("curriculum", [0, 7, 100])
def test_texts_are_padded_to_the_length_of_their_step_and_padding_counts(curriculum):
    task = TaskConfig(tasks=("parity", "copying"), train_length=256, curriculum_steps=curriculum)
    cfg = TrainConfig(task=task, batch_size=4, micro_batch_size=4)
    windows, counted = TaskWindows(cfg, "train", Tokenizer.gpt2()), 0
    for step in range(curriculum + 2) if curriculum < 100 else (0, 19, 20, 60, 80, 100):
        batch = windows.batch(np.arange(4) + 4 * step)
        longest, _ = windows.reached(step)
        assert longest <= batch.tokens.size(1) == min(256, -(-longest // 32) * 32)
        if curriculum < 100:
            counted += batch.tokens.numel()
            assert windows.counted(4 * (step + 1)) == {"texts": 4 * (step + 1), "positions": counted}
    if curriculum == 100:  # texts have at most 49, 75, 114, 170 and 256 positions
        assert windows.counted(4 * 100)["positions"] == 4 * 20 * (64 + 96 + 128 + 192 + 256)
    assert TaskWindows(cfg, "val", Tokenizer.gpt2()).batch(np.arange(4)).tokens.size(1) == 256


def test_validation_texts_are_written_once(tokenizer, monkeypatch):
    """Every evaluation of a run reads the same ones; a training text is read once, and not kept."""
    task = TaskConfig(tasks=("copying",), placements=("target", "background"), train_length=128)
    cfg = TrainConfig(model=GPTConfig(position="rope"), task=task, batch_size=8, micro_batch_size=8)
    train, val = (TaskWindows(cfg, split, tokenizer) for split in ("train", "val"))
    first, calls, write = val.batch(np.arange(12)), [], Maker.example
    monkeypatch.setattr(Maker, "example", lambda *args: calls.append(args) or write(*args))
    again = val.batch(np.arange(12))
    assert not calls and all(torch.equal(a, b) for a, b in zip(first[:5], again[:5], strict=True))
    train.batch(np.arange(8))
    assert len(calls) == 8 and not train.written


def test_a_text_that_is_not_found_is_replaced_by_a_fixed_other_one(tokenizer, monkeypatch):
    """Otherwise a rare text could end a run after hours."""
    task = TaskConfig(tasks=("list_recall", "copying"), placements=("target", "background"), train_length=128)
    cfg = TrainConfig(model=GPTConfig(position="rope"), task=task, batch_size=8, micro_batch_size=8)
    data = {split: TaskWindows(cfg, split, tokenizer) for split in ("train", "val")}
    usual = {split: [windows.example(window) for window in range(40)] for split, windows in data.items()}
    monkeypatch.setattr(example, "ATTEMPTS", 1)
    for split, windows in data.items():
        kept = 0
        for window, before in enumerate(usual[split]):
            windows.written.clear()
            once = windows.example(window)
            windows.written.clear()
            assert np.array_equal(once.ids, windows.example(window).ids)
            try:
                windows.makers[window % 4].example(
                    *{"train": ("train/1337", window // 4, 32, 128, LEVELS[: 1 + LEVELS.index(task.level)]),
                      "val": ("val", window // 4, 116, 128, (task.level,))}[split]
                )  # fmt: skip
            except UserError:
                assert not np.array_equal(once.ids, before.ids)
            else:  # a text that is found is never another one
                assert np.array_equal(once.ids, before.ids)
                kept += 1
        assert 0 < kept < 40
    calls = []

    def none(self, split, index, *args):
        calls.append(index)
        raise UserError("there is no text.")

    monkeypatch.setattr(Maker, "example", none)
    with pytest.raises(UserError, match="there is no text"):
        data["train"].example(5)
    assert len(calls) == len(set(calls)) == 101 and calls[0] == 1


@pytest.mark.parametrize("rule", ("ignore", pytest.param("skip", marks=pytest.mark.slow)))
def test_answers_are_exact_if_greedy_decoding_writes_them(workdir, bases, rule):
    """The run is half-trained: some answers are right, some wrong, and some partly right."""
    base = pretrain(workdir, f"base_{rule}_greedy", f"--target_rule={rule}")
    run_dir = tune(
        workdir, f"tuned_{rule}", base, "--max_steps=150", "--learning_rate=1e-2", "--placements=background",
        "--train_length=48", tasks=("parity",),
    )  # fmt: skip
    run = load_run(run_dir)
    cell = measure_tasks(run, Maker("parity", "background", TaskConfig(), run.tokenizer), "easy", 48, 60)
    maker, wrote = Maker("parity", "background", TaskConfig(), run.tokenizer), []
    plan, spelled = MarkerPlan.of_run(run, "none"), []
    for i in range(60):
        example = maker.example("test", i, 44, 48, ("easy",))
        start, answer = np.flatnonzero(example.answers)[0], example.ids[example.answers].tolist()
        ids = list(generate(run, example.ids[:start].tolist(), plan, len(answer), temperature=0))
        wrote.append(ids == answer)
        spelled.append(ids[:-1] == answer[:-1])
    assert cell["outcomes"] == "".join(str(int(right)) for right in wrote)
    assert 0 < cell["correct"] < 60 and cell["exact"] == cell["correct"] / 60
    assert cell["answer_exact"] == sum(spelled) / 60 and cell["format_failures"] == sum(spelled) - sum(wrote)


def test_a_missing_line_end_is_a_format_failure_and_not_exact(tokenizer, monkeypatch):
    """Text 0 lacks the line end, text 1 has a wrong id, text 2 both, and the others are right."""
    numbers = itertools.count()

    def scored(model, batch):
        targets = batch.targets.gather(1, batch.scored_index.clamp(max=batch.targets.size(1) - 1))
        targets[batch.scored_index == batch.targets.size(1)] = IGNORE
        right = targets != IGNORE
        for row, number in zip(range(len(targets)), numbers, strict=False):
            last = int(right[row].sum()) - 1
            right[row, last] &= number not in (0, 2)
            right[row, 0] &= number not in (1, 2)
        return Scores(targets, torch.zeros(targets.shape), right)

    monkeypatch.setattr("nanometa.evals.tasks.score_batch", scored)
    shape = {"vocab_size": tokenizer.n_vocab, "content_vocab_size": tokenizer.n_content}
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, **shape))
    run = types.SimpleNamespace(
        model=model, tokenizer=tokenizer, folder="out/f", config=TrainConfig(model=model.cfg, target_rule="ignore")
    )
    cell = measure_tasks(run, Maker("copying", "none", TaskConfig(), tokenizer), "easy", 64, 8)
    assert (cell["correct"], cell["answer_exact"], cell["format_failures"]) == (5, 6 / 8, 1)
    assert cell["outcomes"] == "00011111" and cell["aided"]["2-gram induction, given the first word"] == 1
    assert "(75.0% without the line end, 1 format failures)" in sentence(cell)
    assert "format failures" not in sentence({**cell, "format_failures": 0})
    assert "2-gram induction, given the first word 100.0%" in sentence(cell)


def test_an_oracle_is_trained_and_evaluated_on_what_is_marked_also_at_longer_lengths(workdir, bases):
    args = ("--max_steps=4", "--visible=marked", "--semantic_lists=True", "--placements=background", "--level=easy")
    run_dir = tune(workdir, "tuned_oracle", bases["meta"], *args, "--train_length=192", tasks=("list_recall",))
    result = cli("eval.py", "tasks", "--run=out/tuned_oracle", "--n=10", "--lengths", "192", "384", cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    lines = [json.loads(line) for line in (run_dir / "tasks.jsonl").read_text().splitlines()]
    assert [line["length"] for line in lines] == [192, 384] and all(line["n"] == 10 for line in lines)
    assert all(line["visible"] == "marked" and line["semantic_lists"] is True for line in lines)
    assert all("any item of the category" in line["floors"] for line in lines)
    assert result.stdout.decode().count("semantic only what is marked") == 2
    found = read((str(run_dir),), sections_of(0.0, 0.05))  # as report.py reads them
    assert found.lines["tasks"] == lines
    again = tune(workdir, "tuned_oracle", "resume", *args, "--train_length=192", tasks=("list_recall",))
    assert load_run(again).config.task.visible == "marked"
    given = [*TUNE, "--init_from=resume", "--run_name=tuned_oracle", "--train_length=192", "--level=easy",
             "--placements=background", "--semantic_lists=True"]  # fmt: skip
    assert "visible=all differs from visible=marked" in refusal(
        cli("train.py", *given, "--tasks", "list_recall", cwd=workdir)
    )


def test_eval_tasks_writes_a_line_per_cell_and_names_impossible_cells(workdir, bases):
    tune(workdir, "tuned_learned", bases["learned"], "--max_steps=2", tasks=("parity", "copying"))
    args = ("--run=out/tuned_learned", "--n=40", "--placements", "every", "none", "--lengths", "64", "128")
    for _ in range(2):
        result = cli("eval.py", "tasks", *args, cwd=workdir)
        assert result.returncode == 0, result.stderr.decode()
    assert "impossible: 128 positions do not fit into the learned position table, which has 96 rows" in " ".join(
        result.stdout.decode().split()
    )
    assert "a run with --position=rope has no such limit, and one with a --block_size of 128 or more has room" in (
        " ".join(result.stdout.decode().split())
    )
    lines = [json.loads(line) for line in (workdir / "out/tuned_learned/tasks.jsonl").read_text().splitlines()]
    assert len(lines) == 16  # 2 tasks x 2 placements x 2 lengths, appended twice
    timeless = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    assert timeless[:8] == timeless[8:]
    cell = next(line for line in lines if line["length"] == 64 and line["task"] == "copying")
    assert cell["n"] == 40 == len(cell["outcomes"]) and cell["correct"] == cell["outcomes"].count("1")
    low, high = cell["interval"]
    assert low <= cell["exact"] <= high and cell["arm"] == "meta + learned" and cell["train_length"] == 96
    weights = safetensors.torch.load_file(workdir / cell["checkpoint"] / "model.safetensors")
    assert "wte.weight" in weights and len(cell["weights_sha256"]) == 64
    assert all(line["n"] == 0 and "exact" not in line for line in lines if line["length"] == 128)
    found = read((str(workdir / "out/tuned_learned"),), sections_of(0.0, 0.05))  # as report.py reads them
    assert found.lines["tasks"] == lines[8:] and found.repeated == 8 and len(found.runs) == 1


def test_runs_with_rotary_positions_are_evaluated_beyond_their_window(workdir, bases):
    run = load_run(workdir / bases["meta"])
    assert measure_tasks(run, Maker("parity", "every", TaskConfig(), run.tokenizer), "easy", 256, 5)["n"] == 5


def test_show_batch_prints_the_texts_of_tasks(workdir, bases):
    args = [*TUNE, "--init_from=" + bases["meta"], "--run_name=shown", "--train_length=96", "--show_batch=3"]
    result = cli("train.py", *args, "--tasks", "list_recall", "parity", cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    shown = result.stdout.decode()
    assert shown.startswith("step 3 of list_recall, parity, epoch 0 of ") and shown.count("---\n") == 16
    assert shown.count("? parity: ") == 8 and not (workdir / "out/shown").exists()


REFUSED = {
    "another model": (("--n_layer=3", "parity"), "n_layer=3 differs from n_layer=2 of the model in "),
    "another rule": (
        ("--target_rule=skip", "parity"),
        "target_rule=skip differs from target_rule=ignore of the model in ",
    ),
    "too long": (
        ("--train_length=128", "parity"),
        "train_length=128 is too long, because the model has only 96 learned positions",
    ),
    "dry run": (
        ("--dry_run=True", "--n_accelerators=1", "--train_length=128", "parity"),
        "train_length=128 is too long",
    ),
    "no such task": (
        ("--train_length=96", "lists"),
        "--tasks=lists is invalid: it must be a list, each item of which is one of",
    ),
    "nothing so short": (("--train_length=32", "segment_counting"), "no text of level easy or medium or hard"),
}


def test_settings_must_agree_with_the_run_given_as_init_from(workdir, tmp_path, monkeypatch):
    """A value that equals the default is compared too, whether it was typed or is in a config file."""
    monkeypatch.chdir(workdir)
    shape = ("--second_attention=causal", "--target_rule=skip")
    base = pretrain(workdir, "base_typed", *shape)
    agreed = ("--second_attention=causal", "--target_rule=skip", "--position=rope", "--n_layer=2", "--rope_theta=10000")
    run = load_run(tune(workdir, "agreed", base, *agreed, "--max_steps=1"))
    assert run.config.model == load_run(workdir / base).config.model and run.config.target_rule == "skip"

    recipe = tmp_path / "mine.py"
    recipe.write_text("from config import GPTConfig, TrainConfig\nconfig = TrainConfig(GPTConfig(position='learned'))")
    tiny_tasks = str(ROOT / "config/tiny_tasks.py")
    typed = ("--second_attention=meta", "--target_rule=ignore", "--position=learned", "--n_layer=12",
             "--block_size=1024", "--dropout=0.5", "--n_inner=9", "--random_fraction=0.2")  # fmt: skip
    cases = [([tiny_tasks, arg], arg[2:]) for arg in typed]
    cases += [([tiny_tasks, "--n-layer", "12"], "n_layer=12")]
    cases += [([str(recipe), "--tasks", "parity"], "position=learned")]
    for argv, said in cases:
        with pytest.raises(
            UserError,
            match=f"^{said} differs from {said.partition('=')[0]}=.* of the model in {base}/best_00000010, which",
        ):
            train_main([*argv, f"--init_from={base}", "--run_name=refused"])
    with pytest.raises(UserError, match="^dataset=data/n has no effect, because the texts of the tasks are generated"):
        train_main([tiny_tasks, "--dataset=data/n", f"--init_from={base}", "--run_name=refused"])
    # the recipes that serve all arms name no setting of the model
    for name in ("finetune_tasks", "tiny_tasks"):
        assert not {"second_attention", "position", "target_rule", "n_layer"} & {
            *load_config(TrainConfig, [str(ROOT / f"config/{name}.py")], config_file=True).typed
        }
    assert not (workdir / "out/refused").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(workdir, bases, case):
    (*settings, task), expected = REFUSED[case]
    given = override(TUNE, f"--init_from={bases['learned']}", "--run_name=refused", *settings)
    assert expected in refusal(cli("train.py", *given, "--tasks", task, cwd=workdir))
    assert not (workdir / "out/refused").exists()


def test_a_run_cannot_resume_with_changed_tasks(workdir, bases):
    tune(workdir, "fixed", bases["meta"], "--max_steps=2")
    given = [*TUNE, "--init_from=resume", "--run_name=fixed", "--train_length=64", "--level=easy", "--tasks", "parity"]
    assert "train_length=64 differs from train_length=96 of out/fixed/" in refusal(cli("train.py", *given, cwd=workdir))


def test_a_new_task_run_uses_the_tokenizer_of_its_dataset(workdir):
    args = override(TEXT, "--run_name=scratch_tasks", "--max_steps=3", "--train_length=96", "--placements=target")
    result = cli("train.py", *args, "--tasks", "parity", cwd=workdir)
    assert result.returncode == 0, result.stderr.decode()
    run = load_run(workdir / "out/scratch_tasks")
    assert run.tokenizer.fingerprint == Tokenizer.load(workdir / "data/u").fingerprint
    assert run.state["data"]["shards"] == {} and run.state["origin"] == "scratch"
    assert facts_of(run)["origin"] == {"weights": "scratch", "dataset": None, "train_sha256": None, "content_tokens": 0}


def test_a_run_from_scratch_has_no_base_run():
    cfg = TrainConfig(model=GPTConfig(n_layer=2))
    assert base_of(cfg, None) is None and with_base(cfg, None) is cfg


def test_draws_are_uniform_and_repeat_by_key():
    draws, again = Draws(7), Draws(7)
    numbers = [draws.below(10) for _ in range(20_000)]
    assert numbers == [again.below(10) for _ in range(20_000)] != [Draws(8).below(10) for _ in range(20_000)]
    assert np.bincount(numbers) == pytest.approx(2000, abs=200)
    first = np.bincount([draws.sample(range(5), 3)[0] for _ in range(5000)])
    assert first == pytest.approx(1000, abs=150) and len(set(draws.sample(range(5), 5))) == 5
    with pytest.raises(ValueError):
        draws.sample(range(3), 4)
