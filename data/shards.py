"""Writes and reads token shards, and reads the manifest, which lists the files of a dataset and their hashes.

A shard is a 32-byte header followed by raw ids:
magic "NANOMETA" | version uint32 | bytes per token uint32 | tokens uint64 | 8 zero bytes | ids, little-endian
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.files import file_inside, file_sha256, is_count, own_file, read_json
from nanometa.common.formats import check_format
from nanometa.config.checks import similar_path

HEADER = struct.Struct("<8sIIQ8x")
MAGIC, VERSION = b"NANOMETA", 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
OPEN_SHARDS = 100  # files that a TokenStream keeps open; a process may often open only 256 (macOS) or 1,024 (Linux)


def token_dtype(n_vocab: int) -> np.dtype:
    """Returns the dtype of the ids in shards: uint16 if all n_vocab ids fit, else uint32."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


class ShardWriter:
    """A writer of a split's ids to folder/<split>_000000.bin, _000001.bin, ... `entries` lists the finished files."""

    def __init__(self, folder: Path, split: str, n_vocab: int, shard_tokens: int):
        self.folder, self.split, self.n_vocab, self.shard_tokens = folder, split, n_vocab, shard_tokens
        self.entries: list[dict] = []
        self._file = None

    def write(self, ids: np.ndarray) -> None:
        """Appends ids (N,). Raises ValueError unless all are below n_vocab, because uint16 would silently wrap."""
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.n_vocab):
            raise ValueError(f"ids {ids.min()}..{ids.max()} do not fit a vocabulary of {self.n_vocab}")
        while ids.size:
            if self._file is None:
                self._open()
            now, ids = np.split(ids, [self.shard_tokens - self._count])
            self._file.write(now.astype(token_dtype(self.n_vocab)).tobytes())
            self._count += now.size
            if self._count == self.shard_tokens:
                self.close()

    def _open(self) -> None:
        """Starts the next shard."""
        self._path = self.folder / shard_name(self.split, len(self.entries))
        self._file, self._count = open(self._path, "wb"), 0
        self._file.write(bytes(HEADER.size))  # the number of tokens is not known yet; zeros are an invalid header

    def close(self) -> None:
        """Writes the header of the current shard and closes it."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, token_dtype(self.n_vocab).itemsize, self._count))
        self._file.close()
        self._file = None
        self.entries.append({"file": self._path.name, "tokens": self._count, "sha256": file_sha256(self._path)})


def read_manifest(folder: Path) -> dict:
    """Returns the manifest of a prepared dataset.

    Raises UserError if it is missing or damaged, or if a newer version of nanoMeta wrote it."""
    path = Path(folder) / MANIFEST
    try:
        manifest = read_json(own_file(path))
        check_format(path, manifest)
        # fields that earlier versions lack
        for field, value in (("min_document_tokens", 0), ("skipped_by_kind", {}), ("endoftext_in_text", 0)):
            manifest.setdefault(field, value)
        _check_manifest(manifest)
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        if (Path(folder) / "plan.json").exists():
            raise UserError(
                f"{folder} is only a part of a dataset: merge all parts first, with prepare.py --merge."
            ) from None
        beside = [*Path(folder).parent.glob(f"*/{MANIFEST}"), *Path("data").glob(f"*/{MANIFEST}")]
        close = similar_path(str(folder), [str(found.parent) for found in beside])
        raise UserError(
            f"there is no dataset in {folder} ({MANIFEST} is missing): "
            f"{f'did you mean {close!r}? If not, ' if close else ''}create it with prepare.py."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): prepare the dataset again.") from error


def _check_manifest(manifest: dict) -> None:
    """Raises KeyError, TypeError or ValueError if a value is missing, has the wrong type, or contradicts another."""
    C, M = manifest["chunk_content"], manifest["chunk_markers"]
    texts = [manifest[key] for key in ("command", "source", "injection")]
    texts += [manifest["tokenizer"][key] for key in ("name", "fingerprint")]
    texts += [text for where_and_reason in manifest["skipped"] for text in where_and_reason]
    packed = manifest["val_text_compressed"]
    counts = [C, M, manifest["seed"], manifest["documents_skipped"], manifest["tokenizer"]["n_vocab"], packed["bytes"]]
    counts += [manifest["min_document_tokens"], manifest["endoftext_in_text"], *manifest["skipped_by_kind"].values()]
    if manifest["min_document_tokens"]:
        counts += [manifest["too_short"][key] for key in ("documents", "of_documents", "tokens", "of_tokens")]
    rates = [packed["gzip_9_bits_per_byte"], packed["xz_bits_per_byte"]]
    for name in SPLITS:
        split = manifest["splits"][name]
        texts += [split["content_sha256"], *(entry[key] for entry in split["shards"] for key in ("file", "sha256"))]
        texts += [split["text_sha256"]] if "text_sha256" in split else []  # earlier versions recorded none
        counts += [split[key] for key in ("chunks", "content_tokens", "markers", "documents", "bytes")]
        counts += [entry["tokens"] for entry in split["shards"]]
    if not (all(type(text) is str for text in texts) and all(map(is_count, counts))):
        raise TypeError("a value has the wrong type")
    if not all(type(rate) in (int, float) and math.isfinite(rate) for rate in rates):
        raise TypeError("a compression rate is not a number")
    if not 1 <= C <= 2**20 or M > 2**20 or any(len(pair) != 2 for pair in manifest["skipped"]):
        raise ValueError("a value is out of range")
    if manifest["splits"].keys() != set(SPLITS):
        raise ValueError("its splits are not train and val")
    if manifest["injection"] not in ("uniform", "periodic", "none") or (manifest["injection"] == "none") != (M == 0):
        raise ValueError(f"injection {manifest['injection']} with {M} markers")
    for name in SPLITS:
        split = manifest["splits"][name]
        tokens = sum(entry["tokens"] for entry in split["shards"])
        chunks = split["chunks"]
        if not (chunks and split["content_tokens"] == chunks * C and split["markers"] == chunks * M):
            raise ValueError(f"the counts of {name} contradict each other")
        if tokens != chunks * (C + M):
            raise ValueError(f"the counts of {name} contradict each other")
        for number, entry in enumerate(split["shards"]):
            if entry["file"] != shard_name(name, number):
                raise ValueError(f"shard {number} of {name} is {entry['file']!r}, not {shard_name(name, number)}")


def shard_name(split: str, number: int) -> str:
    """Returns the file name of a shard."""
    return f"{split}_{number:06d}.bin"


def shard_path(folder: Path, name: str) -> Path:
    """Returns the path of a shard that a manifest names. Raises UserError if it is outside of the folder."""
    try:
        return file_inside(folder, name)
    except ValueError as error:
        raise UserError(f"the dataset {folder} is damaged ({error}): prepare it again.") from None


class TokenStream:
    """All shards of a split as one sequence of ids. Headers and sizes are checked when it is opened.

    The shards are read, not memory-mapped, because a process is killed (SIGBUS) if a mapped file is cut short."""

    def __init__(self, folder: Path, shards: list[dict], n_vocab: int):
        self._dtype = token_dtype(n_vocab)
        self._shards = [(shard_path(folder, entry["file"]), entry["tokens"]) for entry in shards]
        self._ends = np.cumsum([n_tokens for _, n_tokens in self._shards], dtype=np.int64)
        self._files: dict[int, BinaryIO] = {}  # open files by the number of the shard
        for number in range(len(shards)):
            self._file(number)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids [start, stop) as int64, clipped to the end of the stream.

        Raises UserError if a shard has been cut short since the stream was opened, or cannot be read."""
        ids, done = np.empty(max(0, min(stop, len(self)) - start), self._dtype), 0
        while done < len(ids):
            number = int(np.searchsorted(self._ends, start + done, side="right"))
            remaining = int(self._ends[number]) - (start + done)  # ids of this shard from here on
            part = ids[done : done + remaining]
            self._read_into(part, number, self._shards[number][1] - remaining)
            done += len(part)
        return ids.astype(np.int64)

    def _read_into(self, part: np.ndarray, number: int, offset: int) -> None:
        """Fills `part` with the ids of a shard that start at `offset`."""
        path, file = self._shards[number][0], self._file(number)
        try:
            file.seek(HEADER.size + offset * self._dtype.itemsize)
            n_bytes = file.readinto(part.view(np.uint8))
        except OSError as error:
            raise UserError(
                f"the shard {path} cannot be read any more ({error.strerror}): check its disk, then start again; a "
                f"training run continues with --init_from=resume."
            ) from error
        if n_bytes < part.nbytes:
            raise UserError(
                f"the shard {path} has been cut short since it was opened: restore the dataset, then start again; a "
                f"training run continues with --init_from=resume."
            )

    def _file(self, number: int) -> BinaryIO:
        """Returns an open shard. Closes the one that was opened first if too many are open."""
        if number not in self._files:
            self._files[number] = _open_shard(*self._shards[number], self._dtype)
            if len(self._files) > OPEN_SHARDS:
                self._files.pop(next(iter(self._files))).close()
        return self._files[number]


def _open_shard(path: Path, n_tokens: int, dtype: np.dtype) -> BinaryIO:
    """Opens a shard. Raises UserError if it cannot be read, or its header or size does not fit n_tokens."""
    try:
        file = open(path, "rb")
        header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read ({error.strerror}): prepare the dataset again.") from None
    expected = HEADER.pack(MAGIC, VERSION, dtype.itemsize, n_tokens)
    if header != expected or size != HEADER.size + n_tokens * dtype.itemsize:
        file.close()
        raise UserError(
            f"the shard {path} is damaged: its header or its size of {size:,} bytes does not match the manifest, "
            f"which says {n_tokens:,} tokens of {dtype.itemsize} bytes; prepare the dataset again."
        )
    return file
