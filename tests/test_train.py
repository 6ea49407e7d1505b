"""Tests training runs: what they compute and record, on any number of processes, and their evaluations."""

import json
import time

import pytest
import torch

from nanometa import train
from nanometa.config import TaskConfig, TrainConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.command_line import load_config
from nanometa.data.loader import Windows
from nanometa.layers.scores import Scorer
from nanometa.train import evaluate
from nanometa.training import evaluation, messages, run_log
from nanometa.training.checkpoint import load_run
from nanometa.training.distributed import Dist, accumulation
from tests.conftest import TWO, cli, losses, override
from tests.training_runs import BASE, TORCHRUN, equal, final, metrics, run


def test_training_lowers_the_loss_and_writes_the_expected_files(straight):
    lines = metrics(straight)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 31))
    assert [line["step"] for line in lines if line["kind"] == "val"] == [0, 10, 20, 30]
    assert lines[-1]["kind"] == "final" and lines[-1]["bits_per_byte"] < 0.95 * lines[0]["bits_per_byte"]
    # an untrained model predicts all of the 300 ids equally
    assert lines[0]["loss"] == pytest.approx(torch.tensor(300.0).log().item(), rel=0.02)
    assert {path.name for path in straight.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "train.log", "step_00000020", "step_00000030", "latest",
        "best_00000030",
    }  # fmt: skip
    saved = json.loads((straight / "config.json").read_text())
    assert saved["config"]["model"]["vocab_size"] == 320 and saved["environment"]["torch"] == torch.__version__


def test_only_dropout_depends_on_how_a_step_is_split(workdir, straight):
    """Dropout masks are drawn anew for each micro-batch of each process, so two accumulations give two different
    runs."""
    args = ("--max_steps=3", "--learning_rate=3e-3")
    whole, half = (run(workdir, f"split{n}", *args, f"--micro_batch_size={n}") for n in (8, 4))
    assert losses(half) == pytest.approx(losses(whole), rel=1e-5)
    args = (*args, "--dropout=0.1")
    whole, half = (run(workdir, f"drop{n}", *args, f"--micro_batch_size={n}") for n in (8, 4))
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses(whole), losses(half), strict=True))
    again = run(workdir, "drop_again", *args, "--micro_batch_size=4")
    assert losses(again) == losses(half) and equal(final(again), final(half))


@pytest.mark.parametrize(
    "second",
    [name if name == "meta" else pytest.param(name, marks=pytest.mark.slow) for name in SECOND_ATTENTIONS],
)
def test_two_processes_and_accumulation_equal_one_process(workdir, second):
    args = ("--max_steps=20", f"--second_attention={second}", "--eval_interval=20", "--learning_rate=3e-3")
    if SECOND_ATTENTIONS[second].markers == "refused":
        args += ("--dataset=data/n", "--block_size=28")
    one = run(workdir, f"one_{second}", *args)
    four = run(workdir, f"four_{second}", *args, "--micro_batch_size=2")
    two = run(workdir, f"two_{second}", *args, "--micro_batch_size=2", launcher=TWO)
    for other in (four, two):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5, abs=1e-5)
        assert losses(other, "final") == pytest.approx(losses(one, "final"), rel=1e-5)
        ours, theirs = final(one), final(other)
        # AdamW divides by the root of tiny second moments, so weights agree up to a small part of their change.
        for name, p in ours.items():
            torch.testing.assert_close(theirs[name], p, rtol=1e-3, atol=2e-4)
    assert losses(one)[-1] < losses(one)[0]


def test_one_process_under_torchrun_gives_the_weights_of_a_process_without_it(workdir):
    """It joins a process group and wraps the model in DDP, as several processes do."""
    alone = run(workdir, "alone", "--max_steps=6", "--micro_batch_size=4")
    launcher = (*TORCHRUN[:-1], "--nproc_per_node=1")
    grouped = run(workdir, "grouped", "--max_steps=6", "--micro_batch_size=4", launcher=launcher)
    assert equal(final(grouped), final(alone)) and metrics(grouped) == metrics(alone)


def test_a_step_sees_the_same_windows_on_any_number_of_processes(workdir):
    """The windows of all ranks and micro-batches together are the step's slice of the order."""
    from nanometa.data.loader import window_order

    for world, micro in ((1, 8), (2, 4), (4, 1)):
        share = 8 // world
        for step in (0, 3):
            order = window_order(step, 8, 100, seed=5)
            parts = [order[r * share : (r + 1) * share].reshape(-1, micro) for r in range(world)]
            assert torch.tensor([w for part in parts for row in part for w in row]).tolist() == order.tolist()


