import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.common.files import lock_folder
from nanometa.config import TaskConfig, TrainConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.command_line import load_config
from nanometa.data.loader import Windows
from nanometa.layers.scores import Scorer
from nanometa.train import evaluate
from nanometa.training import evaluation, messages, run_log
from nanometa.training.checkpoint import load_run
from nanometa.training.distributed import Dist, accumulation
from nanometa.training.resume import lock_new, occupied
from nanometa.training.run_log import RunLog
from tests.conftest import ROOT, TINY, cli, losses, override, refusal, tree

BASE = (*TINY, "--dataset=data/u", "--block_size=32")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(workdir, name, *args, launcher=(sys.executable,)):
    result = cli("train.py", *override(BASE, f"--run_name={name}", *args), cwd=workdir, launcher=launcher)
    assert result.returncode == 0, result.stderr.decode()[-3000:] + result.stdout.decode()[-2000:]
    return workdir / "out" / name


def final(run_dir) -> dict[str, torch.Tensor]:
    folder = run_dir / (run_dir / "latest").read_text().strip()
    weights, optimizer = (
        safetensors.torch.load_file(folder / f"{kind}.safetensors") for kind in ("model", "optimizer")
    )
    return {**weights, **optimizer}


def metrics(run_dir) -> list[dict]:
    """Returns all that a run recorded, except timings."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(workdir):
    """A run of 30 uninterrupted steps, with dropout and two micro-batches."""
    return run(workdir, "straight", "--max_steps=30", "--dropout=0.1", "--micro_batch_size=4")


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


def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(workdir, straight):
    args = ("--dropout=0.1", "--micro_batch_size=4", "--lr_decay_steps=30")
    run(workdir, "resumed", "--max_steps=17", *args)
    # Lines that were written after the last save must be deleted, because they will be written again.
    with open(workdir / "out/resumed/metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 18, "loss": 0.0}\n{"kind": "tr')
    result = run(workdir, "resumed", "--max_steps=30", *args, "--init_from=resume")
    assert equal(final(result), final(straight))
    lines = [line for line in metrics(result) if (line["step"], line["kind"]) != (17, "val")]
    assert lines == metrics(straight)  # the first part evaluated once more, at its end in step 17
    assert "changed since the checkpoint: max_steps 17 -> 30" in (result / "train.log").read_text()


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


def test_best_weights_newer_than_the_resumed_step_are_set_aside(workdir, straight, tmp_path):
    """Best weights of step 30 are set aside when the run resumes from step 20. Trained again, they are the same."""
    shutil.copytree(straight, workdir / "out/back")
    assert json.loads((straight / "step_00000030/state.json").read_text())["best"]["step"] == 30
    shutil.rmtree(workdir / "out/back/step_00000030")
    args = ("--dropout=0.1", "--micro_batch_size=4", "--init_from=resume", "--lr_decay_steps=30", "--eval_interval=100")
    back = run(workdir, "back", *args, "--max_steps=21")
    names = {path.name for path in back.glob("*best*")}
    # step 21 is best, because the last step is evaluated and no other best weights are left
    assert names == {"abandoned_best_00000030", "best_00000021"}
    assert load_run(back).state["step"] == 21
    back = run(workdir, "back", *override(args, "--eval_interval=10"), "--max_steps=30")
    assert equal(final(back), final(straight))
    assert {path.name for path in back.glob("*best*")} == {"best_00000030"}
    ours, theirs = (safetensors.torch.load_file(r / "best_00000030/model.safetensors") for r in (back, straight))
    assert equal(ours, theirs)


@pytest.mark.parametrize("second", SECOND_ATTENTIONS)
def test_two_processes_and_accumulation_equal_one_process(workdir, second):
    args = ("--max_steps=20", f"--second_attention={second}", "--eval_interval=20", "--learning_rate=3e-3")
    if SECOND_ATTENTIONS[second].markers == "refused":
        args += ("--dataset=data/n", "--block_size=28")
    one = run(workdir, f"one_{second}", *args)
    four = run(workdir, f"four_{second}", *args, "--micro_batch_size=2")
    two = run(workdir, f"two_{second}", *args, "--micro_batch_size=2", launcher=TORCHRUN)
    for other in (four, two):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5, abs=1e-5)
        assert losses(other, "final") == pytest.approx(losses(one, "final"), rel=1e-5)
        ours, theirs = final(one), final(other)
        # AdamW divides by the root of tiny second moments, so weights agree up to a small part of their change.
        for name, p in ours.items():
            torch.testing.assert_close(theirs[name], p, rtol=1e-3, atol=2e-4)
    assert losses(one)[-1] < losses(one)[0]


def test_a_step_sees_the_same_windows_on_any_number_of_processes(workdir):
    """The windows of all ranks and micro-batches together are the step's slice of the order."""
    from nanometa.data.loader import window_order

    for world, micro in ((1, 8), (2, 4), (4, 1)):
        share = 8 // world
        for step in (0, 3):
            order = window_order(step, 8, 100, seed=5)
            parts = [order[r * share : (r + 1) * share].reshape(-1, micro) for r in range(world)]
            assert torch.tensor([w for part in parts for row in part for w in row]).tolist() == order.tolist()


