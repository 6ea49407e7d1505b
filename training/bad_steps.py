"""What keeps a bad step out of the weights: non-finite losses or gradients, and spikes of the gradient's norm."""

import math
import statistics
from collections import deque

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig

WINDOW = 128  # norms of steps that were taken, by which a spike is judged; there must be half as many


class Guard:
    """Judges every step before its update. All processes see the same figures, so they decide alike.

    A step whose loss or gradient norm is not finite is skipped. One whose norm lies more than cfg.spike_deviations
    standard deviations above the mean of the last 128 steps that were taken (OLMo's SkipStepOptimizer takes 6) is a
    spike: logged, and skipped with cfg.skip_spikes. `state` goes into checkpoints, so that a resumed run judges as an
    uninterrupted one.
    """

    def __init__(self, cfg: TrainConfig, state: dict | None = None):
        state = state or {"norms": [], "in_a_row": 0, "skipped": 0}
        self.cfg = cfg
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]

    def state(self) -> dict:
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "skipped": self.skipped}

    def judge(self, loss: float, norm: float) -> tuple[bool, str]:
        """(take the update?, what is wrong with the step or "")."""
        wrong, take = "", True
        if not (math.isfinite(loss) and math.isfinite(norm)):
            wrong, take = f"its loss is {loss:.4g} and its gradient's norm {norm:.4g}", False
        else:
            if len(self.norms) >= WINDOW // 2:
                mean, deviation = statistics.fmean(self.norms), statistics.pstdev(self.norms)
                if norm > mean + self.cfg.spike_deviations * deviation:
                    above = (norm - mean) / max(deviation, 1e-30)
                    wrong = f"its gradient's norm {norm:.4g} is {above:.1f} deviations above the mean of {mean:.4g}"
                    take = not self.cfg.skip_spikes
            if take:  # a spike that was skipped would raise the mean and deviation that the next one is judged by
                self.norms.append(norm)
        self.in_a_row = 0 if take else self.in_a_row + 1
        self.skipped += not take
        return take, wrong

    def check(self, step: int, last_good: str) -> None:
        """Raises UserError when cfg.max_skipped steps in a row were skipped."""
        if self.in_a_row >= self.cfg.max_skipped:
            raise UserError(
                f"training has diverged: {self.in_a_row} steps in a row up to step {step:,} were skipped; lower "
                f"--learning_rate and start again, or resume with it from {last_good}."
            )
