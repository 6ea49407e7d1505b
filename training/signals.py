"""Turns SIGTERM and SIGINT into a request to save the run and stop."""

import os
import signal
import time


class StopFlag:
    """A flag that SIGTERM or SIGINT raises, so that the run saves and ends after the current step.

    A later signal ends the process at once. A second signal within one second counts as the same request, because a
    scheduler may signal both torchrun and its processes, and torchrun passes signals on to its processes."""

    def __init__(self):
        self.raised, self._when = False, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._raise)

    def _raise(self, number, frame) -> None:
        if not self.raised:
            self.raised, self._when = True, time.monotonic()
        elif time.monotonic() - self._when > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
