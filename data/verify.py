"""Verifies shards: the SHA-256 of every file against the manifest, and that every id belongs to the tokenizer.

The result is cached in the dataset's folder, in .verified.json, so that a restart of a run over 200 GB is quick. A file
whose facts are all in the cache is not read again. Among the facts are the device, the inode and the time of the last
change of the inode, which neither a copy nor an edited file shares, even if its size and modification time are kept.
If the cache cannot be read or written, all files are verified."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.files import own_file, read_json, write_atomically
from nanometa.data.shards import HEADER, shard_path, token_dtype

CACHE = ".verified.json"
BLOCK = 2**22  # bytes read at a time
REPORT_SECONDS = 10


def verify(folder: Path, manifest: dict, n_ids: int, say: Callable[[str], None] = lambda line: None) -> str:
    """Verifies all shards of a dataset and returns a line for the log that says what was verified.

    n_ids: number of ids of the tokenizer, markers included, unused rows of the embedding excluded. say(line): called
    about every REPORT_SECONDS with the progress. Raises UserError for a shard with another SHA-256, a shard with an
    invalid id, and a shard that changes meanwhile."""
    shards = {entry["file"]: entry["sha256"] for split in manifest["splits"].values() for entry in split["shards"]}
    known, facts, pending = _read_cache(folder), {}, []
    for name, sha256 in shards.items():
        path = shard_path(folder, name)
        facts[name] = _facts(path, sha256, n_ids)
        if not facts[name] or known.get(name) != facts[name]:
            pending.append((path, sha256))
    progress = _Progress(sum(path.stat().st_size for path, _ in pending if path.is_file()), say)
    for path, sha256 in pending:
        found = _hash_and_check(path, n_ids, progress) if path.is_file() else "no file"
        if found != sha256:
            raise UserError(
                f"{path} is damaged: its sha256 is {found}, the manifest says {sha256}; prepare the dataset again."
            )
        if _facts(path, sha256, n_ids) != facts[path.name]:
            raise UserError(f"{path} changed while it was read: wait until its writer has ended, then start again.")
    before = len(shards) - len(pending)
    if not pending:
        return f"all {before} shards are unchanged since they were verified ({CACHE})"
    return (
        f"verified the sha256 of {len(pending)} shards ({progress.done / 1e9:.2f} GB in {progress.seconds():.1f} s)"
        f"{f'; {before} are unchanged since they were verified ({CACHE})' if before else ''}"
        f"{_write_cache(folder, facts)}"
    )


def _hash_and_check(path: Path, n_ids: int, progress: "_Progress") -> str:
    """Returns the SHA-256 of a shard. Raises UserError if an id is not below n_ids."""
    sha256, dtype, position, bad = hashlib.sha256(), token_dtype(n_ids), 0, None
    with open(path, "rb") as file:
        sha256.update(file.read(HEADER.size))
        while block := file.read(BLOCK):
            sha256.update(block)
            ids = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype)
            if bad is None and ids.size and int(ids.max()) >= n_ids:
                place = int(np.argmax(ids >= n_ids))
                bad = (position + place, int(ids[place]))
            position += len(ids)
            progress.add(len(block))
    if bad:
        raise UserError(
            f"{path} is damaged: position {bad[0]:,} holds the id {bad[1]}, but the tokenizer only has ids below "
            f"{n_ids}; prepare the dataset again."
        )
    return sha256.hexdigest()


class _Progress:
    """A progress report about every REPORT_SECONDS: verified and total gigabytes, speed, and remaining time."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.say, self.done = total, say, 0
        self.started = self.reported = time.monotonic()

    def seconds(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self.started

    def add(self, n_bytes: int) -> None:
        """Counts verified bytes, and reports the progress if it is time."""
        self.done += n_bytes
        now = time.monotonic()
        if now - self.reported >= REPORT_SECONDS:
            self.reported = now
            rate = self.done / (now - self.started)
            self.say(
                f"verifying shards: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, "
                f"{(self.total - self.done) / rate:.0f} s to go; --verify=header skips this"
            )


def _facts(path: Path, sha256: str, n_ids: int) -> dict:
    """Returns the facts that identify a verified file, or {} if the file is missing."""
    if not path.is_file():
        return {}
    stat = path.stat()
    return {
        "device": stat.st_dev, "inode": stat.st_ino, "ctime_ns": stat.st_ctime_ns, "mtime_ns": stat.st_mtime_ns,
        "size": stat.st_size, "sha256": sha256, "n_ids": n_ids,
    }  # fmt: skip


def _read_cache(folder: Path) -> dict:
    """Returns the cached facts of verified files, or {} if the cache is missing or damaged."""
    try:
        known = read_json(own_file(folder / CACHE))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError, UserError):
        return {}


def _write_cache(folder: Path, facts: dict) -> str:
    """Writes the cache atomically, because machines may share the folder.

    Returns "", or the end of a sentence that says why it cannot be written, for example to a read-only folder."""
    try:
        write_atomically(folder / CACHE, (json.dumps(facts, indent=1) + "\n").encode())
    except OSError as error:
        return f"; {CACHE} cannot be written ({error.strerror or error}), so the next start verifies them again"
    return ""
