"""Makes runs with random weights in a moment, so that evaluations can be tested without training."""

import json
from pathlib import Path

import torch

from nanometa.config import GPTConfig, TrainConfig
from nanometa.config.checks import to_dict
from nanometa.data.shards import read_manifest
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training.checkpoint import STATE, WEIGHTS, Run, save
from tests.test_model import sharpen, wake


def small_run(tokenizer: Tokenizer, data: dict, rule: str = "ignore", seed: int = 3, **shape) -> Run:
    """Returns a run whose weights all matter and whose predictions are far from uniform.

    data: the entries injection, chunk_content, chunk_markers and dataset of the run's state.
    """
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64, "random_fraction": 0.3, **shape}
    model = GPTConfig(vocab_size=tokenizer.n_vocab, content_vocab_size=tokenizer.n_content, **shape)
    cfg = TrainConfig(model=model, run_name="small", target_rule=rule, dtype="float32", dataset=data["dataset"])
    gpt = sharpen(wake(GPT(model, seed)))
    for name, p in gpt.named_parameters():
        if name.endswith(("wpe.weight", "wte.weight", "mlp.c_fc.weight", "c_proj.weight")):
            torch.nn.init.normal_(p, std=0.3)
    return Run(gpt.eval(), tokenizer, cfg, {"step": 3, "data": data}, Path("out/small"))


def run_on(folder: Path, **changes) -> Run:
    """Returns a run that looks as if it had been trained on a prepared dataset, in windows of one chunk."""
    manifest = read_manifest(folder)
    data = {key: manifest[key] for key in ("injection", "chunk_content", "chunk_markers")} | {"dataset": str(folder)}
    changes = {"block_size": data["chunk_content"] + data["chunk_markers"], **changes}
    return small_run(Tokenizer.load(folder), data, **changes)


def saved(run: Run, run_dir: Path) -> Path:
    """Saves the run as a checkpoint in run_dir, as train.py does, and returns run_dir."""
    run_dir.mkdir(parents=True)
    data = {**run.state["data"], "tokenizer": run.tokenizer.fingerprint, "content_sha256": {}, "shards": {}}
    state = {**run.state, "data": data, "config": to_dict(run.config), "best": None}
    files = {WEIGHTS: run.model.state_dict(), STATE: json.dumps(state).encode(), **run.tokenizer.files()}
    save(run_dir, "step", run.state["step"], files, keep=2)
    return run_dir
