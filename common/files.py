"""Reads files that may be damaged or come from a stranger, writes files atomically, computes their hashes, and locks
folders.

A run folder or a dataset may come from a stranger. A program therefore opens a file in such a folder only under a path
that `own_file` has checked; `leads_out` checks a subfolder."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import filelock

from nanometa.common.errors import UserError

WRITING = ".writing"  # suffix of a file or folder that is still being written


def parse_json(raw: bytes | str, **options):
    """Parses JSON like json.loads, but raises ValueError, not RecursionError, for JSON that is nested too deeply."""
    try:
        return json.loads(raw, **options)
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
        rows = read_file(path).decode().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file that {writer} wrote.") from error
    objects = []
    for number, row in enumerate(rows, 1):
        if not row.strip() or (growing and not row.endswith("\n")):
            continue
        try:
            line = parse_json(row, parse_constant=refuse)
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


def leads_out(path: Path) -> bool:
    """Returns whether a path is a link to something outside of the folder that contains the link."""
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent))


def own_file(path: Path) -> Path:
    """Returns the path of a file in the folder of a run, a checkpoint or a dataset. The file need not exist.

    Raises UserError for a link that leads out of the folder, and for anything but a regular file, because opening a
    pipe may never return and reading a device may never end. The folder itself may be a link."""
    if leads_out(path):
        raise UserError(f"{path} is a link out of its folder: delete the link, or replace it with the file itself.")
    if os.path.lexists(os.path.realpath(path)) and not path.is_file():  # also true for a link to itself
        raise UserError(f"{path} is not a regular file: move it out of the folder.")
    return path


def file_inside(folder: Path, name: str) -> Path:
    """Returns own_file(folder / name), for a name that was read from a manifest.

    Raises ValueError unless `name` is a plain file name, and UserError as own_file does. The author of a dataset or a
    checkpoint thus cannot make this program read other files."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"{name[:100]!r} is not a plain file name")
    return own_file(Path(folder) / name)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return open_file_sha256(file)


def open_file_sha256(file: BinaryIO) -> str:
    """Returns the SHA-256 of an open file, from its start to its end, as hexadecimal digits."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Deletes a file, a folder, or a link but not its target. Does nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    `path`, or the link that `path` is. If anything fails, the temporary file is removed and `path` stays unchanged."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{WRITING}")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # never through a link of this name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says what is wrong
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def lock_folder(folder: Path) -> filelock.BaseFileLock | None:
    """Locks an existing folder and returns the lock, or None if another process holds it.

    The lock is held until it is released or the process ends. The file .lock is never removed: otherwise two processes
    could lock two different files of that name. Raises UserError as own_file does."""
    lock = filelock.FileLock(own_file(folder / ".lock"), thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return None
    return lock
