import json
import os

import pytest

from tests.conftest import ROOT, cli


@pytest.mark.slow
def test_the_quick_start_reaches_its_loss(tmp_path):
    """Repeats the run of `make quickstart`: it must reach at most 1.27 bits per byte, where xz needs about 1.55."""
    assert cli("prepare.py", cwd=tmp_path).returncode == 0
    config = str(ROOT / "config/tiny_meta.py")
    env = {"OMP_NUM_THREADS": str(os.cpu_count())}
    result = cli("train.py", config, "--wandb=disabled", cwd=tmp_path, env=env, timeout=1800)
    assert result.returncode == 0, result.stderr.decode()
    final = json.loads((tmp_path / "out/tiny_meta/metrics.jsonl").read_text().splitlines()[-1])
    assert final["kind"] == "final" and final["bits_per_byte"] <= 1.27
    assert cli("report.py", "curves", "out/tiny_meta", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out/tiny_meta/loss.png").stat().st_size > 10_000
