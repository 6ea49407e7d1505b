"""Reads files that may be damaged, writes files atomically, hashes them, and locks folders."""

import hashlib
import json
import os
import re
import socket
from pathlib import Path

import filelock

WRITING = ".writing"  # suffix of a file or folder that is not whole yet


def parse_json(raw: bytes):
    """As json.loads, but nesting too deep for the parser is a ValueError, too."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path):
    """Raises OSError or ValueError."""
    return parse_json(read_file(path))


def read_file(path: Path) -> bytes:
    """Raises OSError; also for a link to a device or a pipe, which would never end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is no regular file")
    return path.read_bytes()


def is_count(value) -> bool:
    """An int that a file can count (True is none)."""
    return type(value) is int and 0 <= value < 2**63


def file_inside(folder: Path, name: str) -> Path:
    """folder/name, for a name that a file brought. Raises ValueError unless it is a plain name that, after symbolic
    links, is a file of this folder: whoever sent a dataset or a checkpoint does not choose what else is read."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"{name[:100]!r} is no plain file name")
    path = Path(folder) / name
    if path.is_symlink() and Path(os.path.realpath(path)).parent != Path(os.path.realpath(folder)):
        raise ValueError(f"{name} is a link out of its folder: put the file itself there")
    return path


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's entries, is on disk. Windows cannot sync a folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that other processes may be reading: they see the old content or the new one, never a part of it.

    The content goes to a hidden file of this process in the same folder, which replaces `path` when it is on disk. If
    anything fails, that file is removed and `path` is as it was."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{WRITING}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def lock_folder(folder: Path) -> filelock.BaseFileLock | None:
    """Takes the lock of an existing folder; None if another process holds it.

    It is held until it is released or the process ends. The file .lock stays: removing it would let two processes
    lock two files of the same name."""
    lock = filelock.FileLock(folder / ".lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return None
    return lock
