"""Keeps bad steps out of the weights: a loss or gradient that is not finite, a gradient of zero, and spikes."""

import math
import statistics
from collections import deque
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig

WINDOW = 128  # a spike is judged by the gradient norms of this many applied updates; judging starts after half of them


class BadStepGuard:
    """Judges every step before its update is applied. All processes see the same figures, so they decide alike.

    A step whose loss or gradient norm is not finite is skipped. So is a step whose gradient is exactly zero: only a
    fault in the software gives that, and weight decay would go on without any learning. A step is a spike if its
    gradient norm lies more than cfg.spike_deviations standard deviations above the mean of the last 128 applied updates
    (OLMo's SkipStepOptimizer uses 6). Spikes are logged, and skipped if cfg.skip_spikes is set. Checkpoints contain
    `state`, so a resumed run judges like an uninterrupted one.
    """

    def __init__(self, cfg: TrainConfig, state: dict | None = None):
        state = state or {"norms": [], "in_a_row": 0, "skipped": 0}
        self.cfg = cfg
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.in_a_row, self.skipped, self.wrong = state["in_a_row"], state["skipped"], ""

    def state(self) -> dict:
        """Returns the part of the guard that a checkpoint keeps."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "skipped": self.skipped}

    def judge(self, loss: float, norm: float) -> tuple[bool, str]:
        """Returns whether to apply the update, and a sentence saying what is wrong with the step, or ""."""
        wrong, take = "", True
        if not (math.isfinite(loss) and math.isfinite(norm)):
            wrong, take = f"its loss is {loss:.4g} and its gradient's norm {norm:.4g}", False
        elif norm == 0:
            wrong, take = "its gradient is zero, so nothing would be learned", False
        else:
            if len(self.norms) >= WINDOW // 2:
                mean, deviation = statistics.fmean(self.norms), statistics.pstdev(self.norms)
                if norm > mean + self.cfg.spike_deviations * deviation:
                    above = (norm - mean) / max(deviation, 1e-30)
                    wrong = f"its gradient's norm {norm:.4g} is {above:.1f} deviations above the mean of {mean:.4g}"
                    take = not self.cfg.skip_spikes
            if take:  # the norm of a skipped spike would hide the next spike by raising the mean and the deviation
                self.norms.append(norm)
        self.in_a_row = 0 if take else self.in_a_row + 1
        self.skipped += not take
        self.wrong = wrong
        return take, wrong

    def check(self, step: int, last_good: str) -> None:
        """Raises UserError if cfg.max_skipped steps in a row were skipped. last_good: a checkpoint, in words."""
        if self.in_a_row >= self.cfg.max_skipped:
            raise UserError(
                f"training has failed: the last {self.in_a_row} steps up to step {step:,} were skipped, the last one "
                f"because {self.wrong}; lower --learning_rate or try --compile=False, and start again or resume from "
                f"{last_good}."
            )


def diverged(what: str, step: int, run_dir: Path) -> UserError:
    """Returns the error of a run that an evaluation after a step shows to have diverged. what: says what is wrong."""
    return UserError(
        f"{what} at step {step:,}, so training has diverged; lower --learning_rate, and start again or resume from the "
        f"last checkpoint in {run_dir}, which is older than this evaluation."
    )
