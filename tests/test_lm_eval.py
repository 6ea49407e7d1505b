"""Tests that lm-eval, unmodified, computes this project's figures from an export."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from nanometa.config.command_line import load_config
from nanometa.inference.generation import MarkerPlan
from nanometa.inference.scoring import score, score_batch, text_batch
from nanometa.interop.export import ExportConfig, export
from nanometa.training.checkpoint import load_run
from tests.runs import run_on, saved

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[lm-eval]'"
    ),
]


def evaluate(folder, tasks: str, output, batch: int, more: str = "") -> dict:
    """Runs the command line of lm-eval. Returns the figures by task, and the samples by task."""
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={folder},trust_remote_code=True{more}",
        "--include_path", str(folder / "lm_eval"), "--tasks", tasks,
        "--device", "cpu", "--batch_size", str(batch), "--output_path", str(output), "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(output)}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, cwd=output.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = output.rglob("results_*.json")
    samples = {}
    for name in tasks.split(","):
        (lines,) = output.rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in lines.read_text().splitlines()]
    return json.loads(results.read_text())["results"], samples


def test_lm_eval_prints_our_bits_per_byte_with_and_without_markers(workdir, tmp_path):
    for kind in ("u", "n"):  # a NanoMetaForCausalLM and a GPT2LMHeadModel
        changes = {"block_size": 64} if kind == "u" else {"block_size": 56, "second_attention": "none"}
        saved_run = saved(run_on(workdir / f"data/{kind}", **changes), tmp_path / f"out/{kind}")
        argv = [f"--run={saved_run}", f"--output={tmp_path}/hf_{kind}", "--eval_texts=30"]
        folder, run = export(load_config(ExportConfig, argv)), load_run(saved_run)
        pieces = [json.loads(line)["text"] for line in open(folder / "lm_eval/nanometa_bits_per_byte.jsonl")]
        plans = {"": MarkerPlan.of_run(run), ",marker_placement=none": MarkerPlan("none", 1, 0, 0)}
        for more, plan in plans.items() if kind == "u" else [("", plans[""])]:
            nats = [math.fsum(score(run, piece, plan)[1]) for piece in pieces]
            ours = sum(nats) / math.log(2) / sum(len(piece.encode()) for piece in pieces)
            assert f"{ours:.4f}" in (folder / "README.md").read_text()
            for batch in (1, 4):
                output = tmp_path / f"{kind}{batch}{len(more)}"
                found, _ = evaluate(folder, "nanometa_bits_per_byte", output, batch, more)
                assert found["nanometa_bits_per_byte"]["bits_per_byte,none"] == pytest.approx(ours, abs=2e-5)


def test_lm_eval_scores_answers_as_we_do(workdir, tmp_path):
    run = run_on(workdir / "data/u", block_size=1024)
    folder = export(load_config(ExportConfig, [f"--run={saved(run, tmp_path / 'out/long')}", "--eval_texts=6"]))
    plan = MarkerPlan.of_run(run)
    names = sorted(path.stem for path in folder.glob("lm_eval/*.jsonl") if "bits" not in path.stem)
    assert len(names) == 5
    _, samples = evaluate(folder, ",".join(names), tmp_path / "results", 4)
    for name in names:
        for line in samples[name]:
            context, answers = line["doc"]["context"], line["doc"].get("choices", [line["doc"]["answer"]])
            found = [float(answer[0][0]) for answer in line["resps"]]
            assert found == pytest.approx([-nats(run, context, answer, plan) for answer in answers], abs=1e-3)


def nats(run, context: str, answer: str, plan: MarkerPlan) -> float:
    """Returns the nats of an answer after a context that does not begin with <|endoftext|>."""
    whole, n_context = run.tokenizer.encode(context + answer), len(run.tokenizer.encode(context))
    ids: list[int] = []
    for token in whole.tolist():
        while len(ids) in plan:
            ids.append(run.tokenizer.meta)
        ids.append(token)
    scores = score_batch(run.model, text_batch(run, ids))
    assert scores.targets[0].tolist() == whole[1:].tolist()
    return scores.nats[0, n_context - 1 :].sum().item()
