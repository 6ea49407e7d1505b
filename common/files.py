"""Reads files that may be damaged, writes files atomically, computes their hashes, and locks folders."""

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import filelock

from nanometa.common.errors import UserError

WRITING = ".writing"  # suffix of a file or folder that is still being written


def parse_json(raw: bytes):
    """Parses JSON like json.loads, but raises ValueError, not RecursionError, for JSON that is nested too deeply."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path):
    """Returns the parsed content of a JSON file. Raises OSError or ValueError."""
    return parse_json(read_file(path))


def read_json_lines(path: Path, check: Callable[[dict], object], writer: str, growing: bool = False) -> list[dict]:
    """Returns the objects in a file of JSON lines. Empty lines are left out.

    check: raises an exception for a damaged object; writer: the program that writes such files. growing: leaves out a
    last line without a newline, which is still being written or was cut short by a kill. Raises UserError if the file
    cannot be read, and, naming the line, if an object is damaged."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no figure")

    try:
        rows = path.read_text().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file that {writer} wrote.") from error
    objects = []
    for number, row in enumerate(rows, 1):
        if not row.strip() or (growing and not row.endswith("\n")):
            continue
        try:
            line = json.loads(row, parse_constant=refuse)
            if not isinstance(line, dict):
                raise ValueError("it is no object")
            json.dumps(line, ensure_ascii=False).encode()  # raises for half a surrogate pair, which is no text
            check(line)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no line of {writer} ({error}): remove it.") from error
        objects.append(line)
    return objects


def read_file(path: Path) -> bytes:
    """Returns the content of a regular file.

    Raises OSError, also for a link to a device or a pipe, because reading one might never end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is not a regular file")
    return path.read_bytes()


def is_count(value) -> bool:
    """Returns whether value is an int in [0, 2^63). A bool does not qualify."""
    return type(value) is int and 0 <= value < 2**63


def file_inside(folder: Path, name: str) -> Path:
    """Returns folder/name, for a name that was read from a manifest.

    Raises ValueError unless `name` is a plain file name and the path, with symbolic links resolved, lies in `folder`.
    The author of a dataset or a checkpoint thus cannot make this program read other files."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"{name[:100]!r} is not a plain file name")
    path = Path(folder) / name
    if path.is_symlink() and Path(os.path.realpath(path)).parent != Path(os.path.realpath(folder)):
        raise ValueError(f"{name} is a link out of its folder: replace the link with the file itself")
    return path


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file or the entries of a folder are on disk. Does nothing for a folder on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that other processes see either its old or its new content, never a part.

    The content first goes to a hidden temporary file in the same folder. Once it is on disk, that file replaces
    `path`. If anything fails, the temporary file is removed and `path` stays unchanged."""
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
    """Locks an existing folder and returns the lock, or None if another process holds it.

    The lock is held until it is released or the process ends. The file .lock is never removed: otherwise two processes
    could lock two different files of that name."""
    lock = filelock.FileLock(folder / ".lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return None
    return lock
