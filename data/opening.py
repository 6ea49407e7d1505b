"""Opens the files of a corpus: regular files of UTF-8 only, and unpacks them if they are compressed.

gzip is unpacked by Python's own module, and Zstandard by pyarrow, which the package datasets brings."""

import codecs
import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO

START_BYTES = 2**20  # at the start of a file, in which other encodings are looked for
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 starts with the same two bytes, or with zeros
WINDOW_BYTES = 2**27  # the longest window that zstd unpacks unless it is told otherwise, and that pyarrow unpacks


class Unreadable(Exception):
    """A file from which no document can be read. Its arguments are the kind and the detail of a Skipped."""


class DamagedZstd(Exception):
    """A Zstandard file that cannot be unpacked, with the reason."""


DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, DamagedZstd)  # what reading a damaged compressed file raises


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file. Raises Unreadable for a pipe, a socket or a device, because reading one might never end."""
    if path.exists() and not path.is_file():
        raise Unreadable("not a regular file", ": copy its content to a file")
    return open(path, "rb")


def unpacked(path: Path, file: BinaryIO) -> BinaryIO:
    """Returns a reader of the content of an open file, which is unpacked if its name ends with .gz, .zst or .zstd.

    The reader has `peek`, and seek(0) goes back to its start. Raises Unreadable if the start of the content shows that
    it is not UTF-8. Here and later, reading raises one of DAMAGED for a damaged file, and Unreadable for one that
    pyarrow cannot unpack."""
    suffix, content = path.suffix.lower(), file
    if suffix == ".gz":
        content = gzip.GzipFile(fileobj=file)
    elif suffix in (".zst", ".zstd"):
        content = io.BufferedReader(_Zstd(file), START_BYTES)
    start = content.peek(START_BYTES)
    if start[:2] in UTF16:
        raise Unreadable("UTF-16 or UTF-32, not UTF-8", ": convert it, for example with iconv -f UTF-16 -t UTF-8")
    if start and 4 * start.count(0) >= len(start):  # half of the bytes of English in UTF-16 are zero
        raise Unreadable("binary or UTF-16, because at least a quarter of its first bytes are zero")
    return content


class _Zstd(io.RawIOBase):
    """The content of an open Zstandard file, of one or more frames."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._begin()

    def _begin(self) -> None:
        import pyarrow  # here, because most corpora do not need it

        self._file.seek(0)
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(_Open(self._file), "r"), "zstd")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes back to the start. Raises UnsupportedOperation for any other place."""
        if (offset, whence) != (0, io.SEEK_SET):
            raise io.UnsupportedOperation("a Zstandard file can only be read from its start")
        self._begin()
        return 0

    def readinto(self, buffer) -> int:
        try:
            block = self._stream.read(len(buffer))
        except OSError as error:
            if error.errno is not None:  # the file itself cannot be read
                raise
            if "too much memory" in str(error):
                raise Unreadable(
                    f"compressed with a window of more than {WINDOW_BYTES // 2**20} MiB",
                    ": unpack it with zstd --decompress --long=31, and compress it again without --long",
                ) from None
            raise DamagedZstd(str(error)) from None
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)


class _Open:
    """A file that stays open when pyarrow closes it, because it may be read again from its start."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.read = file.read

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass
