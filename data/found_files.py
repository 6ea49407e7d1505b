"""Finds the files of a corpus: those that match glob patterns, Python's standard library, and installed packages."""

import glob
import importlib.metadata
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nanometa.common.errors import UserError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")  # each line is a document, and may be compressed
COMPRESSED = (".gz", ".zst", ".zstd")  # the suffix before one of these tells the kind of the content
PARQUET = (".parquet", ".parq", ".pq")
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
# written when a package is built, so their content differs between the wheels of different machines
BUILD_FILES = ("version.py", "_version.py", "__config__.py")
AS_ROWS = "convert it to .jsonl or .parquet with a column of text"
AS_TEXT = "save its text as .txt"
OR_SYNTAX = ", or rename it to .txt if the model should learn its syntax"
UNPACK = "unpack it, or compress each file with gzip or zstd (.txt.gz, .jsonl.zst)"
# Formats that contain text, but are not text themselves: a model would learn their syntax. Codes of languages are not
# listed, because they are suffixes of plain text in translation corpora (.pt, .ps, .br).
UNREAD = {
    **dict.fromkeys(".csv .tsv .tab .psv .geojson .ipynb".split(), AS_ROWS + OR_SYNTAX),
    **dict.fromkeys(".html .htm .xhtml .mhtml .xml .rss .svg .rtf".split(), AS_TEXT + OR_SYNTAX),
    **dict.fromkeys(".xls .xlsx .ods .arrow .feather .ipc .orc .avro .tfrecord .h5 .hdf5 .npy .npz .pkl .pickle "
                    ".safetensors .msgpack .db .sqlite .sqlite3 .warc .wet .wat".split(), AS_ROWS),
    **dict.fromkeys(".pdf .doc .docx .odt .ppt .pptx .odp .epub .mobi .djvu".split(), AS_TEXT),
    **dict.fromkeys(".bz2 .xz .lzma .lz4 .zip .tar .tgz .tbz2 .txz .tzst .7z .rar".split(), UNPACK),
}  # fmt: skip


def kind_of(path: Path) -> str:
    """Returns the suffix of a file in lower case. For a compressed file, it is the suffix before .gz or .zst."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def is_rows(path: Path) -> bool:
    """Returns whether each row of the file is a document, to judge by its name. In any other file, all text is one."""
    return kind_of(path) in JSON_LINES or path.suffix.lower() in PARQUET


def files_of(patterns: tuple[str, ...], setting: str = "files") -> tuple[list[Path], list[str]]:
    """Returns the sorted files that match glob patterns, each once, and notes about what was left out.

    setting: the name of the setting that gives the patterns, for error messages. A broken link is kept, so that its
    reader reports it. Raises UserError if a pattern matches no file, or if a file has a format that is not read."""
    found: set[Path] = set()
    notes: list[str] = []
    for pattern in patterns:
        matches = {Path(name) for name in _matches(pattern, notes) if not os.path.isdir(name)}
        if not matches and Path(pattern).is_dir():
            raise UserError(
                f"{pattern!r} is a folder: give a pattern for its files, such as "
                f"--{setting} '{pattern.rstrip('/')}/**/*.txt'."
            )
        if not matches:
            raise UserError(
                f"no file matches {pattern!r} of --{setting}: give a glob pattern of text files, such as "
                f"'texts/**/*.txt'."
            )
        found |= matches
    _refuse_unread(found, setting)

    def distance(path: Path) -> tuple:
        """Returns a key that is smallest for the file itself, and larger for links to it and longer paths."""
        return path.is_symlink(), len(path.parts), path

    by_file = {os.path.realpath(path): path for path in sorted(found, key=distance, reverse=True)}
    if again := len(found) - len(by_file):
        notes.append(f"paths left out, because they lead to files that are read under another path: {again:,}")
    return sorted(by_file.values()), notes


def _refuse_unread(paths: set[Path], setting: str) -> None:
    """Raises UserError if a file has a format that is not read."""
    unread = sorted(path for path in paths if kind_of(path) in UNREAD or _is_packed_parquet(path))
    if unread:
        kind = kind_of(unread[0])
        others = f" (files of such formats: {len(unread):,})" if len(unread) > 1 else ""
        raise UserError(
            f"{unread[0]} has the format {kind}, which cannot be read as documents{others}: "
            f"{UNREAD.get(kind, 'unpack it')}, or give --{setting} patterns that do not match it."
        )


def _is_packed_parquet(path: Path) -> bool:
    """Returns whether the file is a Parquet file that was compressed once more, which cannot be read in parts."""
    return kind_of(path) in PARQUET and path.suffix.lower() not in PARQUET


def _matches(pattern: str, notes: list[str]) -> Iterator[str]:
    """Yields the paths that match a glob pattern like glob.glob(recursive=True), but enters each folder only once.

    glob.glob follows a link to a folder above it up to 40 times, and two such links 2^40 times. notes: receives a
    sentence for each folder that cannot be read."""
    parts = pattern.replace(os.altsep or os.sep, os.sep).split(os.sep)
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    at = parts.index("**")
    after = list(itertools.dropwhile(lambda part: part == "**", parts[at:]))  # a/**/**/b means a/**/b
    for top in glob.glob(os.sep.join([*parts[:at], ""])) if at else [""]:
        for folder in _folders(top, notes):
            yield from _matches(os.path.join(glob.escape(folder), *(after or ["*"])), notes)


def _folders(top: str, notes: list[str]) -> Iterator[str]:
    """Yields a folder and all folders below it that are not hidden, each once, however many links lead to it.

    Links are followed last, so that a folder is reached by a path without links if there is one."""
    seen: set[str] = set()
    folders, links = [top], []
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        yield folder
        try:
            with os.scandir(folder or os.curdir) as entries:
                for entry in entries:
                    if not entry.name.startswith(".") and entry.is_dir():
                        (links if entry.is_symlink() else folders).append(os.path.join(folder, entry.name))
        except OSError as error:
            notes.append(f"the folder {folder} is left out, because it cannot be read ({error.strerror})")


# ----------------------------------------------------------------------------- Python source


def stdlib_files() -> tuple[list[Path], Path, str]:
    """Returns the files of Python's standard library, its folder, and a description."""
    root = Path(sysconfig.get_paths()["stdlib"])
    description = f"standard library of Python {sysconfig.get_python_version()} ({', '.join(STDLIB_SUFFIXES)})"
    return sorted(_files_below(root, STDLIB_SUFFIXES)), root, description


def package_files(requirements: tuple[str, ...]) -> tuple[list[Path], Path, str]:
    """Returns the .py files of installed packages, in the given order, the folder of packages, and a description.

    requirements: each NAME or NAME==VERSION. Raises UserError if a package is not installed or has another version."""
    names = [requirement.split("==")[0] for requirement in requirements]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--packages names {name} {names.count(name)} times: name it once.")
    paths = [path for requirement in requirements for path in _files_of_package(requirement)]
    versions = (f"{name}=={importlib.metadata.version(name)}" for name in names)
    return paths, Path(sysconfig.get_paths()["purelib"]), f"Python source of {', '.join(versions)}"


def _files_below(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yields all files below root with one of the suffixes, except in the folders of LEFT_OUT."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # do not enter these folders
        paths = (Path(folder, name) for name in names if os.path.splitext(name)[1] in suffixes)
        yield from (path for path in paths if path.is_file())


def _files_of_package(requirement: str) -> list[Path]:
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