def test_evaluation_does_not_depend_on_batch_size(workdir, straight):
    from nanometa.data.loader import Windows
    from nanometa.training.checkpoint import load_run
    from nanometa.training.distributed import Dist

    loaded = load_run(straight)
    data = Windows(workdir / "data/u", "val", 32, "ignore")
    figures = []
    for micro in (1, 3, 16):
        cfg = TrainConfig(model=loaded.config.model, micro_batch_size=micro, dtype="float32")
        figures.append(evaluate(loaded.model, data, cfg, Dist(0, 0, 1, torch.device("cpu"))))
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-6)
    assert figures[0]["tokens"] == data.n_windows * 28 - 1


def test_evaluation_during_training_uses_no_dropout(workdir, straight):
    """The loss that a run with dropout recorded is that of its saved weights."""
    from nanometa.data.loader import Windows
    from nanometa.training.checkpoint import load_run

    loaded = load_run(straight / "step_00000030")
    assert loaded.config.model.dropout == 0.1 and not loaded.model.training
    data = Windows(workdir / "data/u", "val", 32, "ignore")
    batch = data.batch(torch.arange(data.n_windows).numpy())
    with torch.no_grad():
        logits = loaded.model.logits(loaded.model(batch.tokens, batch.positions, batch.meta_index))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    assert losses(straight, "final") == pytest.approx([expected.item()], rel=1e-5)


def test_the_commit_is_looked_up_once_at_the_start(monkeypatch):
    run_log.environment.cache_clear()
    first = run_log.environment()
    monkeypatch.setattr(run_log.subprocess, "run", lambda *args, **kwargs: pytest.fail("looked up again"))
    assert run_log.environment() == first and len(first["commit"]) in (0, 40)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(workdir):
    eager = run(workdir, "eager", "--position=rope", "--target_rule=skip", "--max_steps=6")
    args = ("--position=rope", "--target_rule=skip", "--max_steps=6", "--compile=True", "--run_name=compiled")
    compiled = cli("train.py", *override(BASE, *args), cwd=workdir, env={"TORCH_LOGS": "recompiles"})
    assert compiled.returncode == 0 and b"compile on" in compiled.stdout, compiled.stderr.decode()[-3000:]
    # neither the evaluations nor other positions of markers cause a compilation
    assert b"ecompil" not in compiled.stderr
    assert losses(workdir / "out/compiled") == pytest.approx(losses(eager), rel=1e-4)
    assert losses(eager)[-1] < losses(eager)[0]


def test_bfloat16_follows_float32(workdir, straight):
    rough = run(workdir, "bf16", "--max_steps=30", "--dropout=0.1", "--micro_batch_size=4", "--dtype=bfloat16")
    assert losses(rough) == pytest.approx(losses(straight), rel=2e-2) and losses(rough) != losses(straight)


def test_wandb_offline_writes_into_the_folder_of_the_run(workdir):
    folder = run(workdir, "wandb", "--max_steps=2", "--wandb=offline")
    time.sleep(0.2)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_accumulation_is_the_batch_over_processes_and_micro_batch():
    assert accumulation(TrainConfig(batch_size=480, micro_batch_size=12), 8) == 5
    assert accumulation(TrainConfig(batch_size=480, micro_batch_size=12), 4) == 10  # the number of GPUs in the paper


