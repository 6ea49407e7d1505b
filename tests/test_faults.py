import re
import time

import pytest
import safetensors.torch
import torch

from nanometa.config import GPTConfig, TrainConfig
from nanometa.model import GPT
from nanometa.training import checkpoint
from nanometa.training.optimizer import Optimizer
from tests.conftest import ROOT, cli


@pytest.mark.slow
def test_a_run_survives_a_few_faults_of_every_kind(workdir):
    """Runs the short version of `make faults`."""
    result = cli("tests/faults.py", "--quick", f"--workdir={workdir}", cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    out = result.stdout.decode()
    assert result.returncode == 0, out + result.stderr.decode()[-3000:]
    tried, survived, lost, kills = map(int, re.search(r"^all +(\d+) +(\d+) +(\d+) +(\d+)", out, re.M).groups())
    assert tried == survived > 10 and lost == 0 and kills > 5


@pytest.mark.slow
def test_a_checkpoint_at_gpt2_size_is_timed(tmp_path):
    """Prints how long a save and a verified load take, and the share of hashing (pytest -s)."""
    model = GPT(GPTConfig(vocab_size=50304, content_vocab_size=50303))
    optimizer = Optimizer(model, TrainConfig())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(1e-4)
    files = {checkpoint.WEIGHTS: model.state_dict(), checkpoint.OPTIMIZER: optimizer.tensors()}
    spent, cpu = {}, {}

    def timed(name, function, *args):
        began, busy = time.perf_counter(), time.process_time()
        result = function(*args)
        spent[name], cpu[name] = time.perf_counter() - began, time.process_time() - busy
        return result

    folder = timed("save", checkpoint.save, tmp_path, "step", 1, files, 2)
    paths = [folder / name for name in files]
    timed("sha256", lambda: [checkpoint.file_sha256(path) for path in paths])
    timed("read", lambda: [safetensors.torch.load_file(path) for path in paths])
    size = sum(path.stat().st_size for path in paths) / 1e9
    for clock, seconds in (("wall", spent), ("CPU", cpu)):
        save, sha256, read = (seconds[name] for name in ("save", "sha256", "read"))
        print(
            f"{size:.2f} GB, {clock} time: save {save:.1f} s, of it sha256 {sha256 / save:.0%}; "
            f"verified load {sha256 + read:.1f} s, of it sha256 {sha256 / (sha256 + read):.0%}"
        )
    assert size > 1.8
