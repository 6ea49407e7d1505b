"""Where text comes from: documents in a fixed order, in units that can be read alone, and in pieces of bounded size.

A source has n_units, contiguous runs of its documents (files, or shards of a Hugging Face dataset): what machines share
among themselves and what an interrupted preparation goes on from. `read(unit)` gives a unit's documents as pieces, and
what cannot be read as Skipped: nothing disappears in silence."""

import codecs
import glob
import gzip
import hashlib
import importlib.metadata
import itertools
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from nanometa.common.errors import UserError, printable
from nanometa.common.files import parse_json
from nanometa.config import PrepareConfig
from nanometa.config.checks import nearest_name

PIECE_CHARS = 64 * 1024  # small beside any validation split, long beside any window
READ_BYTES = 2**20  # of a file at a time
UNITS, UNIT_BYTES = 64, 256 * 2**20  # files are grouped into some 64 units, or into more of about this size
ROWS = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")  # files whose rows are documents
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
# written when a package is built, and so different in the wheels of different machines
BUILD_FILES = ("version.py", "_version.py", "__config__.py")


class Piece(NamedTuple):
    """A stretch of one document's text; `last` ends the document. Pieces join to the exact text."""

    text: str
    last: bool


class Skipped(NamedTuple):
    """Something that could not be read: where it lies, and why."""

    where: str
    reason: str


class Source(Protocol):
    description: str
    n_units: int
    total_bytes: int  # of all files, for a progress bar; 0 = unknown
    fingerprint: str  # of what is read: another one means other documents

    def read(self, unit: int) -> Iterator[Piece | Skipped]: ...


def open_source(cfg: PrepareConfig) -> Source:
    """The source that cfg names. Raises UserError if it has no document, or no such column."""
    if cfg.source == "hf":
        return HubSource(cfg)
    root = None
    if cfg.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(_files_below(root, STDLIB_SUFFIXES))
        description = f"standard library of Python {sysconfig.get_python_version()} ({', '.join(STDLIB_SUFFIXES)})"
    elif cfg.source == "packages":
        paths = [path for name in cfg.packages for path in _package_files(name)]
        root = Path(sysconfig.get_paths()["purelib"])
        versions = (f"{name}=={importlib.metadata.version(name)}" for name in map(_package_name, cfg.packages))
        description = f"Python source of {', '.join(versions)}"
    else:
        found: set[Path] = set()
        for pattern in cfg.files:
            # a broken link is no folder: it is named among what cannot be read
            matches = {Path(name) for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir()}
            if not matches and Path(pattern).is_dir():
                raise UserError(f"{pattern!r} is a folder: say which files, such as --files '{pattern}/**/*.txt'.")
            if not matches:
                raise UserError(f"no file matches {pattern!r}: give a glob of text files, such as 'texts/**/*.txt'.")
            found |= matches
        paths, description = sorted(found), f"files {' '.join(cfg.files)}"
    if not paths:
        raise UserError(f"the source {cfg.source!r} has no document here: take --source=files.")
    return FileSource(paths, description, cfg.text_column, root)


# ----------------------------------------------------------------------------- files


class FileSource:
    """Files in the given order: text, a file is a document; or ROWS, a row is a document."""

    def __init__(self, paths: list[Path], description: str, column: str, root: Path | None = None):
        """root: the fingerprint takes names below it, the same on every machine; None = names as they are."""
        self.description, self.column = description, column
        sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
        names = [os.path.relpath(path, root) if root else str(path) for path in paths]
        self.total_bytes = sum(sizes)
        self.units = list(_grouped(paths, sizes, min(self.total_bytes / UNITS, UNIT_BYTES)))
        self.n_units = len(self.units)
        self.fingerprint = hashlib.sha256(repr([*zip(names, sizes, strict=True)]).encode()).hexdigest()
        first = next((path for path in paths if path.name.endswith(ROWS)), None)
        if first is not None:  # a misspelt column is found now, not after hours
            columns = _columns(first)
            if columns and column not in columns:
                raise UserError(_no_column(str(first), column, columns))

    def read(self, unit: int) -> Iterator[Piece | Skipped]:
        for path in self.units[unit]:
            try:
                if path.name.endswith(".parquet"):
                    yield from _read_parquet(path, self.column)
                elif path.name.endswith(ROWS):
                    yield from _read_jsonl(path, self.column)
                else:
                    yield from read_pieces(path)
            except UnicodeDecodeError as error:
                yield Skipped(str(path), f"not UTF-8 at byte {error.start}")
            except OSError as error:
                yield Skipped(str(path), error.strerror or str(error))


