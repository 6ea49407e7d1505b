"""Measures the time of training steps."""

import time


class Clock:
    """Measures the seconds per training step. Evaluation and saving do not count."""

    def __init__(self):
        self.started = self._since = time.perf_counter()
        self._steps = 0
        self._paused = 0.0

    def step(self) -> None:
        """Counts a training step."""
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Excludes a time that was not spent on training."""
        self._paused += seconds

    def look(self) -> float:
        """Returns the seconds per step since the last call."""
        now = time.perf_counter()
        seconds = (now - self._since - self._paused) / max(1, self._steps)
        self._since, self._steps, self._paused = now, 0, 0.0
        return seconds


def hms(seconds: float) -> str:
    """Returns a duration as 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
