"""The script for a machine with a GPU: a stage that fails or hangs harms no other; a second call completes the first.

The slow test runs every stage itself, at a tiny size on the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanometa.benches import gpu, gpu_stages
from nanometa.benches.gpu_stages import KINDS, STAGES, by_kind
from nanometa.common.errors import UserError
from tests.conftest import ROOT

LINE = {"what": "speed", "value": 2.0, "unit": "x/s", "goal": "at least 1", "met": True}


def fake(name: str, output: Path, then: str) -> list[str]:
    """A stage that writes one result and then does something else."""
    line = json.dumps(json.dumps({"stage": name} | LINE) + "\n")
    return [sys.executable, "-c", f"open({str(output / gpu.RESULTS)!r}, 'a').write({line})\n{then}"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Returns a function that runs the script with stages of its own: name -> Python code after the first result."""
    monkeypatch.chdir(ROOT)

    def run(stages: dict[str, str], *args: str) -> tuple[str, str]:
        monkeypatch.setattr(gpu, "stage_command", lambda name, a: fake(name, a.output, stages[name]))
        error = ""
        try:
            gpu.main(["--tiny", "--device=cpu", f"--output={tmp_path}", "--stages", *stages, *args])
        except UserError as refusal:
            error = str(refusal)
        return capsys.readouterr().out, error

    return run


def test_a_failed_stage_does_not_stop_the_next_and_is_repeated_alone(call, tmp_path):
    out, error = call({"training": "raise SystemExit(3)", "quickstart": "pass"})
    assert "failed after" in out and "passed after" in out and "not passed: training." in error
    (tmp_path / gpu.RESULTS).open("a").write('{"stage": "dec')  # half a line, which a kill leaves
    out, error = call({"training": "pass", "quickstart": "raise SystemExit(3)"})
    assert "quickstart: passed in an earlier call" in out and not error
    lines = gpu.read_lines(tmp_path / gpu.RESULTS)[1:]
    assert [line.get("verdict", line.get("what")) for line in lines] == ["speed", "passed", "speed", "passed"]
    table = (tmp_path / "table.md").read_text()
    assert "| training | passed |" in table and "| tests | not started |" in table and "goal at least 1: met" in table
    assert (tmp_path / "gpu.png").exists() is False  # these results have nothing to draw


def test_the_time_limit_also_ends_processes_in_sessions_of_their_own(call, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST", 1)
    sleeper = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid)"
    started = time.monotonic()
    hang = f"{sleeper}; sys.stdout.flush(); time.sleep(60)"
    out, error = call({"training": hang, "decoding": "pass"}, "--deadline=4")
    assert time.monotonic() - started < 20 and "timed out" in out and "speed: 2 x/s" in out
    # the deadline is over, so nothing else was started
    assert "decoding: not started, because the deadline of 4 s is near" in out and "training, decoding" in error
    pid = (tmp_path / "log.txt").read_text().split()[-1]
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout
    assert state == "" or state.startswith("Z")


def test_damaged_results_are_refused_in_one_sentence_and_kept(call, tmp_path):
    path = tmp_path / gpu.RESULTS
    path.write_text('{"device": "x"}\nnot json\n')
    _, error = call({"training": "pass"})
    assert "line 2 is no line of benches/gpu.py" in error and path.read_text() == '{"device": "x"}\nnot json\n'


def test_results_of_another_version_are_not_mixed_in(call, tmp_path):
    call({"training": "pass"})
    path = tmp_path / gpu.RESULTS
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"commit": "another"}), *rest]) + "\n")
    before = path.read_bytes()
    _, error = call({"training": "pass"})
    assert "commit another -> " in error and "give another --output" in error and path.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--device=cpu",), "add --tiny"),
        (("--tiny", "--device=cpu", "--deadline=0"), "leaves no time"),
        (("--tiny", "--device=cpu", "--nanogpt=nowhere"), "has no model.py"),
        (("--tiny", "--device=cpu", "--nanogpt=~/nowhere"), f"--nanogpt={Path.home()}/nowhere has no model.py"),
        (("--tin", "--device=cpu"), "unknown setting --tin: did you mean 'tiny'"),
        (("--device=tpu",), "argument --device: invalid choice: 'tpu' .*; --help lists all arguments"),
        (("--deadline=soon",), "argument --deadline: invalid float value: 'soon'; --help lists all arguments"),
        (("--deadline=9", "--deadline=9"), "--deadline is given 2 times: give it once"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(args, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        gpu.main([*args, f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_stage_by_itself_refuses_bad_input_in_one_sentence():
    with pytest.raises(UserError, match="unknown setting --outptu: did you mean 'output'"):
        gpu_stages.main(["decoding", "--outptu=x", "--device=cpu"])


def test_every_kernel_has_a_kind():
    names = {
        "nvjet_sm90_tst": 3.0,
        "cudnn_generated_fort_native_sdpa_sm90_flash": 2.0,
        "triton_red_fused_log_softmax": 1.0,
    }
    kinds = by_kind(names | {"Memcpy HtoD": 0.5, "triton_poi_fused_gelu": 0.25})
    assert list(kinds) == list(KINDS)
    assert (kinds["matrix products"], kinds["attention"], kinds["loss"], kinds["copies"]) == (3.0, 2.0, 1.0, 0.5)
    assert kinds["norms, GELU and the rest"] == 0.25


@pytest.mark.slow
def test_every_stage_runs_at_a_tiny_size_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "nanometa.benches.gpu", "--tiny", "--device=cpu", "--deadline=900"]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, f"--output={tmp_path}"], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = gpu.read_lines(tmp_path / gpu.RESULTS)[1:]
    assert [line["stage"] for line in lines if line.get("verdict") == "passed"] == list(STAGES)
    assert {line["stage"] for line in lines if "what" in line} == set(STAGES)
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
