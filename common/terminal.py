"""Prints text of a model unchanged, optionally colored (rich would expand tabs and drop control characters), and
shortens long lines."""

import sys

BOLD, DIM_MAGENTA, MAGENTA = "1", "2;35", "1;35"
SHOWN_CHARS = 200  # shown at each end of a shortened text


def write(text: str, style: str = "") -> None:
    """Writes text to standard output and flushes. `style`, an ANSI code, is applied only if that is a terminal."""
    if style and sys.stdout.isatty():
        text = f"\x1b[{style}m{text}\x1b[0m"
    sys.stdout.write(text)
    sys.stdout.flush()


def shortened(text: str) -> str:
    """Returns a text for one printed line, without its middle if it is long, such as the names of hundreds of files."""
    if len(text) <= 2 * SHOWN_CHARS:
        return text
    return f"{text[:SHOWN_CHARS]} [... {len(text) - 2 * SHOWN_CHARS:,} characters ...] {text[-SHOWN_CHARS:]}"
