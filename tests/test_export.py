"""Tests that exported models compute what runs compute, in programs that know nothing of this project."""

import ast
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.data.tokenizer import Tokenizer
from nanometa.inference.generation import MarkerPlan, generate, lay_out
from nanometa.inference.scoring import score, text_batch
from nanometa.interop.export import write_model
from nanometa.interop.weights import CODE, config_of, is_plain, placement_of
from tests.conftest import ROOT, WORDS
from tests.runs import small_run

TEXT, STEPS = "the cat sat on a mat and saw that one dog had run over two hills", 12
YARN = {"position": "rope", "rope_scaling": "yarn", "rope_factor": 2.0}
# second attention, positions, target rule, injection
DIAGONAL = [
    ("meta", {}, "ignore", "uniform"),
    ("meta", {"position": "rope", "meta_position": "none"}, "skip", "periodic"),
    ("diagonal", {"position": "rope", "meta_position": "none_first"}, "ignore", "periodic"),
    ("meta_mean", {"meta_position": "none"}, "skip", "uniform"),
    ("read_meta", {**YARN, "meta_position": "none_second", "yarn_ramp": "paper", "bias": True}, "ignore", "uniform"),
    ("causal", {"position": "rope", "rope_scaling": "ntk", "rope_factor": 2.0}, "skip", "none"),
    ("causal", {**YARN, "yarn_attention_factor": 1.1}, "skip", "uniform"),
    ("random", {"position": "rope", "rope_scaling": "pi", "rope_factor": 2.0}, "ignore", "none"),
    ("none", {"position": "rope"}, "skip", "uniform"),
    ("none", {"n_inner": 48}, "ignore", "none"),
    ("none", {"bias": True}, "ignore", "none"),
]
PLACES = [
    {}, {"meta_position": "none"}, {"position": "rope"}, {"position": "rope", "meta_position": "none"},
    {"position": "rope", "meta_position": "none_first"}, {"position": "rope", "meta_position": "none_second"}, YARN,
]  # fmt: skip


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS) + "\n"] * 3, 300)


def make_run(tokenizer: Tokenizer, second: str, places: dict, rule: str, injection: str):
    """Returns a run of two chunks a window, with 6 markers each."""
    M = 0 if injection == "none" else 6
    data = {"injection": injection, "chunk_content": 32 - M, "chunk_markers": M, "dataset": "x"}
    return small_run(tokenizer, data, rule, second_attention=second, **places)


def expected(run, folder) -> tuple[dict, dict]:
    """Exports a run. Returns a case for tests/export_reader.py, and what it must find."""
    folder.mkdir()
    write_model(run, config_of(run, placement_of(run, "auto"), 1337), folder)
    plan, encode = MarkerPlan.of_run(run), run.tokenizer.encode
    text = [run.tokenizer.eot, *map(int, encode(TEXT))]
    marked = lay_out(run, encode(TEXT), plan)
    rows = ["the cat", TEXT, "two hills to eat"]
    greedy = list(generate(run, list(marked), plan, STEPS, temperature=0))
    case = {
        "folder": str(folder),
        "n_content": run.tokenizer.n_content,
        "text_ids": text,
        "marked_ids": marked if plan.M else [],
        "batch": [[run.tokenizer.eot, *map(int, encode(row))] for row in rows],
        "steps": STEPS,
        "marked_steps": len(greedy),
    }
    scores = [score(run, row, plan)[1] for row in rows]
    batch = text_batch(run, marked)
    with torch.no_grad():
        logits = run.model.logits(run.model(batch.tokens, batch.positions, batch.meta_index))[0]
    want = {
        "text_logits": targets_logits(run, plan, text, logits),
        "nats": score(run, TEXT, plan)[1],
        "batch_nats": [math.fsum(nats) for nats in scores],
        "batch_loss": math.fsum(itertools.chain(*scores)) / sum(map(len, scores)),
        "greedy": [token for token in greedy if token != run.tokenizer.meta],
        "marked": marked,
        "marked_greedy": greedy,
    }
    return case, want


def targets_logits(run, plan, text, logits) -> torch.Tensor:
    """Returns the logits (len(text) - 1, n_content) that predict each text token but the first, by the target rule."""
    places = [position for position in range(len(logits)) if position not in plan][: len(text)]
    sources = places[:-1] if run.config.target_rule == "skip" else [place - 1 for place in places[1:]]
    return logits[sources, : run.tokenizer.n_content]


