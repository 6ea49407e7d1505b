"""Draws loss.png in the folder of a run that is being trained, for train.py. It costs little time and fails no run."""

import time
from collections.abc import Callable
from pathlib import Path

from nanometa.common.files import write_atomically

SHARE = 0.02  # largest share of the training time that the pictures before the last one may take
FIRST_S = 2.0  # seconds that the first picture is expected to take, with the import of matplotlib


class OwnCurves:
    """The picture that `report.py curves` would draw of a run, brought up to date by the run itself."""

    def __init__(self, run_dir: Path, warn: Callable[[str], None], on: bool = True):
        """warn: called with a sentence if the picture cannot be drawn. After that, no other try is made. on: whether to
        draw at all."""
        self._run_dir, self._warn, self._on = run_dir, warn, on
        self._cost_s, self._drawn_at = FIRST_S, time.perf_counter()

    def draw(self, last: bool) -> None:
        """Writes loss.png. Unless this is the last time, it does nothing if so little time has passed since the picture
        before that drawing would take more than SHARE of it."""
        started = time.perf_counter()
        if not self._on or not (last or self._cost_s <= SHARE * (started - self._drawn_at)):
            return
        try:
            from nanometa.reports.curves import picture  # imports matplotlib, which takes longer than a drawing

            write_atomically(self._run_dir / "loss.png", picture([self._run_dir]))
        except Exception as error:
            self._on = False
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            self._warn(
                f"warning: the curves could not be drawn ({reason}), so the run goes on without; python report.py "
                f"curves {self._run_dir} draws them"
            )
        self._drawn_at = time.perf_counter()
        self._cost_s = self._drawn_at - started
