"""Measures the time of training steps."""

import time


class Clock:
    """Measures seconds a step since the last look; evaluation and saving are not counted as training."""

    def __init__(self):
        self.started = self._since = time.perf_counter()
        self._steps = 0
        self._paused = 0.0

    def step(self) -> None:
        self._steps += 1

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def look(self) -> float:
        """Returns seconds a step since the last look."""
        now = time.perf_counter()
        seconds = (now - self._since - self._paused) / max(1, self._steps)
        self._since, self._steps, self._paused = now, 0, 0.0
        return seconds


def hms(seconds: float) -> str:
    """Returns a duration as 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
