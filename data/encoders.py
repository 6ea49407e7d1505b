"""Worker processes that tokenize and draw the split, in order and in bounded memory."""

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

from nanometa.config import PrepareConfig
from nanometa.data.shards import token_dtype
from nanometa.data.sources import Piece, Skipped
from nanometa.data.tokenizer import Tokenizer

BATCH_CHARS = 2**20  # text in one task of a worker
# (unit, number of the piece in it, the piece; None ends the unit)
Item = tuple[int, int, Piece | Skipped | None]

_tokenizer: Tokenizer  # of a worker process
_cfg: PrepareConfig


class Encoded(NamedTuple):
    """What a worker makes of a piece's text."""

    split: str
    ids: np.ndarray  # (N,) of the dtype of shards
    n_bytes: int


def split_of(text: str, cfg: PrepareConfig) -> str:
    """train or val, by a hash of the text: it never depends on other documents, and equal texts share a side.

    A long document is hashed piece by piece (64 KiB), so it cannot dominate validation."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"split %d" % cfg.seed).digest()
    return "val" if int.from_bytes(digest, "little") < cfg.val_fraction * 2**64 else "train"


def _start_worker(tokenizer: Tokenizer, cfg: PrepareConfig) -> None:
    global _tokenizer, _cfg
    _tokenizer, _cfg = tokenizer, cfg
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()  # if that is killed, nobody would tell us to end
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(texts: list[str]) -> list[Encoded]:
    dtype = token_dtype(_tokenizer.n_vocab)
    return [Encoded(split_of(text, _cfg), _tokenizer.encode(text).astype(dtype), len(text.encode())) for text in texts]


class Encoders:
    """Worker processes that tokenize; the result does not depend on how many there are."""

    def __init__(self, tokenizer: Tokenizer, cfg: PrepareConfig):
        self.workers = cfg.workers
        self.pool = ProcessPoolExecutor(cfg.workers, initializer=_start_worker, initargs=(tokenizer, cfg))
        self.pool.submit(_encode, []).result()  # starts the processes now, before the progress bar starts a thread

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error) -> None:
        # a Ctrl-C in the middle of submit leaves an item that no worker is ever given: unless it is cancelled, it would
        # be waited for without end
        self.pool.shutdown(cancel_futures=True)

    def in_order(self, items: Iterable[Item]) -> Iterator[list[tuple[Item, Encoded | None]]]:
        """Tasks of (item, what became of its text, if it has any) in the order of the items. At most a few megabytes of
        text are under way, so memory does not grow with the corpus."""
        waiting: deque = deque()
        for task in tasks(items):
            texts = [piece.text for *_, piece in task if type(piece) is Piece]
            waiting.append((task, self.pool.submit(_encode, texts)))
            if len(waiting) > 2 * self.workers:
                yield _joined(*waiting.popleft())
        while waiting:
            yield _joined(*waiting.popleft())


def _joined(task: list[Item], future: Future) -> list[tuple[Item, Encoded | None]]:
    encoded = iter(future.result())
    return [(item, next(encoded) if type(item[2]) is Piece else None) for item in task]


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
