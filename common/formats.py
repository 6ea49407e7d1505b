"""Checks the format number of JSON files, so that a file from a newer version of nanoMeta is recognized."""

from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import is_count


class NewerFormatError(UserError):
    """A file comes from a newer version of nanoMeta. It is not damaged, but only a newer version can read it."""


def check_format(path: Path, content: dict, newest: int = 1) -> None:
    """Checks the field "format" of a JSON file. A file without this field has format 1.

    Raises NewerFormatError if the format is above `newest`, and ValueError if it is not a positive integer."""
    found = content.get("format", 1)
    if not (is_count(found) and found):
        raise ValueError(f"its format is {str(found)[:40]!r}, not a positive integer")
    if found > newest:
        raise NewerFormatError(
            f"{path} has format {found}, and this version of nanoMeta reads up to {newest}: update nanoMeta."
        )