def _grouped(paths: list[Path], sizes: list[int], least: float) -> Iterator[list[Path]]:
    """Consecutive paths in groups of at least so many bytes (the last one may have fewer)."""
    group, size = [], 0
    for path, bytes_ in zip(paths, sizes, strict=True):
        group.append(path)
        size += bytes_
        if size >= least:
            yield group
            group, size = [], 0
    if group:
        yield group


def read_pieces(path: Path) -> Iterator[Piece]:
    """The text of a UTF-8 file in pieces, a megabyte or two of it in memory. Raises UnicodeDecodeError, with the byte's
    place in the file, before any of the document is used."""
    with open(path, "rb") as file:
        start = file.read(READ_BYTES)
        if len(start) < READ_BYTES:  # most files
            yield from pieces_of([start.decode()])
            return
        file.seek(0)
        for _ in _decoded(file):  # a long one is read twice: a bad byte at its end counts, too
            pass
        file.seek(0)
        yield from pieces_of(_decoded(file))


def _decoded(file: BinaryIO) -> Iterator[str]:
    decoder, done, block = codecs.getincrementaldecoder("utf-8")(), 0, b"any"
    while block:
        block = file.read(READ_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            error.start += done - pending
            raise
        done += len(block)
        yield text


def pieces_of(parts: Iterable[str]) -> Iterator[Piece]:
    """A document, given in parts of any size, cut after the last line break within PIECE_CHARS (or there)."""
    text = ""
    for part in parts:
        text, start = text + part, 0
        while len(text) - start > PIECE_CHARS:
            end = start + PIECE_CHARS
            cut = text.rfind("\n", start, end) + 1 or end
            yield Piece(text[start:cut], last=False)
            start = cut
        text = text[start:]
    if text:
        yield Piece(text, last=True)


def _read_jsonl(path: Path, column: str) -> Iterator[Piece | Skipped]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except ValueError as error:  # bad UTF-8 is one, too
                    yield Skipped(f"{path}:{number}", f"no JSON ({error})")
                    continue
                yield from _row(row if isinstance(row, dict) else {}, column, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Skipped(f"{path}:{number + 1}", f"damaged from here on ({error})")


def _read_parquet(path: Path, column: str) -> Iterator[Piece | Skipped]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                yield Skipped(str(path), f"no column {column!r}, it has {', '.join(file.schema_arrow.names)}")
                return
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield from _row({column: text}, column, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = printable(" ".join(str(error).split()))
        yield Skipped(f"{path}:{number + 1}", f"damaged from here on ({reason})")


def _row(row: dict, column: str, where: str) -> Iterator[Piece | Skipped]:
    """One row's document, or why there is none."""
    text = row.get(column)
    if not isinstance(text, str):
        what = f"its {column!r} is {type(text).__name__}, not text" if column in row else f"no {column!r}"
        yield Skipped(where, what)
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON, but no text
        yield Skipped(where, f"no Unicode text at character {error.start}")
        return
    yield from pieces_of([text])


def _columns(path: Path) -> list[str]:
    """The columns of a file of rows, [] where it cannot be told (its reader will say why)."""
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError):
            return []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for line in itertools.islice(file, 100):
                row = parse_json(line) if line.strip() else None
                if isinstance(row, dict):
                    return list(row)
    except (ValueError, OSError, EOFError, zlib.error):
        pass
    return []


def _no_column(where: str, column: str, columns: list[str]) -> str:
    close = nearest_name(column, columns)
    cure = close if close.startswith("did you") else "say which holds the text, --text_column=NAME."
    return f"{where} has no column {column!r}, its columns are {', '.join(columns)}: {cure}"


def _files_below(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # not even entered
        paths = (Path(folder, name) for name in names if os.path.splitext(name)[1] in suffixes)
        yield from (path for path in paths if path.is_file())


def _package_name(requirement: str) -> str:
    return requirement.split("==")[0]


def _package_files(requirement: str) -> list[Path]:
    """The .py files of an installed package, in the order of their names. Raises UserError for another version."""
    name, _, version = requirement.partition("==")
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {name!r} is not installed: pip install {requirement}.") from None
    if version and package.version.split("+")[0] != version:  # torch's 2.13.0+cpu has the source of 2.13.0
        raise UserError(f"{name} is {package.version} here, {version} is asked for: pip install {requirement}.")
    files = [file for file in package.files or [] if file.suffix == ".py" and file.name not in BUILD_FILES]
    wanted = sorted(str(file) for file in files if not any(part in LEFT_OUT for part in file.parts))
    return [Path(package.locate_file(file)) for file in wanted]


# ----------------------------------------------------------------------------- Hugging Face datasets


class HubSource:
    """A dataset of the Hugging Face hub, or a local folder that `datasets` can load; a row is a document."""

    def __init__(self, cfg: PrepareConfig):
        import datasets
        from huggingface_hub import HfApi, constants

        self.name, self.column = cfg.hf_dataset, cfg.text_column
        what = f"the dataset {cfg.hf_dataset!r} (configuration {cfg.hf_config or 'default'}, split {cfg.hf_split})"
        revision = cfg.hf_revision or None
        try:
            if not Path(cfg.hf_dataset).is_dir() and not constants.HF_HUB_OFFLINE:
                # the commit is pinned, so that parts and restarts read the same rows
                revision = HfApi().dataset_info(cfg.hf_dataset, revision=revision).sha
            self.dataset = datasets.load_dataset(
                cfg.hf_dataset, cfg.hf_config or None, split=cfg.hf_split, streaming=cfg.streaming, revision=revision
            )
        except Exception as error:  # of many kinds: no network, no such name, no such split, a damaged file
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"{what} could not be opened ({type(error).__name__}: {reason}): check the names and the network; "
                f"without a network, python prepare.py takes the standard library, and --source=files "
                f"--files='*.jsonl.gz' files that are here."
            ) from error
        columns = self.dataset.column_names or list(next(iter(self.dataset), {}))
        if columns and self.column not in columns:
            raise UserError(_no_column(what, self.column, columns))
        self.dataset = self.dataset.select_columns([self.column])
        self.n_units = self.dataset.num_shards if cfg.streaming else max(1, min(UNITS, len(self.dataset)))
        self.total_bytes = 0
        self.description = f"Hugging Face {' '.join(filter(None, (cfg.hf_dataset, cfg.hf_config, cfg.hf_split)))}"
        self.description += f" at {revision}" if revision else ""
        self.fingerprint = hashlib.sha256(f"{self.description} {self.n_units}".encode()).hexdigest()

    def read(self, unit: int) -> Iterator[Piece | Skipped]:
        rows = iter(self.dataset.shard(self.n_units, unit, contiguous=True))
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # of many kinds: a lost network, a damaged file
                reason = " ".join(str(error).split())[:300]
                raise OSError(f"{self.name}, shard {unit}, row {number}: {type(error).__name__}: {reason}") from error
            if row is None:
                return
            yield from _row(row, self.column, f"{self.name} shard {unit} row {number}")
