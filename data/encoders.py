"""Worker processes that tokenize, in order and in bounded memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np

from data.sources import Piece, Skipped
from data.tokenizer import Tokenizer

BATCH_CHARS = 2**20  # text in one task of a worker
NOTHING = np.empty(0, np.uint32)
# (unit, number of the piece in it, the piece; None ends the unit)
Item = tuple[int, int, Piece | Skipped | None]

_tokenizer: Tokenizer  # of a worker process


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()  # if that is killed, nobody would tell us to end
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [_tokenizer.encode(text) for text in texts]


class Encoders:
    """Worker processes that tokenize; the result does not depend on how many there are."""

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self.workers = workers
        self.pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(tokenizer,))
        self.pool.submit(_encode, []).result()  # starts the processes now, before the progress bar starts a thread

    def in_order(self, items: Iterable[Item]) -> Iterator[tuple[Item, np.ndarray]]:
        """(item, ids) in the order of the items. At most a few megabytes of text are under way, so memory does not
        grow with the corpus."""
        waiting: deque = deque()
        for task in tasks(items):
            waiting.append(
                (task, self.pool.submit(_encode, [piece.text for *_, piece in task if type(piece) is Piece]))
            )
            if len(waiting) > 2 * self.workers:
                yield from self._finish(*waiting.popleft())
        while waiting:
            yield from self._finish(*waiting.popleft())

    @staticmethod
    def _finish(task: list[Item], future: Future) -> Iterator[tuple[Item, np.ndarray]]:
        encoded = iter(future.result())
        for item in task:
            yield item, next(encoded) if type(item[2]) is Piece else NOTHING


def tasks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of about BATCH_CHARS of text."""
    task, size = [], 0
    for item in items:
        task.append(item)
        size += len(item[2].text) if type(item[2]) is Piece else 64
        if size >= BATCH_CHARS:
            yield task
            task, size = [], 0
    if task:
        yield task
