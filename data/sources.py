"""Reads the documents of a corpus: from files, from installed packages, or from a Hugging Face dataset.

The documents of a source are in a fixed order, divided into n_units consecutive units (groups of files, or shards of a
Hugging Face dataset). Machines share the work by units, and an interrupted preparation continues at a unit.
`read(unit)` yields the documents of a unit in pieces of bounded size, and a Skipped for everything that cannot be read,
so that nothing is lost silently."""

import codecs
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from nanometa.common.errors import UserError
from nanometa.common.files import parse_json
from nanometa.config import PrepareConfig
from nanometa.config.settings import why_idle
from nanometa.data.found_files import JSON_LINES, files_of, is_rows, kind_of, package_files, stdlib_files
from nanometa.data.opening import DAMAGED, Unreadable, open_regular, unpacked
from nanometa.data.rows import (
    Skipped,
    check_column,
    check_parquet,
    sampled_rows,
    texts_in_json_lines,
    texts_in_parquet,
)

PIECE_CHARS = 64 * 1024  # much smaller than a validation split, much longer than a window
READ_BYTES = 2**20  # bytes of a file that are read at a time
UNITS, UNIT_BYTES = 64, 256 * 2**20  # files form about 64 units, or more if units would exceed this size
SAMPLED_FILES = 10  # in which a misspelled text column is looked for before the preparation starts
BOM = "\ufeff"


class Piece(NamedTuple):
    """A part of a document's text; `last` marks its last piece. The pieces of a document join to its exact text."""

    text: str
    last: bool
    split: str = ""
    """the split that the source assigns: "train", "val", or "" if a hash of the text decides"""


class Source(Protocol):
    """The interface of all sources."""

    description: str
    notes: list[str]  # what was left out when the source was opened
    n_units: int
    total_bytes: int  # 0 = unknown
    fingerprint: str  # changes if the names, the number or the sizes of the files change
    stamps: dict[Path, tuple[int, int]]  # stamp_of each local file
    unit_sizes: list[int]  # for a progress bar: in bytes, or 1 for each unit if these are unknown
    position: int  # how much was read so far, in the same measure

    def read(self, unit: int) -> Iterator[Piece | Skipped]: ...

    def digest(self, unit: int) -> str: ...  # changes if the content of a unit changes


def open_source(cfg: PrepareConfig) -> Source:
    """Returns the source that cfg names.

    Raises UserError if it has no documents or lacks the text column, for a setting that has no effect on it, and for a
    file that would be in both splits."""
    if cfg.source == "hf":
        from nanometa.data.hub import HubSource  # imported here, because it imports this module

        return HubSource(cfg)
    root, paths, descriptions = None, [], []
    if cfg.source == "stdlib":
        paths, root, description = stdlib_files()
        descriptions.append(description)
    elif cfg.source == "packages":
        paths, root, description = package_files(cfg.packages)
        descriptions.append(description)
    found, notes = {}, []
    for name in ("files", "extra_files", "val_files"):
        if (patterns := getattr(cfg, name)) and not why_idle(cfg, name):
            found[name], left_out = files_of(patterns, name)
            notes += left_out
            descriptions.append(f"{'validation files' if name == 'val_files' else 'files'} {' '.join(patterns)}")
    _refuse_in_both(found)
    for name, used, kind in (("text_column", True, "JSON lines or Parquet"), ("separator", False, "text")):
        chosen = (path for more in found.values() for path in more)
        if name in cfg.given and getattr(cfg, name) and not any(is_rows(path) is used for path in chosen):
            given = " or ".join(f"--{setting}" for setting in found)
            raise UserError(f"--{name} has no effect, because no {kind} file matches {given}: leave --{name} out.")
    val_paths = found.pop("val_files", [])
    paths = [*paths, *(path for more in found.values() for path in more)]
    if not paths:
        raise UserError(f"source={cfg.source!r} has no documents on this machine: use --source=files instead.")
    return FileSource(paths, " and ".join(descriptions), cfg.text_column, root, cfg.separator, notes, val_paths)


def _refuse_in_both(found: dict[str, list[Path]]) -> None:
    """Raises UserError if a file of val_files is among the files to train on, also under another path."""
    trained = {os.path.realpath(path): path for path in found.get("files", [])}
    for path in found.get("val_files", []):
        if other := trained.get(os.path.realpath(path)):
            name = str(path) if path == other else f"{path} ({other})"
            raise UserError(
                f"{name} is in both --files and --val_files, so the model would be validated on text that it was "
                f"trained on: change one of the patterns, so that it does not match this file."
            )


# ----------------------------------------------------------------------------- files


