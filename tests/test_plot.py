import json

import numpy as np
import pytest

from plot import smooth
from tests.conftest import cli


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "out/some"
    folder.mkdir(parents=True)
    data = {"val_text_compressed": {"gzip_9_bits_per_byte": 2.0, "xz_bits_per_byte": 1.5}}
    (folder / "config.json").write_text(json.dumps({"data": data}))
    lines = [{"kind": "train", "step": i, "content_tokens": 100 * i, "loss": 5 / (i + 1)} for i in range(50)]
    lines += [{"kind": "val", "step": i, "content_tokens": 100 * i, "bits_per_byte": 3.0 - i / 50} for i in (0, 25, 49)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_picture_comes_out(run_dir, tmp_path):
    result = cli("plot.py", cwd=tmp_path)
    assert result.stdout.decode().strip() == "out/some/loss.png", result.stderr.decode()
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_metrics_are_refused(run_dir, tmp_path):
    for name, sentence in (("other", "no readable metrics"), ("some", "no evaluation yet")):
        (run_dir / "metrics.jsonl").write_text("")
        result = cli("plot.py", f"out/{name}", cwd=tmp_path)  # matplotlib may speak of its font cache, too
        assert result.returncode == 2 and sentence in result.stderr.decode() and b"Traceback" not in result.stderr


def test_smoothing_keeps_a_line_and_lowers_noise():
    line = np.linspace(3, 1, 200)
    assert np.abs(smooth(list(line)) - line)[10:-10].max() < 1e-9
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(list(noise)).std() < 0.15
