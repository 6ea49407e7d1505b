"""Trains as train.py does, with a fault at a chosen moment. train.py has no hooks for this: its calls are wrapped.
fault_data.py prepares datasets in the same way.

    FAULT='{"at": 17, "do": ["SIGKILL"]}' TRACE=x.trace ATTEMPT=0 torchrun ... tests/faulty_train.py --run_name=x ...

A moment is a call that creates, fills, syncs, renames or deletes a file, a file that is hashed, or a batch. Moments are
numbered. The trace is a file with one JSON line for each moment or batch. A first run without a fault writes it, and
the faults of later runs are aimed at its moments.
"""

import builtins
import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import safetensors
import safetensors.torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from nanometa import train
from nanometa.config.command_line import run_cli
from nanometa.data import loader, shards
from nanometa.training import checkpoint

# calls that fail on a full disk; deleting files and opening them for reading still work
FILLING = ("open", "write", "fsync", "mkdir", "rename", "replace", "tensors")


class Fault:
    """The fault that a process shall meet.

    at: number of the moment. rank: the process that meets it, or None for all processes. limit: largest size of a file
    in bytes (RLIMIT_FSIZE), in force from the start. read_only: a folder in which every change fails, as on a read-only
    mount. do: what happens at the moment:

        "half"    the process is killed in the middle of a write
        "full"    the disk is full from here on
        "once"    this one call fails as on a full disk
        a list    signals that are sent before the call, one after another. A number is a pause in seconds, and "parent"
                  sends the signal to torchrun: ["SIGTERM", 1.2, "parent SIGKILL"]
    """

    def __init__(self, plan: dict, trace: Path, attempt: int):
        self.at, self.do, self.attempt = plan.get("at"), plan.get("do"), attempt
        self.rank = int(os.environ.get("RANK", 0))
        if plan.get("rank") not in (None, self.rank):
            self.at = None
        self.all_moments = plan.get("trace", False)
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.moment, self.phase, self.disk_full = -1, "start", False
        self.read_only = plan.get("read_only")
        if plan.get("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan["limit"], plan["limit"]))

    def note(self, **what) -> None:
        line = {"attempt": self.attempt, "rank": self.rank, **what}
        os.write(self.trace, (json.dumps(line) + "\n").encode())

    def before(self, call: str, name="", half=None) -> None:
        """Counts a moment: `call` is about to happen to the file `name`, and half() would do the first half of it."""
        self.moment += 1
        if self.all_moments:
            self.note(moment=self.moment, call=call, name=str(name), phase=self.phase, halves=half is not None)
        if self.moment == self.at:
            self.note(strikes=call)
            if self.do == "half":
                half()
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.do == "full":
                self.disk_full = True
            elif self.do != "once":
                for item in self.do:
                    if isinstance(item, float):
                        time.sleep(item)
                    else:
                        *parent, name = item.split()
                        os.kill(os.getppid() if parent else os.getpid(), signal.Signals[name])
        if self.read_only and call not in ("batch", "hash") and str(name).startswith(self.read_only):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        if call in FILLING and (self.disk_full or (self.do == "once" and self.moment == self.at)):
            if half:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(name))

    def during(self, phase: str, function):
        def wrapped(*args, **kwargs):
            outer, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = outer

        return wrapped


class WatchedFile:
    """An open file in which every write is a moment and is flushed before it returns."""

    def __init__(self, file, name, fault: Fault):
        self._file, self._name, self._fault = file, name, fault

    def write(self, content) -> int:
        def half():
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        if len(content) > 1:  # print writes the end of a line separately
            self._fault.before("write", self._name, half)
        written = self._file.write(content)
        self._file.flush()
        return written

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def lines(trace: Path) -> list[dict]:
    """Returns the lines of a trace."""
    return [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []


def watch(fault: Fault, module, name: str, call: str) -> None:
    """Turns the calls of a function of a module, whose first argument names a file, into moments."""
    real = getattr(module, name)

    def watched(*args, **kwargs):
        fault.before(call, args[0])
        return real(*args, **kwargs)

    setattr(module, name, watched)


def wrap_disk(fault: Fault) -> None:
    """Turns the calls that change files and folders into moments."""
    real_open = open

    def watched_open(path, mode="r", *args, **kwargs):
        if isinstance(path, int) or mode.startswith("r"):
            return real_open(path, mode, *args, **kwargs)
        fault.before("open", path)
        return WatchedFile(real_open(path, mode, *args, **kwargs), path, fault)

    builtins.open = io.open = watched_open  # pathlib uses io.open

    for module, name, call in (
        (os, "fsync", "fsync"), (os, "mkdir", "mkdir"), (os, "rename", "rename"), (os, "replace", "replace"),
        (os, "unlink", "delete"), (os, "rmdir", "delete"), (shutil, "rmtree", "rmtree"),
    ):  # fmt: skip
        watch(fault, module, name, call)


def wrap(fault: Fault) -> None:
    """Turns the calls by which train.py and its modules touch the disk, and their batches, into moments."""
    save_file, batch, windows = safetensors.torch.save_file, loader.Windows.batch, train.step_windows
    wrap_disk(fault)
    for module in (checkpoint, shards):
        watch(fault, module, "file_sha256", "hash")

    def watched_save_file(tensors, path, *args, **kwargs):
        def half():
            save_file(tensors, path, *args, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)

        try:
            fault.before("tensors", path, half)
        except OSError as error:  # as safetensors reports it
            raise safetensors.SafetensorError(f"Error while serializing: I/O error: {error}") from None
        save_file(tensors, path, *args, **kwargs)

    safetensors.torch.save_file = watched_save_file

    step = None

    def watched_windows(step_, *args):
        nonlocal step
        step = step_
        return windows(step, *args)

    def watched_batch(self, rows):
        fault.before("batch", self.split)
        made = batch(self, rows)
        if self.split == "train":
            fault.note(step=step, windows=[int(row) for row in rows], tokens=int((made.tokens * made.targets).sum()))
        return made

    train.step_windows, loader.Windows.batch = watched_windows, watched_batch
    train.evaluate = fault.during("evaluation", train.evaluate)
    for name, phase in (("run", "training"), ("save", "saving")):
        setattr(train.Trainer, name, fault.during(phase, getattr(train.Trainer, name)))


def main(argv: list[str], plan: dict, trace: Path, attempt: int) -> None:
    """Runs train.main(argv) with a fault and ends the process as `python train.py` would.

    If torchrun restarts the process, the restart counts as another attempt and has no fault.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    fault = Fault({} if restarts else plan, trace, attempt + restarts)
    fault.note(pid=os.getpid())
    wrap(fault)
    sys.argv = ["train.py", *argv]
    run_cli(train.main)


if __name__ == "__main__":
    main(sys.argv[1:], json.loads(os.environ["FAULT"]), Path(os.environ["TRACE"]), int(os.environ["ATTEMPT"]))
