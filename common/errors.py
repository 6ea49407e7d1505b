"""Defines UserError, the exception for bad input, which commands show as one sentence without a traceback."""


class UserError(Exception):
    """An error in the input. Its message is one sentence on one line: the wrong value, the reason and what to do."""

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


def printable(text: str) -> str:
    """Returns text with unprintable characters escaped, so that it cannot break a line or steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
