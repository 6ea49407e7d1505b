"""Reads and writes stored nats: for every content token of a training split, those of the token after it.

    data/stdlib_none/nats/<name>/   nats.json   train_000000.bin

The file holds one fp16 number per content token, in the order of windows of `content` tokens, because a short context
ends at the start of a window. It can serve every scheme of markers, since markers are not counted.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.files import file_sha256, parse_json, read_file, write_atomically
from nanometa.common.formats import check_format

DESCRIPTION, VALUES, FORMAT = "nats.json", "train_000000.bin", 1


class Description(NamedTuple):
    """What stored nats belong to."""

    scorer: str  # folder of the run that computed them
    weights_sha256: str  # of its weights
    tokenizer: str  # fingerprint
    content_sha256: str  # of the content of the training split
    content: int  # content tokens of a window
    short_length: int
    short_stride: int
    windows: int
    sha256: str  # of the file of values


def is_stored(folder: str | Path) -> bool:
    """Returns whether a folder holds stored nats."""
    return (Path(folder) / DESCRIPTION).is_file()


def write(folder: Path, description: Description, values: np.ndarray) -> None:
    """Writes nats (windows, content) and their description, whose sha256 is filled in. The folder must not exist."""
    folder.mkdir(parents=True)
    write_atomically(folder / VALUES, values.astype("<f2").tobytes())
    described = {"format": FORMAT, **description._replace(sha256=file_sha256(folder / VALUES))._asdict()}
    write_atomically(folder / DESCRIPTION, (json.dumps(described, indent=2) + "\n").encode())


class StoredNats:
    """The stored nats of a training split.

    Raises UserError if they are damaged."""

    def __init__(self, folder: str | Path, verify: bool = True):
        """verify: whether the sha256 of the values is computed, or only their number checked."""
        self.folder = Path(folder)
        path, values = self.folder / DESCRIPTION, self.folder / VALUES
        try:
            found = parse_json(read_file(path).decode())
            check_format(path, found, FORMAT)
            found.pop("format", None)
            self.about = Description(**found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): compute the nats again with python eval.py nats.") from error
        n = self.about.windows * self.about.content
        if (
            not values.is_file()
            or values.stat().st_size != 2 * n
            or (verify and file_sha256(values) != self.about.sha256)
        ):
            raise UserError(f"{values} is damaged or missing: compute the nats again with python eval.py nats.")
        self.values = np.memmap(values, dtype="<f2", mode="r", shape=(self.about.windows, self.about.content))

    def read(self, windows: np.ndarray) -> np.ndarray:
        """Returns the nats (B, content) of windows (B,), in fp32."""
        return self.values[windows].astype(np.float32)
