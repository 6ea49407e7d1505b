"""Compares the losses of a hundred steps with recorded ones.

The losses are those of the meta arm (two layers of 48, 0.1M parameters, float32, one thread) on generated text that is
prepared here. tests/golden/meta.json has the losses, and the torch version and the processor that computed them. With
the same torch and processor the losses must be equal bit for bit, elsewhere to 1e-3. After a change that is meant to
alter them, write the file anew:

    OMP_NUM_THREADS=1 python -m tests.test_golden
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from nanometa.training.run_log import environment
from tests.conftest import cli, losses, write_texts

GOLDEN = Path(__file__).parent / "golden/meta.json"
MACHINE = ("torch", "cpu_capability", "processor")


def hundred_losses(folder: Path) -> list[float]:
    write_texts(folder / "texts", documents=20)
    for args in (
        ("prepare.py", "--source=files", "--files=texts/*.txt", "--name=g", "--bpe_vocab_size=300", "--workers=1",
         "--chunk_content=28", "--chunk_markers=4", "--val_fraction=0.1"),
        ("train.py", "--n_layer=2", "--n_head=2", "--n_embd=48", "--block_size=64", "--dtype=float32",
         "--compile=False", "--wandb=disabled", "--device=cpu", "--batch_size=4", "--micro_batch_size=2",
         "--learning_rate=3e-3", "--min_lr=3e-4", "--warmup_steps=10", "--log_interval=1", "--max_steps=100",
         "--dataset=data/g", "--run_name=golden"),
    ):  # fmt: skip
        result = cli(*args, cwd=folder)
        assert result.returncode == 0, result.stderr.decode()
    return losses(folder / "out/golden")


def test_a_hundred_losses_equal_the_recorded_ones(tmp_path):
    golden, here = json.loads(GOLDEN.read_text()), environment()
    found = hundred_losses(tmp_path)
    assert len(found) == 100 and found[-1] < 0.6 * found[0]
    if all(golden[name] == here[name] for name in MACHINE):
        assert found == golden["losses"]
    else:
        assert found == pytest.approx(golden["losses"], rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        record = {name: environment()[name] for name in MACHINE}
        record["losses"] = hundred_losses(Path(folder))
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(print(f"{GOLDEN}: {record['losses'][0]} .. {record['losses'][-1]}"))
