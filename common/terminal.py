"""Prints text of a model unchanged, optionally colored (rich would expand tabs and drop control characters), and
shortens long lines. Text cannot steer the terminal."""

import os
import re
import select
import sys
from typing import TextIO

from nanometa.common.errors import printable

BOLD, DIM_MAGENTA, MAGENTA = "1", "2;35", "1;35"
SHOWN_CHARS = 200  # shown at each end of a shortened text
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters except tab and newline


def write(text: str, style: str = "") -> None:
    """Writes text to standard output and flushes.

    If that is a terminal, control characters in the text are escaped, and `style`, an ANSI code, is applied. A file or
    a pipe gets exactly the text."""
    if sys.stdout.isatty():
        text = CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
        text = f"\x1b[{style}m{text}\x1b[0m" if style else text
    sys.stdout.write(text)
    sys.stdout.flush()


def write_line(line: str, style: str = "", file: TextIO | None = None) -> None:
    """Prints one line, such as a path or a sentence with names from files, with its unprintable characters escaped.

    file: printed to instead of standard output, without style."""
    if file is None:
        write(f"{printable(line)}\n", style)
    else:
        print(printable(line), file=file, flush=True)


def reader_has_ended() -> bool:
    """Returns whether the program that reads standard output or standard error, such as head, has ended.

    The writing end of a pipe then reports an error, without anything being written."""
    if os.name == "nt":
        return True  # select has no poll there
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # errors are reported in any case
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def shortened(text: str) -> str:
    """Returns a text for one printed line: unprintable characters are escaped, and the middle of a long text, such as
    the names of hundreds of files, is left out."""
    text = printable(text)
    if len(text) <= 2 * SHOWN_CHARS:
        return text
    return f"{text[:SHOWN_CHARS]} [... {len(text) - 2 * SHOWN_CHARS:,} characters ...] {text[-SHOWN_CHARS:]}"
