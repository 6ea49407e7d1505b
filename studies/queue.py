"""Works through the cells of a plan with ordinary commands, several side by side, and appends a line for each.

The queue can be interrupted at any moment, also by a kill. The next call continues with the cells that have no line
yet, and with the last checkpoint of a training run that was interrupted. The finished lines are all that another
machine needs to go on with the remaining cells.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import IO

from nanometa.common.errors import UserError
from nanometa.common.files import lock_folder, read_json, read_json_lines, remove, sync
from nanometa.common.terminal import write_line
from nanometa.evals.common import write_lines
from nanometa.studies.cell import Interrupted, fingerprint, run_cell, runs_of
from nanometa.studies.plan import Cell, Plan
from nanometa.training.clock import hms

ROOT = Path(__file__).parents[1]
POLL_S = 0.2  # between looks at a running command


class Queue:
    """The cells of a plan that have no line yet, and the workers that run them."""

    def __init__(self, plan: Plan, lines: Path, out_dir: Path, workers: int, threads: int, stop_after_s: float | None):
        """out_dir: folder of all runs. threads: of every command. stop_after_s: seconds after which no command is
        started, and running ones are interrupted; None = never.

        Raises UserError if another queue works in the same folder or writes to the same file, or if a line of the file
        is damaged."""
        if os.name == "nt":
            raise UserError("a study needs Linux or macOS, because its queue follows processes as Windows cannot.")
        self.plan, self.lines_file, self.work = plan, lines, out_dir / plan.name
        self.workers, self.threads = workers, threads
        self.ends_at = None if stop_after_s is None else time.monotonic() + stop_after_s
        self.stop = threading.Event()
        self.writing = threading.Lock()
        self.pretraining: dict[str, threading.Lock] = defaultdict(threading.Lock)  # by the name of the run
        self.failed: list[str] = []
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.work)
        if self.lock is None:
            raise UserError(f"another process works on {self.work}: wait for it, or choose another --out_dir.")
        self.running = self._wait_for_orphans()
        self.writer = self._lock_lines()
        mend(lines)
        done = {line["cell"] for line in read_lines(lines, plan)}
        self.cells = plan.cells()
        self.waiting = [cell for cell in self.cells if cell.key not in done]
        for cell in self.cells:
            if cell.key in done:
                self._remove_weights(cell)  # a kill may have come between the line and the removal

    def run(self) -> bool:
        """Runs all cells without a line. Returns whether none is left.

        Raises KeyboardInterrupt after a signal, when the running commands have ended."""
        signals = []

        def interrupt(kind, frame) -> None:
            signals.append(kind)
            self.stop.set()

        previous = {kind: signal.signal(kind, interrupt) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self.waiting:
                self._prepare()
            with ThreadPoolExecutor(self.workers) as pool:
                workers = [pool.submit(self._work) for _ in range(self.workers)]
            for worker in workers:
                worker.result()  # raises what a worker raised, such as for a full disk
        except Interrupted:
            pass
        finally:
            for kind, handler in previous.items():
                signal.signal(kind, handler)
            self.writer.close()
            self.running.close()
            self.lock.release()
        left = len(self.cells) - len({line["cell"] for line in read_lines(self.lines_file, self.plan)})
        self.say(
            f"{len(self.cells) - left} of {len(self.cells)} cells are finished; their lines are in {self.lines_file}"
        )
        if signals:
            raise KeyboardInterrupt
        if self.failed:
            cells = "1 cell" if len(self.failed) == 1 else f"{len(self.failed)} cells"
            raise UserError(f"{cells} failed: {'; '.join(self.failed)}")
        return left == 0

    def _wait_for_orphans(self) -> IO:
        """Waits for commands of an earlier queue that was killed. Returns an open file, which is locked.

        Every command inherits the file. The lock ends when the queue and all its commands have ended."""
        import fcntl  # not on Windows

        file = open(self.work / ".running", "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.say(f"waiting for commands in {self.work} that a killed queue has left behind")
            fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _lock_lines(self) -> IO:
        """Returns the open file of the lines, which is locked: a second queue would run the same cells again.

        Raises UserError if another queue holds the lock."""
        import fcntl  # not on Windows

        self.lines_file.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.lines_file, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            self.running.close()
            self.lock.release()
            raise UserError(
                f"another queue writes to {self.lines_file}: wait for it, or choose another --output."
            ) from None
        return file

    def say(self, text: str) -> None:
        write_line(f"{datetime.now():%H:%M:%S} {text}")

    def _prepare(self) -> None:
        """Makes the datasets that do not exist yet.

        Raises UserError if a dataset of that name was made by another command."""
        for name, commands in self.plan.prepare.items():
            manifest = ROOT / "data" / name / "manifest.json"
            if not manifest.exists():
                self.say(f"preparing {manifest.parent}")
                for command in commands:
                    self._command(f"prepare_{name}", command.split())
            elif (made_by := read_json(manifest)["command"]) != commands[-1]:
                raise UserError(
                    f"{manifest.parent} was made by another command ({made_by}): delete it, or move it away."
                )

    def _work(self) -> None:
        """Runs cells until none is left or the queue stops."""
        while not self.stop.is_set():
            with self.writing:
                if not self.waiting:
                    return
                # prefer a cell whose pretraining no other worker is busy with
                free = (cell for cell in self.waiting if not self._first_run(cell).locked())
                cell = next(free, self.waiting[0])
                self.waiting.remove(cell)
            try:
                with self._first_run(cell):
                    self._finish(cell)
            except Interrupted:
                return
            except UserError as error:
                self.say(f"{cell.key} failed: {error}")
                self.failed.append(f"{cell.key} ({error})")
            except BaseException:
                self.stop.set()  # the other workers end, too, and `run` raises this
                raise

    def _first_run(self, cell: Cell) -> threading.Lock:
        """Returns the lock of a cell's first training run, which several cells may share."""
        return self.pretraining[runs_of(self.plan, cell)["pretrain"]]

    def _finish(self, cell: Cell) -> None:
        """Runs a cell and appends its line."""
        self.say(f"{cell.key}: started")
        started = time.monotonic()
        figures = run_cell(self.plan, cell, self.work, self._command)
        line = {
            "study": self.plan.name, "plan": fingerprint(self.plan, cell), "cell": cell.key, "stage": cell.stage.name,
            "arm": cell.arm.name, "seed": cell.seed, "variant": cell.variant, **figures,
        }  # fmt: skip
        with self.writing:
            write_lines(self.lines_file, [line])
            sync(self.lines_file)
            left = len(self.waiting)
        self._remove_weights(cell)
        took = time.monotonic() - started
        self.say(
            f"{cell.key}: finished in {hms(took)}; {left} cells are waiting, about {hms(left * took / self.workers)}"
        )

    def _remove_weights(self, cell: Cell) -> None:
        """Removes the checkpoints of a finished cell's last run: nothing reads them, and hundreds would fill a disk.

        Pretrained weights stay if the cell fine-tunes them, because other cells start from them, too."""
        run = list(runs_of(self.plan, cell).values())[-1]
        for kind in ("step_*", "best*"):
            for checkpoint in (self.work / run).glob(kind):
                remove(checkpoint)

    def _command(self, name: str, command: list[str]) -> float:
        """Runs a command of this repository to its end. Returns the CPU seconds that it used.

        Raises Interrupted, after interrupting the command, if the queue stops, and UserError if the command fails."""
        if self.stop.is_set() or self._late():
            self.stop.set()
            raise Interrupted
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        arguments = command[1:] if command[0] == "python" else command
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, env=environment, pass_fds=[self.running.fileno()],
            )  # fmt: skip
        told = False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if not told and (self.stop.is_set() or self._late()):
                self.stop.set()
                told = True
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)  # training saves a checkpoint
            time.sleep(POLL_S)
        process.returncode = os.waitstatus_to_exitcode(status)
        if told:
            raise Interrupted
        if process.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise UserError(f"{' '.join(command[:2])} ended with status {process.returncode} ({last[0]}): see {log}.")
        return usage.ru_utime + usage.ru_stime

    def _late(self) -> bool:
        return self.ends_at is not None and time.monotonic() >= self.ends_at


def read_lines(path: Path, plan: Plan) -> list[dict]:
    """Returns the lines of a study.

    Raises UserError for a damaged line, for one of another study, and if the plan has changed since a cell ran."""
    if not path.exists():
        return []

    def check(line: dict) -> None:
        for name in ("study", "plan", "cell", "stage", "arm", "seed", "variant", "pretrain", "measures"):
            line[name]

    lines = read_json_lines(path, check, "study.py")
    for line in lines:
        if line["study"] != plan.name:
            raise UserError(f"{path} has lines of the study {line['study']!r}, not {plan.name!r}: name another file.")
    cells = {cell.key: cell for cell in plan.cells()}
    for line in lines:
        if line["cell"] in cells and line["plan"] != fingerprint(plan, cells[line["cell"]]):
            raise UserError(
                f"{path} has a line of {line['cell']} that was measured with other settings than those of {plan.path}: "
                f"move that line to another file, and the cell runs again."
            )
    return lines


def mend(path: Path) -> None:
    """Removes the last line of a file if a kill has cut it short."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
