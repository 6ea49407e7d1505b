"""Tokenizes texts in worker processes and assigns them to splits, in order and with bounded memory."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from nanometa.common.interrupts import interrupts_postponed
from nanometa.config import PrepareConfig
from nanometa.data.shards import token_dtype
from nanometa.data.sources import Piece, Skipped
from nanometa.data.tokenizer import Tokenizer

BATCH_CHARS = 2**20  # characters of text in one task of a worker
# (unit, number of the piece in the unit, the piece); None instead of a piece ends the unit
Item = tuple[int, int, Piece | Skipped | None]

_tokenizer: Tokenizer  # both set in a worker process only
_cfg: PrepareConfig


class Encoded(NamedTuple):
    """The tokenized text of a piece."""

    split: str
    ids: np.ndarray  # (N,), in the dtype of the shards
    n_bytes: int


def split_of(text: str, cfg: PrepareConfig) -> str:
    """Returns the split of a text, train or val, by a hash of the text.

    The split does not depend on other documents, and equal texts are in the same split. A long document is assigned in
    pieces of 64 KiB, so that it cannot dominate the validation split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"split %d" % cfg.seed).digest()
    return "val" if int.from_bytes(digest, "little") < cfg.val_fraction * 2**64 else "train"


def _start_worker(tokenizer: Tokenizer, cfg: PrepareConfig) -> None:
    """Initializes a worker process, and makes it end when its parent ends."""
    global _tokenizer, _cfg
    _tokenizer, _cfg = tokenizer, cfg
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()  # if it is killed, this worker must end by itself
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(texts: list[str]) -> list[Encoded]:
    """Tokenizes texts and assigns them to splits, in a worker process."""
    dtype = token_dtype(_tokenizer.n_vocab)
    return [Encoded(split_of(text, _cfg), _tokenizer.encode(text).astype(dtype), len(text.encode())) for text in texts]


class Encoders:
    """A pool of worker processes that tokenize. The result does not depend on their number.

    Interrupts are postponed within every call of the pool, because they would leave its locks in a wrong state. Such a
    call takes at most the time in which a worker tokenizes a few texts of BATCH_CHARS."""

    def __init__(self, tokenizer: Tokenizer, cfg: PrepareConfig):
        self.workers = cfg.workers
        with interrupts_postponed():
            self.pool = ProcessPoolExecutor(cfg.workers, initializer=_start_worker, initargs=(tokenizer, cfg))
            self.pool.submit(_encode, []).result()  # starts the processes before the progress bar starts a thread

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error) -> None:
        # An exception in the middle of submit can leave an item that no worker ever receives. Without cancelling it,
        # shutdown would wait for it forever.
        with interrupts_postponed():
            self.pool.shutdown(cancel_futures=True)

    def in_order(self, items: Iterable[Item]) -> Iterator[list[tuple[Item, Encoded | None]]]:
        """Yields lists of (item, its tokenized text, or None if it has no text), in the order of the items.

        At most a few megabytes of text are in progress, so memory does not grow with the corpus."""
        waiting: deque = deque()
        for task in tasks(items):
            texts = [piece.text for *_, piece in task if type(piece) is Piece]
            with interrupts_postponed():
                waiting.append((task, self.pool.submit(_encode, texts)))
            if len(waiting) > 2 * self.workers:
                yield _joined(*waiting.popleft())
        while waiting:
            yield _joined(*waiting.popleft())


def _joined(task: list[Item], future: Future) -> list[tuple[Item, Encoded | None]]:
    """Waits for the result of a task and pairs it with the task's items."""
    with interrupts_postponed():
        encoded = iter(future.result())
    return [(item, next(encoded) if type(item[2]) is Piece else None) for item in task]


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
