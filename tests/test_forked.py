"""Tests that a command in a forked process behaves like one in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests import forked
from tests.conftest import cli
from tests.training_runs import BASE

TELLS = """
import atexit, multiprocessing, os, pathlib, sys, threading, time
atexit.register(print, "registered")
root = str(pathlib.Path(__file__).parent)
print(__name__, sys.argv, sys.path[0] == root, os.getcwd(), sorted(os.environ.items()), sys.stdin.read())
print([(of.encoding, of.errors, of.isatty()) for of in (sys.stdin, sys.stdout, sys.stderr)])
print(multiprocessing.get_start_method(), threading.current_thread() is threading.main_thread())
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread has ended"))).start()
sys.stderr.write("no end of line")
END
"""
ENDS = {
    "": 0, "sys.exit()": 0, "sys.exit(3)": 3, "sys.exit('why')": 1, "1 / 0": 1, "os.kill(os.getpid(), 9)": -9,
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="commands are forked on Linux alone")
@pytest.mark.parametrize("end", ENDS)
def test_a_forked_command_behaves_like_a_process_of_its_own(tmp_path, end):
    script, args = tmp_path / "tells.py", ("--one=1", "two words")
    script.write_text(TELLS.replace("END", end))
    env = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "LANG", "LC_"))} | {"X": "é"}
    one = forked.run(script, args, tmp_path, env, "input é".encode(), 60)
    other = subprocess.run(
        [sys.executable, script, *args], cwd=tmp_path, env=env, input="input é".encode(), capture_output=True
    )
    assert one.returncode == other.returncode == ENDS[end]
    assert one.stdout == other.stdout
    # only the last line, because the frames of the two tracebacks differ
    last = [said.stderr.decode().splitlines()[-1:] for said in (one, other)]
    assert last[0] == last[1] and one.stderr.startswith(b"no end of line") == other.stderr.startswith(b"no end of line")


COMMANDS = {
    "prepare.py": ("--source=files", "--files=texts/*.txt", "--bpe_vocab_size=300", "--name=fresh"),
    "train.py": (*BASE, "--max_steps=2", "--run_name=fresh"),
    "sample.py": ("--run=out/fresh", "--prompt=the cat", "--max_new_tokens=3"),
    "eval.py": ("perplexity", "--run=out/fresh", "--lengths=30", "--output=fresh.jsonl"),
    "probe.py": ("ablation", "--run=out/fresh", "--windows=4", "--output=fresh.jsonl"),
    "report.py": ("out/fresh", "--output=page"),
    "export.py": ("--run=out/fresh", "--output=exported"),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", COMMANDS)
def test_every_program_imports_what_it_needs(workdir, program):
    """In a fork, a program may use what another one has imported."""
    assert {f"{name}.py" for name in forked.PROGRAMS} == COMMANDS.keys()
    if program not in ("prepare.py", "train.py"):
        cli("train.py", *COMMANDS["train.py"], cwd=workdir)  # refused if the run is there
    result = cli(program, *COMMANDS[program], cwd=workdir, launcher=(sys.executable, "-u"))
    assert result.returncode == 0, result.stderr.decode()
