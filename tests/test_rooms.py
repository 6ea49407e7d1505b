"""Tests the order of the folders: which may import which, and that everything is imported as nanometa.NAME."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanometa.benches import preparing
from nanometa.config import TrainConfig
from nanometa.config.command_line import load_config
from nanometa.training.dataset import recipe_of
from nanometa.training.run_log import environment
from tests.conftest import ROOT
from tests.runs import run_on, saved

# A folder may import only those before it in this list.
ORDER = (
    "common", "config", "data", "tasks", "meta_attention", "layers", "model", "training", "inference", "evals",
    "reports", "probes", "interop", "benches", "studies",
)  # fmt: skip
COMMANDS = ("prepare", "train", "sample", "eval", "probe", "report", "bench", "study", "export")
FILES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "records", "out")]
REMOTE = ROOT / "interop/hugging_face"  # copied into exports, where its files import each other
PRODUCT = [path for path in FILES if path.relative_to(ROOT).parts[0] not in ("tests", "nanometa", "docs")]


def room_of(path: Path) -> str:
    """Returns the folder of a file, or for a file in the root its name without the ending."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> list[str]:
    """Returns the full names of the modules that a file imports, anywhere in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent == REMOTE, f"{path}:{node.lineno} imports relatively"
            module = [f"nanometa.{alias.name}" for alias in node.names] if node.module == "nanometa" else [node.module]
            names += [f"nanometa.interop.hugging_face.{node.module}"] if node.level else module
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def test_every_file_is_in_a_known_folder():
    assert {room_of(path) for path in PRODUCT} <= {*ORDER, *COMMANDS}
    assert {path.stem for path in ROOT.glob("*.py")} == {*COMMANDS, "model", "meta_attention"}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_folders_above_it(path):
    room = room_of(path)
    for name in imported(path):
        if name.startswith("nanometa."):
            other = name.split(".")[1]
            assert other in ORDER, f"{path} imports the command {other}"
            assert room in COMMANDS or ORDER.index(other) <= ORDER.index(room), f"{path} of {room} imports {name}"


def test_own_modules_are_imported_as_nanometa():
    flat = {*ORDER, *COMMANDS} | {path.stem for path in PRODUCT if path.stem != "__init__"}
    for path in FILES:
        for name in imported(path):
            first = name.partition(".")[0]
            # torch.profiler, dataclasses and similar names belong to others; our own names all start with nanometa
            ours = first in {*ORDER, *COMMANDS} or (first in flat and first not in sys.stdlib_module_names)
            assert not ours, f"{path} imports {name}: write from nanometa.… import"


ELSEWHERE = """
import importlib, sys
import config
assert config.mine, config
from nanometa.inference.generation import MarkerPlan, generate, lay_out
from nanometa.inference.scoring import score
from nanometa.training.checkpoint import load_run
run = load_run(sys.argv[1])
plan = MarkerPlan.of_run(run)
ids = lay_out(run, run.tokenizer.encode("the cat"), plan)
assert len(list(generate(run, ids, plan, max_new_tokens=5))) >= 5
tokens, nats = score(run, "the cat sat on a mat", plan)
assert len(tokens) == len(nats) > 3
for name in ("data", "model", "train", "tasks", "training", "common"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is importable without nanometa")
"""


def test_runs_load_in_a_folder_with_another_config_module(workdir, tmp_path):
    run = saved(run_on(workdir / "data/u"), tmp_path / "out/small")
    (tmp_path / "config.py").write_text("mine = True\n")
    installed = tmp_path / "site"  # like pip install -e, it makes only nanometa importable
    installed.mkdir()
    (installed / "nanometa").symlink_to(ROOT / "nanometa")
    (tmp_path / "program.py").write_text(ELSEWHERE)
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "program.py", str(run)], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_config_files_may_import_config(tmp_path, monkeypatch):
    """A user's file may say `from config import …` or build on a recipe. It gets our classes, and nothing stays in
    sys.modules."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom config import GPTConfig, TrainConfig\n"
        "from config.tiny_meta import config as base\n"
        "config = replace(base, model=replace(base.model, n_layer=7), max_steps=3)\n"
        "assert type(base.model) is GPTConfig and type(base) is TrainConfig\n"
    )
    foreign = type(sys)("config")
    monkeypatch.setitem(sys.modules, "config", foreign)
    cfg = load_config(TrainConfig, [str(tmp_path / "mine.py")], config_file=True)
    assert type(cfg) is TrainConfig and (cfg.model.n_layer, cfg.max_steps, cfg.run_name) == (7, 3, "mine")
    assert sys.modules["config"] is foreign and "config.tiny_meta" not in sys.modules


def test_files_of_the_repository_are_found_from_any_folder(tmp_path, monkeypatch):
    """Recipes, the commit, and the sources that benchmarks prepare are found by paths relative to the file that uses
    them."""
    monkeypatch.chdir(tmp_path)
    for recipe in ("c4", "stdlib", "fineweb_edu"):
        found = recipe_of(f"data/{recipe}_periodic_2048plus")
        assert (found.recipe, found.injection, found.min_document_tokens) == (recipe, "periodic", 2048)
    for name in ("unheard_of", "checks", "gpt2"):  # no such file, a file with code, a training config
        assert recipe_of(f"data/{name}_none") is None
    assert preparing.ROOT == ROOT
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert environment()["commit"] == head.stdout.strip()