class FileSource:
    """A source of files in the given order. In files of rows, each row is a document.

    In a text file, a document is the whole file, or the text between two separators."""

    def __init__(
        self, paths: list[Path], description: str, column: str, root: Path | None = None, separator: str = "",
        notes: Iterable[str] = (), val_paths: Iterable[Path] = (),
    ):  # fmt: skip
        """root: makes the fingerprint independent of the machine, by using names relative to this folder for the files
        in it. val_paths: further files, read after the others. If there are any, their text is the validation split,
        and that of `paths` the train split."""
        self.description, self.column, self.separator, self.notes = description, column, separator, list(notes)
        self.val_paths = frozenset(val_paths)
        for group in (paths, val_paths):
            _check_columns([path for path in group if is_rows(path) and path.is_file()][:SAMPLED_FILES], column)
        paths = [*paths, *val_paths]
        self.stamps = {path: stamp_of(path) for path in paths}
        sizes = [size for size, _ in self.stamps.values()]
        inside = {path for path in paths if root and path.is_relative_to(root)}
        names = [os.path.relpath(path, root) if path in inside else str(path) for path in paths]
        self.total_bytes = sum(sizes)
        self.units = list(_grouped(paths, sizes, min(self.total_bytes / UNITS, UNIT_BYTES)))
        self.n_units = len(self.units)
        self.unit_sizes = [sum(self.stamps[path][0] for path in unit) for unit in self.units]
        self.fingerprint = hashlib.sha256(repr([*zip(names, sizes, strict=True)]).encode()).hexdigest()
        self._before, self._file = 0, None  # bytes of the files that were read, and the file that is being read

    @property
    def position(self) -> int:
        """Bytes of the files that were read so far."""
        return self._before + (self._file.tell() if self._file and not self._file.closed else 0)

    def read(self, unit: int) -> Iterator[Piece | Skipped]:
        """Yields the pieces of all documents of a unit, and a Skipped for each one that cannot be read.

        Raises UserError if a file of the unit has changed since the source was opened."""
        for path in self.units[unit]:
            split = ("val" if path in self.val_paths else "train") if self.val_paths else ""
            try:
                for item in self._items(path):
                    yield item._replace(split=split) if split and isinstance(item, Piece) else item
            except UnicodeDecodeError as error:
                yield Skipped(str(path), "not UTF-8", f" at byte {error.start}")
            except DAMAGED as error:
                yield Skipped(str(path), "damaged", f" ({error})")
            except Unreadable as error:
                yield Skipped(str(path), *error.args)
            except OSError as error:
                yield Skipped(str(path), error.strerror or str(error))
            self._file, self._before = None, self._before + self.stamps[path][0]
        refuse_changes({path: self.stamps[path] for path in self.units[unit]})

    def _items(self, path: Path) -> Iterator[Piece | Skipped]:
        """Yields the pieces of all documents of a file, and a Skipped for each row that cannot be read."""
        if not is_rows(path):
            yield from read_pieces(path, self.separator, self._open)
            return
        for text in _texts_of_rows(path, self.column, self._open):
            yield from [text] if isinstance(text, Skipped) else pieces_of([text])

    def digest(self, unit: int) -> str:
        """Returns a hash of the content of a unit's files."""
        return content_digest(self.units[unit])

    def _open(self, path: Path) -> BinaryIO:
        """Opens a file so that `position` follows its reader."""
        self._file = open_regular(path)
        return self._file


def stamp_of(path: Path) -> tuple[int, int]:
    """Returns the size and the time (ns) of the last change of a regular file, and (0, 0) for anything else."""
    if not path.is_file():
        return 0, 0
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def refuse_changes(stamps: dict[Path, tuple[int, int]]) -> None:
    """Raises UserError if a file no longer has its stamp, because a part of the old and of the new text was read."""
    for path, stamp in stamps.items():
        if stamp_of(path) != stamp:
            raise UserError(
                f"{path} has changed during the preparation, so its text may be a mixture of two versions: start "
                f"again when no other program writes to it."
            )


