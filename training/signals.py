"""Turns signals such as SIGTERM and SIGINT into a request to save the run and stop."""

import os
import signal
import time

# SIGHUP: the terminal was closed or its connection lost; SIGUSR1 and SIGUSR2: SLURM's --signal and other schedulers.
# SIGQUIT (Ctrl-\) is left alone, so that it ends a process at once. Windows lacks some of these.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopFlag:
    """A flag that a signal raises, so that the run saves and ends after the current step.

    A later signal ends the process at once. A second signal within one second counts as the same request, because a
    scheduler may signal both torchrun and its processes, and torchrun passes signals on to its processes.

    A signal that is ignored stays ignored, as SIGHUP under nohup. SIGINT is the exception, because a shell lets every
    process in the background ignore it."""

    def __init__(self):
        self.raised, self._when = False, 0.0
        for number in SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._raise)

    def _raise(self, number, frame) -> None:
        if not self.raised:
            self.raised, self._when = True, time.monotonic()
        elif time.monotonic() - self._when > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
