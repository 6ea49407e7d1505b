"""A program of the repository as a fork of a process that has imported torch, which is most of what a short command
takes. Nothing of the repository is imported before, so that it runs as in an interpreter of its own."""

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
SERVER.set_forkserver_preload(
    ["torch", "torch._dynamo", "scipy.stats", "matplotlib.figure", "rich.progress", "tyro", "tiktoken"]
)


def run(script: Path, args: tuple[str, ...], cwd: Path, env: dict, stdin: bytes, timeout: float):
    """What subprocess.run of a Python program gives: returncode, stdout, stderr."""
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
    # multiprocessing has closed the first, and the server's others may be a terminal's
    own = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors, "closefd": False}
    sys.stdin, sys.stdout = open(0, **own), open(1, "w", **own)
    sys.stderr = open(2, "w", buffering=1, **own | {"errors": "backslashreplace"})
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # the program's own processes are the platform's usual ones
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
    threading._shutdown()  # as an interpreter does: wait for threads, then what is registered, then the last bytes
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