def content_digest(paths: Iterable[Path]) -> str:
    """Returns a hash of the content of files, in their order. Anything but a readable file counts as empty."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open_regular(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except (OSError, Unreadable):
            digest.update(b"unreadable")
    return digest.hexdigest()


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


# ----------------------------------------------------------------------------- rows


def _texts_of_rows(path: Path, column: str, opened: Callable[[Path], BinaryIO]) -> Iterator[str | Skipped]:
    """Yields the texts of the rows of a file. opened: opens the file."""
    with opened(path) as file:
        if kind_of(path) in JSON_LINES:
            content = unpacked(path, file)
            if kind_of(path) == ".json":  # the name is also used for files with one array or object
                _refuse_other_json(content)
            yield from texts_in_json_lines(content, column, str(path))
        else:
            yield from texts_in_parquet(file, column, str(path))


def _refuse_other_json(content: BinaryIO) -> None:
    """Raises Unreadable if a file of JSON does not have an object on each line. Goes back to its start otherwise."""
    start = content.peek(1)[:READ_BYTES].removeprefix(BOM.encode()).lstrip()
    rows = sampled_rows(content)
    if start[:1] != b"{" or not any(isinstance(row, dict) for row in rows):
        raise Unreadable("JSON, but not one object per line", ": convert it to .jsonl, for example with jq -c '.[]'")
    content.seek(0)


def _check_columns(paths: list[Path], column: str) -> None:
    """Raises UserError if no file of rows has text in the text column, so that a misspelled name is reported at once.

    Says nothing about files that cannot be read: their reader reports that."""
    refusals = []
    for path in paths:
        try:
            with open_regular(path) as file:
                if kind_of(path) in JSON_LINES:
                    content = unpacked(path, file)
                    if kind_of(path) == ".json":
                        _refuse_other_json(content)
                    rows = sampled_rows(content)
                    check_column(str(path), column, rows)
                    if not rows:
                        continue
                else:
                    check_parquet(file, column, str(path))
            return
        except (OSError, *DAMAGED):
            continue
        except Unreadable as error:
            refusals.append(UserError(f"{path} is {''.join(error.args)}."))
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


# ----------------------------------------------------------------------------- text


def read_pieces(
    path: Path, separator: str = "", opened: Callable[[Path], BinaryIO] = open_regular
) -> Iterator[Piece]:  # fmt: skip
    """Yields the text of a UTF-8 file in pieces, with at most about two megabytes of it in memory.

    separator: text that separates the documents of the file; "" = the file is one document. opened: opens the file.
    Raises UnicodeDecodeError, with the byte's position in the file, before it yields the first piece, and Unreadable if
    the file is something else than text."""
    with opened(path) as file:
        content = unpacked(path, file)
        start = content.read(READ_BYTES)
        _refuse_json(path, start)
        if len(start) < READ_BYTES:  # true of most files
            yield from _documents([start.decode()], separator)
            return
        content.seek(0)
        for _ in _decoded(content):  # read a long file twice, to find a bad byte before its first piece
            pass
        content.seek(0)
        yield from _documents(_decoded(content), separator)


def _refuse_json(path: Path, start: bytes) -> None:
    """Raises Unreadable if the first line in the start of a file is JSON, unless the file is called .txt."""
    line = start.removeprefix(BOM.encode()).lstrip().partition(b"\n")[0]
    if line[:1] not in (b"{", b"[") or kind_of(path) == ".txt":
        return
    try:
        first = parse_json(line)
    except ValueError:
        return
    if first and isinstance(first[0] if isinstance(first, list) else first, dict):
        raise Unreadable(
            "JSON, to judge by its first line",
            ": rename it to .jsonl to read its rows, or to .txt if the model should learn JSON",
        )


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


def _documents(parts: Iterable[str], separator: str) -> Iterator[Piece]:
    """Yields the pieces of the documents of a file, given its text in parts of any size."""
    if not separator:
        yield from pieces_of(parts)
        return
    for is_text, document in itertools.groupby(_split(parts, separator), key=lambda text: text is not None):
        if is_text:
            yield from pieces_of(document)


def _split(parts: Iterable[str], separator: str) -> Iterator[str | None]:
    """Yields a text that is given in parts, with None in place of each separator and of the line break after it."""
    border, held = re.compile(re.escape(separator) + r"(?:\r?\n)?"), ""
    for part in itertools.chain(parts, [None]):
        held, start = held + (part or ""), 0
        for found in border.finditer(held):
            if part is not None and found.end() > len(held) - 2:  # a line break may follow in the next part
                break
            yield held[start : found.start()]
            yield None
            start = found.end()
        # the end may be the beginning of a separator and a line break
        end = len(held) if part is None else max(start, len(held) - len(separator) - 3)
        yield held[start:end]
        held = held[end:]


def pieces_of(parts: Iterable[str]) -> Iterator[Piece]:
    """Cuts a document, given in parts of any size, into pieces. A byte-order mark at its start is left out.

    A piece ends after the last line break within PIECE_CHARS characters, or at that length if there is none."""
    text, at_start = "", True
    for part in parts:
        if at_start and part:
            part, at_start = part.removeprefix(BOM), False
        text, start = text + part, 0
        while len(text) - start > PIECE_CHARS:
            end = start + PIECE_CHARS
            cut = text.rfind("\n", start, end) + 1 or end
            yield Piece(text[start:cut], last=False)
            start = cut
        text = text[start:]
    if text:
        yield Piece(text, last=True)
