"""Writes an export's folder under a temporary name, and gives it its own name once it is complete."""

import json
import os
import shutil
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import WRITING, remove, sync


def check_output(output: Path) -> None:
    """Raises UserError if there is anything at the path of the folder."""
    if os.path.lexists(output):
        raise UserError(f"output={output} already exists, and is not overwritten: delete it, or name another folder.")


def begin(output: Path) -> Path:
    """Creates the temporary folder of `output`, and returns it. What an interrupted export left there is removed."""
    partial = output.with_name(f".{output.name}{WRITING}")
    remove(partial)
    partial.mkdir(parents=True)
    return partial


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file as transformers does."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file with the same line ends on every system."""
    path.write_bytes(text.encode())


def finish(partial: Path, output: Path, config: str, weights: str) -> None:
    """Gives a complete folder its name, after all of its files are on disk.

    config, weights: names of files. safetensors makes files that only their owner can read, so the weights get the mode
    of the configuration."""
    shutil.copymode(partial / config, partial / weights)
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    os.rename(partial, output)
