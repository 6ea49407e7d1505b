import json
import os
import re
import subprocess
import sys

import pytest
import torch

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.data.loader import Windows, step_windows
from nanometa.data.shards import TokenStream
from nanometa.data.tokenizer import META, Tokenizer
from tests.conftest import ROOT, TINY, cli, manifest, override, refusal, tree
from tests.training_runs import TORCHRUN

BASE = override(TINY, "--dataset=data/u", "--block_size=32", "--micro_batch_size=2")
HEADER = (
    r"--- window (\d+): sample (\d+), epoch (\d+), process (\d+) of (\d+), micro-batch (\d+) of (\d+), "
    r"(\d+) content tokens, (\d+) markers, (\d+) scored targets ---\n"
)

# Trains, and writes a line {"step", "rank", "windows"} for each micro-batch that train_step computes.
SPY = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from nanometa import train
from nanometa.layers import loss
from nanometa.data.loader import Windows
from nanometa.config.command_line import run_cli

step, rank = None, None
load, update, forward = Windows.batch, train.Trainer.train_step, loss.Objective.forward

def train_step(self, stop):
    global step, rank
    step, rank = self.step, self.dist.rank
    return update(self, stop)

def batch(data, windows):
    made = load(data, windows)
    made.tokens.windows = windows.tolist()
    return made

def objective(self, tokens, *rest):  # the windows that are trained on, whenever they were loaded
    with open(f"seen{{rank}}.jsonl", "a") as file:
        file.write(json.dumps({{"step": step, "rank": rank, "windows": tokens.windows}}) + "\\n")
    return forward(self, tokens, *rest)

