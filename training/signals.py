"""Turns SIGTERM and SIGINT into a request to save and stop."""

import os
import signal
import time


class StopFlag:
    """Raised by SIGTERM or SIGINT: the run saves and ends after the step under way. A later signal ends it at once.

    A second signal within a second is the same request: systemd or a scheduler may signal torchrun and its processes,
    and torchrun passes on what it gets."""

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
