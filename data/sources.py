"""Reads the documents of a corpus: from files, from installed packages, or from a Hugging Face dataset.

The documents of a source are in a fixed order, divided into n_units consecutive units (groups of files, or shards of a
Hugging Face dataset). Machines share the work by units, and an interrupted preparation continues at a unit.
`read(unit)` yields the documents of a unit in pieces of bounded size, and a Skipped for everything that cannot be read,
so that nothing is lost silently."""

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

PIECE_CHARS = 64 * 1024  # much smaller than a validation split, much longer than a window
READ_BYTES = 2**20  # bytes of a file that are read at a time
UNITS, UNIT_BYTES = 64, 256 * 2**20  # files form about 64 units, or more if units would exceed this size
ROWS = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")  # files whose rows are documents
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
# written when a package is built, so their content differs between the wheels of different machines
BUILD_FILES = ("version.py", "_version.py", "__config__.py")


class Piece(NamedTuple):
    """A part of a document's text; `last` marks its last piece. The pieces of a document join to its exact text."""

    text: str
    last: bool


class Skipped(NamedTuple):
    """A document or file that could not be read: where it is, and why."""

    where: str
    reason: str


class Source(Protocol):
    """The interface of all sources."""

    description: str
    n_units: int
    total_bytes: int  # total size, for a progress bar; 0 = unknown
    fingerprint: str  # changes if the documents change

    def read(self, unit: int) -> Iterator[Piece | Skipped]: ...


def open_source(cfg: PrepareConfig) -> Source:
    """Returns the source that cfg names. Raises UserError if it has no documents or lacks the text column."""
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
            # a broken link is kept here, so that it is reported as skipped
            matches = {Path(name) for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir()}
            if not matches and Path(pattern).is_dir():
                raise UserError(
                    f"{pattern!r} is a folder: give a pattern for its files, such as --files '{pattern}/**/*.txt'."
                )
            if not matches:
                raise UserError(
                    f"no file matches {pattern!r}: give a glob pattern of text files, such as 'texts/**/*.txt'."
                )
            found |= matches
        paths, description = sorted(found), f"files {' '.join(cfg.files)}"
    if not paths:
        raise UserError(f"source={cfg.source!r} has no documents on this machine: use --source=files instead.")
    return FileSource(paths, description, cfg.text_column, root)


# ----------------------------------------------------------------------------- files


class FileSource:
    """A source of files in the given order. A text file is a document; of the file types in ROWS, each row is one."""

    def __init__(self, paths: list[Path], description: str, column: str, root: Path | None = None):
        """root: makes the fingerprint independent of the machine, by using file names relative to this folder."""
        self.description, self.column = description, column
        sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
        names = [os.path.relpath(path, root) if root else str(path) for path in paths]
        self.total_bytes = sum(sizes)
        self.units = list(_grouped(paths, sizes, min(self.total_bytes / UNITS, UNIT_BYTES)))
        self.n_units = len(self.units)
        self.fingerprint = hashlib.sha256(repr([*zip(names, sizes, strict=True)]).encode()).hexdigest()
        first = next((path for path in paths if path.name.endswith(ROWS)), None)
        if first is not None:  # report a misspelled column now, not after hours
            columns = _columns(first)
            if columns and column not in columns:
                raise UserError(_no_column(str(first), column, columns))

    def read(self, unit: int) -> Iterator[Piece | Skipped]:
        """Yields the pieces of all documents of a unit, and a Skipped for each one that cannot be read."""
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
    """Yields consecutive paths in groups of at least `least` bytes each. The last group may be smaller."""
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
    """Yields the text of a UTF-8 file in pieces, with at most about two megabytes of it in memory.

    Raises UnicodeDecodeError, with the byte's position in the file, before it yields the first piece."""
    with open(path, "rb") as file:
        start = file.read(READ_BYTES)
        if len(start) < READ_BYTES:  # true of most files
            yield from pieces_of([start.decode()])
            return
        file.seek(0)
        for _ in _decoded(file):  # read a long file twice, to find a bad byte before its first piece
            pass
        file.seek(0)
        yield from pieces_of(_decoded(file))


