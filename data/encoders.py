"""Tokenizes texts in worker processes and assigns them to splits, in order and with bounded memory."""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn

import numpy as np

from nanometa.common.interrupts import interrupts_postponed
from nanometa.config import PrepareConfig
from nanometa.data.shards import token_dtype
from nanometa.data.sources import Piece, Skipped
from nanometa.data.tokenizer import Tokenizer

BATCH_CHARS = 2**20  # characters of text in one task of a worker
# (unit, number of the piece in the unit, the piece); None instead of a piece ends the unit
Item = tuple[int, int, Piece | Skipped | None]


class Encoded(NamedTuple):
    """The tokenized text of a piece."""

    split: str
    ids: np.ndarray  # (N,), in the dtype of the shards
    n_bytes: int


def split_of(piece: Piece, cfg: PrepareConfig) -> str:
    """Returns the split of a piece, train or val: the one that its source assigns, or else one by a hash of its text.

    A split by hash does not depend on other documents, and equal texts are in the same split. A long document is
    assigned in pieces of 64 KiB, so that it cannot dominate the validation split."""
    if piece.split:
        return piece.split
    digest = hashlib.blake2b(piece.text.encode(), digest_size=8, key=b"split %d" % cfg.seed).digest()
    return "val" if int.from_bytes(digest, "little") < cfg.val_fraction * 2**64 else "train"


class WorkerDied(Exception):
    """Raised if a worker process has ended, such as by the kernel when memory ran out."""


def _work(connection: Connection, tokenizer: Tokenizer, cfg: PrepareConfig) -> None:
    """Tokenizes the lists of pieces that arrive, in a worker process, until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()  # if it is killed, this worker must end by itself
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            pieces = connection.recv()
            try:
                answer = _encode(pieces, tokenizer, cfg)
            except Exception as error:
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
                answer = error
            connection.send(answer)


def _encode(pieces: list[Piece], tokenizer: Tokenizer, cfg: PrepareConfig) -> list[Encoded]:
    """Tokenizes pieces of text and assigns them to splits."""
    dtype = token_dtype(tokenizer.n_vocab)
    return [
        Encoded(split_of(piece, cfg), tokenizer.encode(piece.text).astype(dtype), len(piece.text.encode()))
        for piece in pieces
    ]


class Worker:
    """A worker process, and the pipe that only it and its parent use.

    A concurrent.futures.ProcessPoolExecutor has one pipe for all results. If a worker dies while it writes one, the
    parent waits for the rest of it forever."""

    def __init__(self, tokenizer: Tokenizer, cfg: PrepareConfig):
        self.connection, end = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_work, args=(end, tokenizer, cfg), daemon=True)
        self.process.start()
        end.close()  # so that the death of the worker ends the pipe

    def send(self, pieces: list[Piece]) -> None:
        """Gives the worker pieces to tokenize. It must have answered before, or both could wait for each other."""
        try:
            self.connection.send(pieces)
        except OSError:
            self._died()

    def receive(self) -> list[Encoded]:
        """Waits for the tokenized texts. Raises what the worker raised, or WorkerDied."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self._died()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _died(self) -> NoReturn:
        self.process.join()
        if self.process.exitcode == -signal.SIGTERM:  # a scheduler signals all processes; this one's is on its way
            raise KeyboardInterrupt
        raise WorkerDied

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Encoders:
    """Worker processes that tokenize. The result does not depend on their number."""

    def __init__(self, tokenizer: Tokenizer, cfg: PrepareConfig):
        self.workers: list[Worker] = []
        try:
            with interrupts_postponed():  # a worker that has just been forked has the handlers of this process
                self.workers += (Worker(tokenizer, cfg) for _ in range(cfg.workers))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error) -> None:
        with interrupts_postponed():
            for worker in self.workers:
                worker.kill()

    def in_order(self, items: Iterable[Item]) -> Iterator[list[tuple[Item, Encoded | None]]]:
        """Yields lists of (item, its tokenized text, or None if it has no text), in the order of the items.

        Each worker has one task at a time, and they take turns. The next task is read before a worker is waited for.
        At most a few megabytes of text are in progress, so memory does not grow with the corpus. Raises WorkerDied."""
        working: deque[tuple[list[Item], Worker]] = deque()
        idle = deque(self.workers)
        for task in tasks(items):
            joined = None
            if not idle:
                done, worker = working.popleft()
                joined = _joined(done, worker.receive())
                idle.append(worker)
            worker = idle.popleft()
            worker.send([piece for *_, piece in task if type(piece) is Piece])
            working.append((task, worker))
            if joined is not None:
                yield joined
        for done, worker in working:
            yield _joined(done, worker.receive())


def _joined(task: list[Item], encoded: list[Encoded]) -> list[tuple[Item, Encoded | None]]:
    """Pairs the items of a task with their tokenized texts."""
    each = iter(encoded)
    return [(item, next(each) if type(item[2]) is Piece else None) for item in task]


def tasks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Groups items into lists that hold about BATCH_CHARS characters of text each."""
    task, size = [], 0
    for item in items:
        task.append(item)
        size += len(item[2].text) if type(item[2]) is Piece else 64
        if size >= BATCH_CHARS:
            yield task
            task, size = [], 0
    if task:
        yield task
