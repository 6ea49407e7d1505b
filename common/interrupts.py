"""Turns SIGINT and SIGTERM into KeyboardInterrupt, except within calls that such an exception would break.

Python runs a signal handler between any two instructions of the main thread. An exception that it raises within
threading.Condition.wait leaves a lock released or held by mistake. The futures of concurrent.futures wait in this way,
so an interruption could end in a RuntimeError, or hang.
"""

import contextlib
import signal
from collections.abc import Iterator

_depth = 0  # number of with blocks of interrupts_postponed that are being executed
_arrived = False  # whether a signal arrived within them


def raise_interrupts() -> None:
    """Lets SIGTERM raise KeyboardInterrupt, as SIGINT does, and lets interrupts_postponed postpone both.

    A SIGINT that is ignored stays ignored, as in the background of a shell script."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def end_at_once() -> None:
    """Lets a further SIGINT or SIGTERM end the process at once, without a traceback. SIGINT stays ignored if it is."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts_postponed() -> Iterator[None]:
    """A with block after which, and not within which, a signal raises KeyboardInterrupt.

    A process that is forked within the block ignores the signals until it sets its own handlers. For the main thread
    of a program that has called raise_interrupts."""
    global _depth, _arrived
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _arrived and not _depth:
            _arrived = False
            raise KeyboardInterrupt


def was_interrupted(error: BaseException | None) -> bool:
    """Returns whether an exception is a KeyboardInterrupt, or was raised while one was being handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _interrupt(number, frame) -> None:
    global _arrived
    _arrived = _depth > 0
    if not _arrived:
        raise KeyboardInterrupt