Windows.batch, loss.Objective.forward = batch, objective
train.Trainer.train_step = train_step
run_cli(train.main)
"""


def show(workdir, step: int, *args: str, **how) -> str:
    result = cli("train.py", *override(BASE, *args), f"--show_batch={step}", cwd=workdir, **how)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def windows_of(out: str) -> list[tuple[dict, str]]:
    """Returns the numbers in each window's header, and the text below it."""
    names = ("window", "sample", "epoch", "rank", "world", "micro", "micros", "content", "markers", "scored")
    heads = list(re.finditer(HEADER, out))
    ends = [head.start() for head in heads[1:]] + [len(out)]
    return [
        (dict(zip(names, map(int, head.groups()), strict=True)), out[head.end() : end - 1])
        for head, end in zip(heads, ends, strict=True)
    ]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_show_batch_lists_the_windows_that_the_step_trains_on(workdir, tmp_path, world):
    """Includes a step whose windows belong to two epochs."""
    (tmp_path / "data").symlink_to(workdir / "data")
    (tmp_path / "spy.py").write_text(SPY)
    launcher = TORCHRUN if world == 2 else (sys.executable,)
    args = ("--batch_size=80", "--micro_batch_size=20", "--eval_interval=100", "--max_steps=12")
    command = [*launcher, str(tmp_path / "spy.py"), *override(BASE, *args), "--run_name=spied"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr.decode()
    seen = [json.loads(line) for rank in range(world) for line in (tmp_path / f"seen{rank}.jsonl").open()]

    n_windows = Windows(workdir / "data/u", "train", 32, "ignore").n_windows
    border = n_windows // 80  # the step in which the first epoch ends
    assert border < 12 and n_windows % 80
    for step in (0, border):
        shown = windows_of(show(tmp_path, step, *args, launcher=launcher))
        loaded = [(part["rank"], w) for part in seen if part["step"] == step for w in part["windows"]]
        assert [(head["rank"], head["window"]) for head, _ in shown] == loaded and len(loaded) == 80
        micros = [part["windows"] for part in seen if part["step"] == step]
        assert [head["micro"] for head, _ in shown] == [i % (4 // world) for i, m in enumerate(micros) for _ in m]
        assert {(head["world"], head["micros"]) for head, _ in shown} == {(world, 4 // world)}
        assert [head["sample"] for head, _ in shown] == list(range(step * 80, (step + 1) * 80))
        assert [head["epoch"] for head, _ in shown] == [
            sample // n_windows for sample in range(step * 80, step * 80 + 80)
        ]


@pytest.mark.parametrize("rule", ["ignore", "skip"])
def test_show_batch_prints_the_text_with_its_markers(workdir, rule):
    tokenizer = Tokenizer.load(workdir / "data/u")
    contents = manifest(workdir / "data/n")["splits"]["train"]["shards"]
    content = TokenStream(workdir / "data/n", contents, tokenizer.n_vocab)  # the same content without markers
    data = Windows(workdir / "data/u", "train", 32, rule)
    shown = windows_of(show(workdir, 3, f"--target_rule={rule}"))
    assert len(shown) == 8
    for head, text in shown:
        window = head["window"]
        assert text.replace(META, "") == tokenizer.decode(content.read(window * 28, (window + 1) * 28))
        assert text.count(META) == head["markers"] == 4 and head["content"] == 28
        assert head["scored"] == int((data.batch(torch.tensor([window]).numpy()).targets >= 0).sum())


def test_show_batch_writes_nothing_and_needs_no_run_name(workdir, monkeypatch):
    monkeypatch.setattr(train, "GPT", lambda *args: pytest.fail("a model was built"))
    monkeypatch.chdir(workdir)
    before = tree(workdir)
    train.main([*BASE, "--show_batch=0", "--max_steps=1"])
    assert tree(workdir) == before


def test_a_closed_pipe_causes_no_traceback(workdir):
    command = (
        f"{sys.executable} {ROOT}/train.py {' '.join(override(BASE, '--batch_size=128'))} --show_batch=3 | head -c 100"
    )
    done = subprocess.run(command, shell=True, cwd=workdir, capture_output=True, timeout=100)
    assert done.stdout.startswith(b"step 3 of data/u, epoch ") and done.stderr == b""


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--show_batch=-1",), "show_batch=-1 is out of range: it must be at least 0"),
        (
            ("--show_batch=30", "--max_steps=30"),
            "show_batch=30 is beyond the run, whose last step is 29 with max_steps=30: give --show_batch=29",
        ),
        (("--show_batch=0", "--batch_size=7"), "batch_size=7 windows cannot be split over 1 processes"),
        (("--show_batch=0", "--dataset=data/nothing"), "there is no dataset in data/nothing"),
        (("--show_batch=0", "--block_size=33"), "use --block_size=32 or 64"),
    ],
)
def test_bad_settings_of_show_batch_are_refused(workdir, monkeypatch, args, sentence):
    monkeypatch.chdir(workdir)
    with pytest.raises(UserError, match=sentence):
        train.main(override(BASE, *args))


def test_show_batch_beyond_the_run_is_refused_on_the_command_line(workdir):
    assert "whose last step is 4" in refusal(cli("train.py", *BASE, "--show_batch=9", "--max_steps=5", cwd=workdir))


def test_the_shares_of_all_processes_are_the_step():
    cfg = TrainConfig(batch_size=12, micro_batch_size=2)
    whole = step_windows(5, cfg, 50, 0, 1)
    assert whole.shape == (6, 2)
    for world in (2, 3, 6):
        shares = [step_windows(5, cfg, 50, rank, world) for rank in range(world)]
        assert [w for share in shares for w in share.flat] == list(whole.flat)
        assert all(share.shape == (6 // world, 2) for share in shares)


@pytest.mark.parametrize(
    ("marks", "settings"),
    [
        ("<|sr|>", ("--marker_place=sentence", "--sentence_tokens=8")),
        ("<|cl|><|cr|>", ("--marker_place=span", "--marks=clcr", "--max_span=12", "--evict=segment")),
    ],
)
def test_markers_that_are_placed_while_reading_are_counted_and_padding_is_not_shown(workdir, marks, settings):
    """Once every window of such a run was said to have no markers, and its padding counted as content."""
    args = ("--dataset=data/n", "--block_size=40", "--target_rule=skip", "--second_attention=none",
            "--meta_position=previous", "--closing_reads=segment", "--position=rope", *settings)  # fmt: skip
    out = show(workdir, 1, *args)
    found = [re.search(HEADER, line + "\n") for line in out.splitlines() if line.startswith("--- window")]
    assert len(found) == 8 and all(match[8] == "28" for match in found)
    assert sum(int(match[9]) for match in found) == out.count(marks) * marks.count("|>") > 0
    assert out.count("<|endoftext|>") < 8  # those of documents
