"""Files that others may have damaged: JSON that raises nothing but ValueError, names that do not leave their folder."""

import hashlib
import json
import os
import re
from pathlib import Path


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