def _decoded(file: BinaryIO) -> Iterator[str]:
    """Yields the decoded blocks of a file. A UnicodeDecodeError has the position of the byte in the file."""
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
    """Cuts a document, given in parts of any size, into pieces.

    A piece ends after the last line break within PIECE_CHARS characters, or at that length if there is none."""
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
    """Yields the documents of a .jsonl or .jsonl.gz file."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except ValueError as error:  # includes invalid UTF-8
                    yield Skipped(f"{path}:{number}", f"invalid JSON ({error})")
                    continue
                yield from _row(row if isinstance(row, dict) else {}, column, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Skipped(f"{path}:{number + 1}", f"damaged from here on ({error})")


def _read_parquet(path: Path, column: str) -> Iterator[Piece | Skipped]:
    """Yields the documents of a .parquet file."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            if column not in file.schema_arrow.names:
                yield Skipped(str(path), f"no column {column!r}, only {', '.join(file.schema_arrow.names)}")
                return
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield from _row({column: text}, column, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = printable(" ".join(str(error).split()))
        yield Skipped(f"{path}:{number + 1}", f"damaged from here on ({reason})")


def _row(row: dict, column: str, where: str) -> Iterator[Piece | Skipped]:
    """Yields the pieces of a row's document, or a Skipped if the row has none."""
    text = row.get(column)
    if not isinstance(text, str):
        reason = f"its {column!r} is {type(text).__name__}, not text" if column in row else f"no {column!r}"
        yield Skipped(where, reason)
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but invalid Unicode
        yield Skipped(where, f"invalid Unicode at character {error.start}")
        return
    yield from pieces_of([text])


def _columns(path: Path) -> list[str]:
    """Returns the columns of a file of rows, or [] if it cannot be read. Its reader then reports the reason."""
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
    """Returns the error message for a missing text column."""
    close = nearest_name(column, columns)
    cure = close if close.startswith("did you") else "name the column that holds the text, with --text_column=NAME."
    return f"{where} has no column {column!r}, its columns are {', '.join(columns)}: {cure}"


def _files_below(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yields all files below root with one of the suffixes, except in the folders of LEFT_OUT."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # do not enter these folders
        paths = (Path(folder, name) for name in names if os.path.splitext(name)[1] in suffixes)
        yield from (path for path in paths if path.is_file())


def _package_name(requirement: str) -> str:
    """Returns the name in a requirement NAME or NAME==VERSION."""
    return requirement.split("==")[0]


def _package_files(requirement: str) -> list[Path]:
    """Returns the .py files of an installed package, sorted by name.

    Raises UserError if the package is not installed or has another version than the requirement."""
    name, _, version = requirement.partition("==")
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {name!r} is not installed: pip install {requirement}.") from None
    if (
        version and package.version.split("+")[0] != version
    ):  # the version 2.13.0+cpu of torch has the same source code as 2.13.0
        raise UserError(f"{name} {package.version} is installed, but {version} is required: pip install {requirement}.")
    files = [file for file in package.files or [] if file.suffix == ".py" and file.name not in BUILD_FILES]
    wanted = sorted(str(file) for file in files if not any(part in LEFT_OUT for part in file.parts))
    return [Path(package.locate_file(file)) for file in wanted]


# ----------------------------------------------------------------------------- Hugging Face datasets


class HubSource:
    """A source that reads a dataset of the Hugging Face hub, or a local folder that `datasets` can load.

    Each row is a document."""

    def __init__(self, cfg: PrepareConfig):
        import datasets
        from huggingface_hub import HfApi, constants

        self.name, self.column = cfg.hf_dataset, cfg.text_column
        what = f"the dataset {cfg.hf_dataset!r} (configuration {cfg.hf_config or 'default'}, split {cfg.hf_split})"
        revision = cfg.hf_revision or None
        try:
            if not Path(cfg.hf_dataset).is_dir() and not constants.HF_HUB_OFFLINE:
                # pin the commit, so that all parts and restarts read the same rows
                revision = HfApi().dataset_info(cfg.hf_dataset, revision=revision).sha
            self.dataset = datasets.load_dataset(
                cfg.hf_dataset, cfg.hf_config or None, split=cfg.hf_split, streaming=cfg.streaming, revision=revision
            )
        except Exception as error:  # many types: no network, unknown name or split, damaged file
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"{what} could not be opened ({type(error).__name__}: {reason}): check the names and the network; "
                f"without a network, use the standard library with python prepare.py, or local files with "
                f"--source=files --files='*.jsonl.gz'."
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
        """Yields the pieces of all documents of a unit. Raises OSError if the dataset cannot be read any further."""
        rows = iter(self.dataset.shard(self.n_units, unit, contiguous=True))
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # many types: lost network, damaged file
                reason = " ".join(str(error).split())[:300]
                raise OSError(f"{self.name}, shard {unit}, row {number}: {type(error).__name__}: {reason}") from error
            if row is None:
                return
            yield from _row(row, self.column, f"{self.name} shard {unit} row {number}")
