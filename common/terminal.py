"""Prints text of a model unchanged, optionally colored. rich would expand tabs and drop control characters."""

import sys

BOLD, DIM_MAGENTA, MAGENTA = "1", "2;35", "1;35"


def write(text: str, style: str = "") -> None:
    """Writes text to standard output and flushes. `style`, an ANSI code, is applied only if that is a terminal."""
    if style and sys.stdout.isatty():
        text = f"\x1b[{style}m{text}\x1b[0m"
    sys.stdout.write(text)
    sys.stdout.flush()