@pytest.mark.slow
def test_a_compiled_evaluation_equals_the_eager_one_and_compiles_once(workdir, straight):
    """A last micro-batch that is smaller is padded to the same shape, and the added rows do not count."""
    loaded = load_run(straight)
    data = Windows(workdir / "data/u", "val", 32, "ignore")
    cfg = TrainConfig(model=loaded.config.model, micro_batch_size=8, dtype="float32")
    cpu = Dist(0, 0, 1, torch.device("cpu"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(Scorer(loaded.model), dynamic=False)
    for n in (20, 5, None):
        eager, found = (evaluate(loaded.model, data, cfg, cpu, n, compiled=how) for how in (None, compiled))
        # the text has no <|endoftext|>, so its loss is None
        scored = [name for name, value in eager.items() if value is not None]
        assert [found[name] for name in scored] == pytest.approx([eager[name] for name in scored], rel=1e-5)
        if n == 20:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_a_compiled_run_evaluates_with_its_compiled_model(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    seen = []
    monkeypatch.setattr(train, "evaluate", lambda *args: seen.append(args[-1]))
    for compiled in (True, False):
        args = override(BASE, f"--run_name=evaluates_{compiled}", f"--compile={compiled}")
        subject = train.Trainer(load_config(TrainConfig, args), Dist(0, 0, 1, torch.device("cpu")))
        subject.evaluate(5, None)
        subject.log.close()
    assert isinstance(seen[0], torch._dynamo.OptimizedModule) and seen[0]._orig_mod.model is not None
    assert seen[1] is None


@pytest.mark.parametrize(("windows", "calls"), [("None", 2), ("5", 3)])
def test_the_whole_split_is_evaluated_once_at_the_end(workdir, monkeypatch, capsys, windows, calls):
    """The recorded lines are those of two evaluations. Progress is printed for the whole split, not for a few
    windows."""
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(evaluation, "PROGRESS_S", 0)
    seen = []
    monkeypatch.setattr(train, "evaluate", lambda *args: seen.append(args[4]) or evaluate(*args))
    name = f"once_{windows}"
    train.main(override(BASE, f"--run_name={name}", f"--eval_windows={windows}", "--max_steps=2"))
    total = Windows(workdir / "data/u", "val", 32, "ignore").n_windows
    assert seen == ([total] * 2 if windows == "None" else [5, 5, total]) and len(seen) == calls
    lines = [line for line in metrics(workdir / "out" / name) if line["kind"] != "train"]
    assert [(line["kind"], line["step"]) for line in lines] == [("val", 0), ("val", 2), ("final", 2)]
    same = {key for key in lines[1] if lines[1][key] == lines[2][key]}
    assert ("loss" in same) == (windows == "None") and {*lines[1]} == {*lines[2]}
    out = capsys.readouterr().out
    assert f"step       2  validation: 8 of {total} windows after 0:00" in out and "of 5 windows after" not in out
    assert out.count(f"step       2  validation on all {total} windows: ") == 1


def test_a_resumed_run_takes_over_the_evaluation_of_its_checkpoint(workdir, monkeypatch, capsys):
    """A run that was killed between its last checkpoint and the final line does not evaluate the same windows again.
    Another precision, or another number of windows, does."""
    monkeypatch.chdir(workdir)
    seen = []
    monkeypatch.setattr(train, "evaluate", lambda *args: seen.append(args[4]) or evaluate(*args))
    args = override(BASE, "--run_name=killed_late", "--eval_windows=None", "--max_steps=2")
    train.main(args)
    assert len(seen) == 2
    before = (workdir / "out/killed_late/metrics.jsonl").read_text()
    for init in ("resume", "auto"):
        (workdir / "out/killed_late/metrics.jsonl").write_text(before.rpartition('{"kind": "final"')[0])
        capsys.readouterr()
        train.main([*args, f"--init_from={init}"])
        assert len(seen) == 2 and (workdir / "out/killed_late/metrics.jsonl").read_text() == before
        assert capsys.readouterr().out.count("step       2  validation on all ") == 1  # the figures are shown
    train.main(override([*args, "--init_from=resume"], "--dtype=bfloat16"))
    assert len(seen) == 3
    train.main(override([*args, "--init_from=resume"], "--max_steps=3"))
    assert len(seen) == 4  # of step 3, whose checkpoint holds it
    few = override(BASE, "--run_name=killed_few", "--max_steps=2")
    train.main(few)
    assert len(seen) == 4 + 3  # five windows at steps 0 and 2, then all
    train.main([*few, "--init_from=resume"])
    assert len(seen) == 4 + 4  # all, since the checkpoint holds five


def test_a_run_prints_the_settings_that_differ_from_the_defaults():
    line = messages.settings_line(TrainConfig(run_name="x", seed=5, task=TaskConfig(tasks=("parity", "copying"))))
    assert line.endswith("(config.json lists all): tasks=parity,copying seed=5")
    assert messages.settings_line(TrainConfig(dataset="data/x")).endswith(": dataset=data/x")
    assert messages.settings_line(TrainConfig()).endswith(": none")
    assert [messages.count(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]