def test_a_run_may_resume_with_another_number_of_processes(workdir, tmp_path):
    args = ("--lr_decay_steps=12", "--eval_interval=6", "--micro_batch_size=4")
    whole = run(workdir, "whole", "--max_steps=12", *args)
    run(workdir, "elastic", "--max_steps=6", *args)
    elastic = run(workdir, "elastic", "--max_steps=12", *args, "--init_from=resume", launcher=TORCHRUN)
    assert losses(elastic) == pytest.approx(losses(whole), rel=1e-5)


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


def test_init_from_auto_starts_and_later_resumes(workdir):
    """Also in the folder of a run that was killed before its first checkpoint."""
    (workdir / "out/auto/.step_00000001.writing").mkdir(parents=True)
    (workdir / "out/auto/config.json").write_text("{}")
    (workdir / "out/auto/metrics.jsonl").write_text('{"kind": "val", "step": 0, "loss": 9}\n{"kind": "tra')
    first = run(workdir, "auto", "--init_from=auto", "--max_steps=4")
    before = final(first)
    assert [line["step"] for line in metrics(first)] == [0, 1, 2, 3, 4, 4, 4]
    assert [path.name for path in first.glob(".*")] == [".lock"]
    again = run(workdir, "auto", "--init_from=auto", "--max_steps=4")
    assert equal(final(again), before)
    assert len([line for line in metrics(again) if line["kind"] == "train"]) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_ends_with_status_0(workdir, number):
    name = f"signal{int(number)}"
    command = [sys.executable, str(ROOT / "train.py"), *BASE, f"--run_name={name}", "--max_steps=100000"]
    process = subprocess.Popen(command, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step      25"):
            process.send_signal(number)
            break
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    step = int(re.search(r"stopped by a signal after step ([\d,]+)", out)[1].replace(",", ""))
    assert step >= 25
    run_dir = workdir / "out" / name
    assert (run_dir / "latest").read_text() == f"step_{step:08d}\n"
    resumed = run(workdir, name, "--init_from=resume", f"--max_steps={step + 2}")
    assert [line["step"] for line in metrics(resumed) if line["kind"] == "train"] == list(range(1, step + 3))


def test_a_repeated_signal_counts_once_and_a_later_one_ends_the_process(monkeypatch):
    """torchrun forwards the signal that its processes also got from a scheduler, so they get it twice."""
    previous = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    now, sent = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    try:
        stop = train.StopFlag()
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert stop.raised and not sent
        now[0] += 1.5
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGINT)] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), previous, strict=True):
            signal.signal(number, handler)


def test_a_start_killed_before_config_json_leaves_the_folder_free(tmp_path, monkeypatch):
    """config.json is written before any other visible file. A folder without one was left by a start that was
    killed."""
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        RunLog(tmp_path, TrainConfig(wandb="disabled"), {}, -1, main=True)
    assert not occupied(tmp_path)


