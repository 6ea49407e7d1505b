"""Runs a program of the repository in a fork of a process that has already imported torch and all programs.

Imports take most of the time of a short command. test_forked.py runs every program in a process of its own, too.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
LIBRARIES = ("torch", "torch._dynamo", "scipy.stats", "matplotlib.figure", "rich.progress", "tyro", "tiktoken")
PROGRAMS = ("train", "prepare", "sample", "eval", "probe", "report", "export")
SERVER.set_forkserver_preload([*LIBRARIES, *(f"nanometa.{name}" for name in PROGRAMS)])


def run(script: Path, args: tuple[str, ...], cwd: Path, env: dict, stdin: bytes, timeout: float):
    """Runs a Python program and returns what subprocess.run would return: returncode, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("in", "out", "error")]
        for file, content in zip(files, (stdin, b"", b""), strict=True):
            file.write_bytes(content)
        process = SERVER.Process(target=_program, args=([str(script), *args], str(cwd), env, list(map(str, files))))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(process.name, timeout)
        return subprocess.CompletedProcess(
            [script, *args], process.exitcode, *(file.read_bytes() for file in files[1:])
        )


def _program(command: list[str], cwd: str, env: dict, files: list[str]) -> None:
    for number, file in enumerate(files):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    # multiprocessing has closed this process's stdin, and its stdout and stderr may belong to a terminal
    own = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors, "closefd": False}
    sys.stdin, sys.stdout = open(0, **own), open(1, "w", **own)
    sys.stderr = open(2, "w", buffering=1, **own | {"errors": "backslashreplace"})
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # so that the program starts its own processes in the way that is usual on the platform
    multiprocessing.set_start_method(None, force=True)
    sys.argv, sys.path[:0] = command, [str(Path(command[0]).parent)]
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    # ends in the order of an interpreter: wait for threads, call the registered exit functions, flush the output
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
