"""The exception for bad input: one sentence, shown without a traceback."""


class UserError(Exception):
    """Bad input. The message is one sentence that names the value, the cause and the cure, on one printable line."""

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


def printable(text: str) -> str:
    """Escapes what would break a line of the screen or steer the terminal, in text from outside."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
