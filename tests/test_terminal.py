"""Tests that commands print to any stream: other encodings, closed streams, readers that end early, and full disks. The
output cannot steer a terminal."""

import io
import os
import subprocess
import sys

import pytest

from nanometa.common import terminal
from nanometa.common.errors import UserError
from nanometa.config.command_line import run_cli
from tests.conftest import ROOT, cli
from tests.runs import run_on, saved

# Prints text in every way that the commands do, and ends as its first argument says.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from rich.console import Console
from nanometa.common.errors import UserError
from nanometa.common.terminal import write, write_line
from nanometa.config.command_line import run_cli

TEXT = "caf\\u00e9 \\u2026 \\u4e2d \\U0001f600 \\udce9"

def main(argv):
    ending, times = argv[0], int(argv[1])
    assert sys.stdin.read() == ""
    for _ in range(times):
        write(TEXT + "\\n")
        write_line(TEXT)
        Console(soft_wrap=True).print(TEXT)
        print(TEXT)
        print(TEXT, file=sys.stderr) if times == 1 else None
    if ending == "refused":
        raise UserError(TEXT)
    if ending == "missing":
        raise FileNotFoundError(2, "gone", TEXT)
    if ending == "help":
        sys.exit(0)

run_cli(main)
"""


def run_program(ending: str, shell: str = "", times: int = 1, **env: str):
    command = f'{sys.executable} -c "$PROGRAM" {ending} {times} {shell}'
    env = {**os.environ, "PROGRAM": PROGRAM, **env}
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=100)


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "utf-8:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("ending", "status"), [("fine", 0), ("refused", 2), ("missing", 2)])
def test_characters_that_the_output_lacks_are_escaped(env, ending, status):
    done = run_program(ending, **env)
    assert done.returncode == status and b"Traceback" not in done.stderr, done.stderr.decode()
    encoding = {"latin-1": "latin-1", "utf-8:strict": "utf-8"}.get(env.get("PYTHONIOENCODING"), "ascii")
    shown = "café … 中 \U0001f600 \udce9".encode(encoding, "backslashreplace")
    assert done.stdout.splitlines() == [shown] * 4
    assert done.stderr.splitlines()[0] == shown and done.stderr.count(b"\n") == (2 if status else 1)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize(("ending", "status"), [("fine", 0), ("refused", 2)])
def test_a_closed_stream_counts_as_the_null_device(closed, ending, status):
    done = run_program(ending, closed)
    assert done.returncode == status and b"Traceback" not in done.stderr and b"Error" not in done.stderr
    assert (done.stdout == b"") == closed.startswith(">&-") and (done.stderr == b"") == ("2>&-" in closed)


@pytest.mark.parametrize("ending", ["fine", "refused", "help"])
@pytest.mark.parametrize("times", [2, 20_000])
def test_a_reader_that_ends_early_causes_no_message(ending, times):
    """A short output fits into buffers, and the reader's end shows only when they are flushed."""
    done = run_program(
        ending, "| sleep 0; exit ${PIPESTATUS[0]}" if times == 2 else "| head -1; exit ${PIPESTATUS[0]}", times
    )
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert done.returncode in ((1,) if times > 2 else (0, 1, 2))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("ending", ["fine", "help"])
def test_a_full_disk_is_one_sentence(ending):
    done = run_program(ending, "> /dev/full")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 + (ending == "never"), done.stderr.decode()
    assert b"No space left on device" in done.stderr


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_text_on_a_terminal_cannot_steer_it(monkeypatch):
    text = "a\x1b[2J\x9b2J\x07\x7f\r\tb\né‍\n"
    monkeypatch.setattr("sys.stdout", screen := Screen())
    terminal.write(text)
    terminal.write(text, terminal.BOLD)
    plain = "a\\x1b[2J\\x9b2J\\x07\\x7f\\r\tb\né‍\n"
    assert screen.getvalue() == f"{plain}\x1b[1m{plain}\x1b[0m"
    monkeypatch.setattr("sys.stdout", pipe := io.StringIO())
    terminal.write(text, terminal.BOLD)
    assert pipe.getvalue() == text


def test_a_line_with_a_name_is_one_printable_line_everywhere(monkeypatch):
    name = "out/\x1b]0;x\x07\n\udce9 é"
    for stream in (Screen(), io.StringIO()):
        monkeypatch.setattr("sys.stdout", stream)
        terminal.write_line(name)
        terminal.write_line(name, file=stream)
        assert stream.getvalue() == "out/\\x1b]0;x\\x07\\n\\udce9 é\n" * 2
    assert terminal.shortened("a\nb\x1b") == "a\\nb\\x1b"


def test_an_error_of_the_system_is_printable(monkeypatch, capsys):
    def fail(argv):
        raise OSError(2, "gone \x1b[2J", "x\x1b[2J")

    with pytest.raises(SystemExit) as end:
        run_cli(fail)
    assert end.value.code == 2 and "\x1b" not in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names of files may be any bytes only on Linux")
def test_no_command_prints_the_name_of_a_run_as_it_is(workdir, tmp_path):
    """Of a run whose name has an escape sequence. The report, which reads no weights, also bears a byte that is no
    text."""
    odd = "r\x1b[2J"
    run = saved(run_on(workdir / "data/u", position="rope"), tmp_path / "out" / odd)
    for args in (
        ("sample.py", "--max_new_tokens=2"),
        ("eval.py", "tasks", "--tasks", "parity", "--level=easy", "--lengths=60", "--n=2"),
        ("eval.py", "perplexity", "--max_tokens=100"),
        ("probe.py", "positions", "--tasks", "parity", "--level=easy", "--lengths=60", "--n=2"),
        ("report.py", "--output=page"),
        ("report.py", "curves"),
    ):
        if args[0] == "report.py" and "\udce9" not in odd:
            (run / "config.json").write_text("{}")
            (run / "metrics.jsonl").write_text(
                '{"kind": "val", "step": 1, "content_tokens": 9, "bits_per_byte": 2.0}\n' * 2
            )
            odd = f"{odd}\udce9"
            run = run.rename(tmp_path / "out" / odd)
        name = f"out/{odd}" if args[0] == "report.py" else f"--run=out/{odd}"
        result = cli(*args, name, cwd=tmp_path)
        assert result.returncode == 0, result.stderr.decode()
        printed = result.stdout + result.stderr
        assert b"\x1b" not in printed and b"Traceback" not in printed and b"\xe9" not in printed, args
        assert b"r\\x1b[2J" in printed or args[1] == "--output=page"
    assert (run / "loss.png").is_file() and "r\\x1b[2J\\udce9" in (tmp_path / "page/report.html").read_text()


def test_a_users_error_has_one_line():
    assert str(UserError("a\x1b\nb")) == "a\\x1b\\nb"
