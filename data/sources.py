"""Where text comes from: documents, cut into pieces of bounded size so that no document has to fit in memory."""

import codecs
import glob
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from config import PrepareConfig, UserError

PIECE_BYTES = 64 * 1024  # small beside any validation split, long beside any window
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
STDLIB_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")


class Piece(NamedTuple):
    """A stretch of one document's text; `last` ends the document. Pieces join to the exact text."""

    text: str
    last: bool


@dataclass
class Source:
    """The documents of a source. `skipped` fills while `pieces` runs: (path, reason) of unreadable documents."""

    paths: list[Path]
    description: str
    total_bytes: int
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def pieces(self) -> Iterator[Piece]:
        self.skipped.clear()
        for path in self.paths:
            try:
                check_utf8(path)
            except UnicodeDecodeError as error:
                self.skipped.append((str(path), f"not UTF-8 at byte {error.start}"))
            except OSError as error:
                self.skipped.append((str(path), error.strerror or str(error)))
            else:
                yield from read_pieces(path)


def open_source(cfg: PrepareConfig) -> Source:
    """The source that cfg names. Raises UserError if it has no document."""
    if cfg.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(
            path
            for path in root.rglob("*")
            if path.suffix in STDLIB_SUFFIXES
            and not any(part in STDLIB_LEFT_OUT for part in path.relative_to(root).parts)
            and path.is_file()
        )
        description = f"standard library of Python {sysconfig.get_python_version()} ({', '.join(STDLIB_SUFFIXES)})"
    else:
        found: set[Path] = set()
        for pattern in cfg.files:
            matches = {Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
            if not matches:
                raise UserError(f"no file matches {pattern!r}: give a glob of text files, such as 'texts/**/*.txt'.")
            found |= matches
        paths, description = sorted(found), f"files {' '.join(cfg.files)}"
    if not paths:
        raise UserError(f"the source {cfg.source!r} has no document here: take --source=files.")
    return Source(paths, description, sum(path.stat().st_size for path in paths))


def check_utf8(path: Path) -> None:
    """Raises UnicodeDecodeError, with the byte's place in the file, before any of the document is used."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                error.start += done - pending
                raise
            done += len(block)
        decoder.decode(b"", final=True)


def read_pieces(path: Path, limit: int = PIECE_BYTES) -> Iterator[Piece]:
    """The text of a UTF-8 file, cut after the last line break within `limit` bytes (or at the limit)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        text = ""
        while block := file.read(limit):
            text += decoder.decode(block)
            while len(text) > limit:
                cut = text.rfind("\n", 0, limit) + 1 or limit
                yield Piece(text[:cut], last=False)
                text = text[cut:]
        if text:
            yield Piece(text, last=True)
