"""Tests tests/mutate.py: which changes it makes, and that its list of core files is complete."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanometa.common.errors import UserError
from tests import mutate
from tests.conftest import ROOT
from tests.fast_cases import every

TEXT = '''"""A docstring of 3 words."""

def f(n: int = 2, é: "1 + 1" = 0) -> "1 < 2":
    if n <= é and not True:
        return [n + 1][0]
    raise ValueError(f"{n + 1} is 5")
'''


def test_each_mutant_differs_in_one_expression():
    found = mutate.mutants("f.py", TEXT)
    rows = [tuple(row.strip() for row in mutate.difference(TEXT, mutant.text).splitlines()) for mutant in found]
    assert sorted(new.lstrip("+ ") for _, new in rows) == sorted([
        'def f(n: int = (3), é: "1 + 1" = 0) -> "1 < 2":', 'def f(n: int = 2, é: "1 + 1" = (1)) -> "1 < 2":',
        "if (n <= é or not True):", "if (n < é) and not True:", "if n <= é and (True):", "if n <= é and not (False):",
        "return [(n - 1)][0]", "return [n + (2)][0]", "return [n + 1][(1)]",
    ])  # fmt: skip
    assert all(ast.parse(mutant.text) and TEXT.splitlines()[mutant.line - 1] for mutant in found)


@pytest.mark.parametrize("file", every(5, mutate.TESTS))
def test_every_mutant_of_a_core_file_is_a_program(file):
    text = (ROOT / file).read_text()
    found = mutate.mutants(file, text)
    assert found == mutate.mutants(file, text) and found
    for mutant in found[:: max(1, len(found) // 10)]:
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(text))


def test_every_core_file_has_tests_that_exist():
    folders = {path.relative_to(ROOT).as_posix() for room in ("layers", "tasks") for path in (ROOT / room).glob("*.py")}
    assert {name for name in folders if not name.endswith("__init__.py")} <= mutate.TESTS.keys()
    for tests in mutate.TESTS.values():
        assert tests and all((ROOT / f"tests/{name}.py").is_file() for name in tests.split())


def keep_handlers(monkeypatch) -> None:
    """Lets the program keep the handlers of signals that these tests run under."""
    monkeypatch.setattr(mutate, "raise_interrupts", lambda: None)
    monkeypatch.setattr(mutate.signal, "getsignal", lambda number: signal.SIG_IGN)


@pytest.mark.slow
def test_a_caught_and_a_surviving_change_are_told_apart(tmp_path, monkeypatch, capsys):
    """In a repository of its own, whose test looks at one of two functions."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "core.py").write_text("def seen(n):\n    return n + 1\n\n\ndef unseen(n):\n    return n * 3\n")
    (tmp_path / "tests/test_core.py").write_text("from core import seen\n\ndef test_it():\n    assert seen(1) == 2\n")
    (tmp_path / "conftest.py").write_text("")  # puts the folder on the path
    before = {path: path.read_text() for path in tmp_path.rglob("*.py")}
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "TESTS", {"core.py": "test_core"})
    keep_handlers(monkeypatch)
    mutate.main(["--count=9"])
    out = capsys.readouterr().out.splitlines()
    assert [row for row in out if not row.startswith(" ")] == [
        "caught  core.py:2", "caught  core.py:2", "SURVIVED  core.py:6", "SURVIVED  core.py:6",
        "2 of 4 changes were caught, of 4 possible ones (seed 1)",
    ]  # fmt: skip
    assert "    +    return (n + 3)" in out and "    -    return n * 3" in out
    assert {path: path.read_text() for path in tmp_path.rglob("*.py")} == before
    (tmp_path / "tests/test_core.py").write_text("def test_it():\n    assert False\n")
    with pytest.raises(UserError, match="the tests of core.py .test_core. fail without a change"):
        mutate.main([])


def test_a_change_that_never_ends_is_caught(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_core.py").write_text("import time\n\ndef test_it():\n    time.sleep(60)\n")
    assert not mutate.passes(Path(tmp_path), "test_core", 1.0)


STOPPED = """
import pathlib, sys
sys.path.insert(0, {root!r})
from tests import mutate

mutate.ROOT, mutate.TESTS = pathlib.Path({folder!r}), {{"core.py": "test_core"}}
mutate.run_cli(mutate.main)
"""


@pytest.mark.parametrize("number", every(3, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
def test_a_stopped_program_leaves_neither_its_copy_nor_running_tests(tmp_path, number):
    folder, temporary = tmp_path / "core", tmp_path / "temporary"
    (folder / "tests").mkdir(parents=True)
    temporary.mkdir()
    (folder / "core.py").write_text("N = 1\n")
    (folder / "tests/test_core.py").write_text(
        f"import os, pathlib, time\n\ndef test_it():\n    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(\n"
        f"        f'{{os.getpid()}}.')\n    time.sleep(60)\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED.format(root=str(ROOT), folder=str(folder))], text=True, stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)}, start_new_session=True,
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)],
    )  # fmt: skip
    pid = tmp_path / "pid"
    while not pid.exists() or not pid.read_text().endswith("."):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert list(temporary.iterdir())
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == 130
    assert not list(temporary.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()[:-1]), 0)