def check(found: dict, want: dict, run) -> None:
    plain = is_plain(run)
    assert found["class"] == ("GPT2LMHeadModel" if plain else "NanoMetaForCausalLM")
    logits = torch.tensor(found["logits"])
    largest = want["text_logits"].abs().max()  # of single precision, in which low bits depend on the processor
    assert (logits[:-1] - want["text_logits"]).abs().max() < 1e-5 * max(1.0, largest)
    assert found["loss"] == pytest.approx(np.mean(want["nats"]), abs=1e-5)
    assert found["greedy"] == found["greedy_uncached"] == want["greedy"]
    assert found["beams"] == found["beams_uncached"] and len({*map(tuple, found["beams"])}) == 2
    assert found["saved_equal"] and found["tied"] and found["others_hidden"]
    assert found["apart"] < 2e-5 and found["batch"] == found["single"]
    assert found["harness_nats"] == pytest.approx(want["batch_nats"], abs=1e-4)
    assert found["loss_padded_right"] == pytest.approx(want["batch_loss"], abs=1e-5)
    if not plain:  # transformers' GPT-2 also scores the first token of a text after pads
        assert found["loss_padded_left"] == pytest.approx(want["batch_loss"], abs=1e-5)
    assert 0 < found["bf16_error"] < 0.2 and len(found["bf16_greedy"]) == 4
    assert found["eager_error"] < 2e-5
    if "placed" in found:
        assert found["placed"] == want["marked"]
        assert found["marked_loss"] == pytest.approx(np.mean(want["nats"]), abs=1e-5)
        assert found["marked_greedy"] == found["marked_batch"] == want["marked_greedy"]
        assert run.tokenizer.meta in want["marked_greedy"]
        markers = [token == run.tokenizer.meta for token in want["marked_greedy"]]
        assert [token == run.tokenizer.meta for token in found["marked_beams"]] == markers


def read_elsewhere(cases: list[dict], folder) -> list[dict]:
    """Returns what another program finds, in a folder from which nothing of ours can be imported."""
    shutil.copy(ROOT / "tests/export_reader.py", folder)
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {**os.environ, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "export_reader.py", "cases.json", "results.json"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "Do you wish" not in done.stdout + done.stderr
    assert "newly initialized" not in done.stderr, done.stderr
    return json.loads((folder / "results.json").read_text())


def compare_all(tokenizer, cells, folder) -> list[dict]:
    runs = [make_run(tokenizer, *cell) for cell in cells]
    prepared = [expected(run, folder / f"model_{number}") for number, run in enumerate(runs)]
    found = read_elsewhere([case for case, _ in prepared], folder)
    for cell, run, one, (_, want) in zip(cells, runs, found, prepared, strict=True):
        try:
            check(one, want, run)
        except AssertionError as error:
            error.add_note(f"in {cell}")
            raise
    return found


def test_exports_compute_what_runs_compute_where_nothing_of_ours_can_be_imported(small_tokenizer, tmp_path):
    assert {second for second, *_ in DIAGONAL} == set(SECOND_ATTENTIONS)
    found = compare_all(small_tokenizer, DIAGONAL, tmp_path)
    assert found[0]["pipeline"].startswith("the cat") and len(found[0]["pipeline"]) > len("the cat")
    assert found[0]["pipeline_batch"][0] == found[0]["pipeline"]


@pytest.mark.slow
def test_every_arm_position_and_target_rule_is_exported_exactly(small_tokenizer, tmp_path):
    cells = []
    for second, places, rule, injection in itertools.product(
        SECOND_ATTENTIONS, PLACES, ("ignore", "skip"),
        ("uniform", "periodic", "none"),
    ):  # fmt: skip
        marked, moved = injection != "none", "meta_position" in places
        if SECOND_ATTENTIONS[second].markers == ("refused" if marked else "needed"):
            continue
        if not (moved and not marked):
            cells.append((second, places, rule, injection))
    assert len(cells) > 150
    compare_all(small_tokenizer, cells, tmp_path)


def test_the_exported_code_imports_torch_and_transformers_only():
    for path in CODE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level == 1 and node.module == "configuration_nanometa" else [node.module]
            for name in names:
                first = name.partition(".")[0]
                assert first in ("torch", "transformers") or first in sys.stdlib_module_names, (path, name)
