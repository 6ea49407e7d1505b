"""Defines UserError, the exception for bad input, which commands show as one sentence without a traceback."""

import re
import sys


class UserError(Exception):
    """An error in the input. Its message is one sentence on one line: the wrong value, the reason and what to do."""

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


class ReportedError(UserError):
    """A UserError that this process or another process of the run has already reported."""


def printable(text: str) -> str:
    """Returns text with unprintable characters escaped, so that it cannot break a line or steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def report(error: UserError) -> None:
    """Prints the sentence of an error on standard error, unless it has been reported before."""
    if not isinstance(error, ReportedError):
        print(f"error: {error}", file=sys.stderr, flush=True)


def in_words(error: BaseException) -> UserError | None:
    """Returns an error of the input or of the machine as a UserError; None for any other error, a fault of the code.

    The machine can lack memory, for which torch raises a RuntimeError, or files, permissions and disk space. A closed
    pipe is no error of the machine."""
    if isinstance(error, UserError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search("out of memory|not enough memory|can't allocate memory", text)
    ):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        return UserError(
            f"there is not enough memory{f' for another {asked[1]}' if asked else ''}: use a smaller model or smaller "
            f"batches (train.py has --micro_batch_size and --activation_checkpointing, and --dry_run estimates its "
            f"memory)."
        )
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return UserError(f"{text or type(error).__name__}: check the path, its permissions and the free space.")
    return None