def test_damaged_lines_of_metrics_are_dropped_on_resume(tmp_path):
    lines = [
        b'{"kind": "val", "step": 0}',
        b"\xff\xfe",
        b"\0" * 9,
        b"3",
        b'{"step": 1}',
        b'{"kind": "train", "step": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"kind": "tra')
    RunLog(tmp_path, TrainConfig(wandb="disabled"), {}, 2, main=True).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines[0] + b"\n" + lines[-1] + b"\n"


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


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "the run folder out/straight exists: continue that run with --init_from=auto"),
        (
            ("--run_name=new", "--init_from=resume"),
            "there is no checkpoint to resume in out/new: start the run with --init_from=auto",
        ),
        (("--init_from=resume", "--n_layer=3"), "n_layer=3 differs from n_layer=2 of out/straight/"),
        (("--init_from=resume", "--batch_size=16"), "batch_size=16 differs from batch_size=8 of out/straight/"),
        (("--init_from=resume", "--seed=2"), "seed=2 differs from seed=1337 of out/straight/"),
        (("--init_from=resume", "--dataset=data/p"), "data/p is not the dataset of .*train_000000.bin"),
        (("--run_name=new", "--dataset=data/nothing"), "there is no dataset in data/nothing"),
        (("--run_name=new", "--block_size=33"), "use --block_size=32 or 64"),
        (("--run_name=new", "--block_size=32000"), "fewer than one window"),
        (
            ("--run_name=new", "--vocab_size=999"),
            "vocab_size=999 does not match the tokenizer of data/u, which has 320",
        ),
        (
            ("--run_name=new", "--batch_size=10"),
            "micro-batches of 8: set --micro_batch_size=10 or --batch_size=16",
        ),
        (("--run_name=new", "--device=cuda"), "device=cuda is not available"),
        (
            ("--run_name=new", "--dataset=data/n", "--block_size=28"),
            "second_attention=meta has nothing to connect, because data/n has no markers",
        ),
        (
            ("--run_name=new", "--second_attention=random"),
            "second_attention=random is a control for data without markers, but data/u has 4 markers per chunk: "
            "give .*--injection=none",
        ),
        (
            (
                "--run_name=new",
                "--dataset=data/n",
                "--block_size=28",
                "--second_attention=none",
                "--meta_position=none",
            ),
            "meta_position=none has no effect, because data/n has no markers: set --meta_position=same",
        ),
        (
            ("--run_name=new", "--second_attention=random", "--meta_position=none"),
            "random has none: leave one of them out",
        ),
        (("--out_dir=.", "--run_name=texts", "--init_from=auto"), "texts exists, but train.py did not make it"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing_on_disk(workdir, straight, args, sentence):
    before = tree(workdir)
    base = (*BASE, "--run_name=straight", "--dropout=0.1")
    error = refusal(cli("train.py", *override(base, *args), cwd=workdir))
    assert re.search(sentence, error), error
    assert tree(workdir) == before


def test_a_damaged_dataset_is_refused_before_anything_is_written(workdir, tmp_path):
    shutil.copytree(workdir / "data/u", tmp_path / "data/u")
    shard = tmp_path / "data/u/val_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 4
    shard.write_bytes(raw)
    error = refusal(cli("train.py", *BASE, "--run_name=x", cwd=tmp_path))
    assert "data/u/val_000000.bin is damaged: its sha256 is " in error and not (tmp_path / "out").exists()


def test_a_dataset_of_another_tokenizer_is_refused(workdir, straight, tmp_path):
    """Tokenizers of another size, and of the same size but trained on other text."""
    (tmp_path / "more.txt").write_text("entirely different words and letters " * 3000)
    for name, size, sentence in (
        ("size", 290, "was prepared with another tokenizer"),
        ("text", 300, "another tokenizer"),
    ):
        files = [str(tmp_path / "more.txt"), str(workdir / "texts/*.txt")]
        result = cli("prepare.py", "--source=files", "--files", *files, f"--bpe_vocab_size={size}", f"--name={name}",
                     "--chunk_content=28", "--chunk_markers=4", "--val_fraction=0.1", cwd=tmp_path)  # fmt: skip
        assert result.returncode == 0, result.stderr.decode()
        args = (f"--dataset={tmp_path}/data/{name}", "--dropout=0.1", "--run_name=straight", "--init_from=resume")
        error = refusal(cli("train.py", *override(BASE, *args), cwd=workdir))
        assert sentence in error and "give the run's dataset, data/u" in error


@pytest.mark.parametrize(
    ("batch", "micro", "world", "offer"),
    [
        (480, 12, 7, ": set --batch_size=420 or 504, the nearest that is possible"),
        (10, 4, 1, "--micro_batch_size=5 or --batch_size=12"),
        (16, 3, 2, "--micro_batch_size=2 or --batch_size=18|--micro_batch_size=4 or --batch_size=18"),
        (3, 1, 4, "set --batch_size=4, the nearest that is possible"),
    ],
)
def test_the_refusal_of_a_batch_size_offers_the_nearest_possible_ones(batch, micro, world, offer):
    with pytest.raises(UserError, match=offer):
        accumulation(TrainConfig(batch_size=batch, micro_batch_size=micro), world)


def test_accumulation_is_the_batch_over_processes_and_micro_batch():
    assert accumulation(TrainConfig(batch_size=480, micro_batch_size=12), 8) == 5
    assert accumulation(TrainConfig(batch_size=480, micro_batch_size=12), 4) == 10  # the number of GPUs in the paper


def test_a_diverged_run_ends_with_an_error_and_saves_no_nan(workdir):
    args = ("--run_name=nan", "--learning_rate=1e30", "--grad_clip=0", "--max_steps=50", "--max_skipped=5")
    error = refusal(cli("train.py", *override(BASE, *args), cwd=workdir))
    assert re.search(r"training has diverged: the last 5 steps up to step \d+ were skipped because", error)
    assert re.search(r"from the last checkpoint in out/nan \((step_0000001\d|none was saved yet)\)", error)
    for saved in (workdir / "out/nan").glob("*_0*/model.safetensors"):  # no diverged weights were saved
        assert all(torch.isfinite(p).all() for p in safetensors.torch.load_file(saved).values())


def test_two_trainings_in_one_folder_are_refused(workdir, straight):
    """The refusal comes before anything in the folder is read, with one process and with two."""
    lock = lock_folder(straight)
    args = ("--run_name=straight", "--dropout=0.1", "--micro_batch_size=4", "--init_from=resume", "--max_steps=40")
    before = tree(straight)
    error = refusal(cli("train.py", *override(BASE, *args), cwd=workdir))
    assert "another process is training in out/straight" in error
    result = cli("train.py", *override(BASE, *args), cwd=workdir, launcher=TORCHRUN)
    assert result.returncode == 1 and result.stderr.decode().count("error: another process is training") == 1
    assert tree(straight) == before
    lock.release()


def test_a_resume_while_the_run_trains_is_refused_and_renames_nothing(workdir):
    args = [*override(BASE, "--save_interval=1", "--eval_interval=1000"), "--run_name=busy", "--max_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args], cwd=workdir, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step       5"):
            break
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    try:
        for _ in range(2):
            for init_from in ("resume", "auto"):
                error = refusal(cli("train.py", *args, f"--init_from={init_from}", cwd=workdir))
                assert "another process is training in out/busy" in error and "damaged" not in error
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        drain.join()
    kinds = {path.name.split("_")[0] for path in (workdir / "out/busy").iterdir()}
    assert kinds == {".lock", "config.json", "metrics.jsonl", "train.log", "step", "latest"}


def test_a_folder_that_another_process_took_first_is_refused(tmp_path):
    """Both processes looked at the folder before it existed."""
    lock_new(tmp_path / "run").release()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(UserError, match="another process has begun a run in .*: continue it with --init_from=auto"):
        lock_new(tmp_path / "run")


def test_an_error_in_one_process_ends_all_processes():
    store = torch.distributed.HashStore()

    def process(rank: int) -> str:
        dist = Dist(rank, rank, 2, torch.device("cpu"), store)

        def step():
            if rank == 1:
                raise UserError("there is no disk on this machine.")

        try:
            dist.agree("first", lambda: rank)
            dist.agree("second", step)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(process, range(2))] == ["there is no disk on this machine."] * 2


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


def test_a_run_prints_the_settings_that_differ_from_the_defaults():
    line = messages.settings_line(TrainConfig(run_name="x", seed=5, task=TaskConfig(tasks=("parity", "copying"))))
    assert line.endswith("(config.json lists all): tasks=parity,copying seed=5")
    assert messages.settings_line(TrainConfig(dataset="data/x")).endswith(": dataset=data/x")
    assert messages.settings_line(TrainConfig()).endswith(": none")
    assert [messages.count(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]


def test_folders_that_cannot_be_written_are_refused_in_one_sentence(workdir, tmp_path):
    (tmp_path / "afile").write_text("")
    for args in (
        ("--out_dir=/proc/nope",),
        (f"--out_dir={tmp_path}/afile",),
        (f"--out_dir={tmp_path}", "--run_name=afile"),
    ):
        for init_from in ("scratch", "auto"):
            args = override(BASE, "--run_name=x", *args, f"--init_from={init_from}")
            result = cli("train.py", *dict.fromkeys(args), cwd=workdir)
            assert result.returncode == 2 and b"Traceback" not in result.stderr, result.stderr.decode()
            assert result.stderr.decode().count("error: ") == 1
