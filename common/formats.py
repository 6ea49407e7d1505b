"""Format numbers of the JSON files that outlive a version of the code."""

from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import is_count


class NewerFormatError(UserError):
    """A file that a newer version of nanoMeta wrote. It is not damaged, and only an update can read it."""


def check_format(path: Path, content: dict, newest: int = 1) -> None:
    """Checks the field "format" of a JSON file; a file without the field has format 1.

    Raises NewerFormatError if the format is above `newest`, and ValueError if it is not a positive integer."""
    found = content.get("format", 1)
    if not (is_count(found) and found):
        raise ValueError(f"format is {str(found)[:40]!r}")
    if found > newest:
        raise NewerFormatError(
            f"{path} has format {found}, and this version of nanoMeta reads up to {newest}: update nanoMeta."
        )
