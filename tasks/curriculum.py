"""Decides the length and the level of the training texts of tasks at every step."""

import math

from nanometa.config import TrainConfig
from nanometa.config.tasks import LEVELS

SHORTEST = 32  # positions of the shortest training texts, if the tokenizer allows
PHASES = 5  # number of phases of the curriculum
MULTIPLE = 32  # the widths of batches and their indices are multiples of this, so that torch.compile sees few shapes


class Curriculum:
    """The lengths and levels of the training texts of a run. Without curriculum_steps, they never change.

    start: positions from which the maximum length grows."""

    def __init__(self, cfg: TrainConfig, start: int = SHORTEST):
        self.cfg, self.T, self.start = cfg, cfg.task.train_length, start

    def reached(self, step: int) -> tuple[int, tuple[str, ...]]:
        """Returns the longest length and the levels of training texts at a step.

        The curriculum has five phases, over which the length grows geometrically and the levels are added in order."""
        task = self.cfg.task
        levels = LEVELS[: LEVELS.index(task.level) + 1]
        share = 1.0 if step >= task.curriculum_steps else (1 + step * PHASES // task.curriculum_steps) / PHASES
        longest = round(self.start * (self.T / self.start) ** share)
        return longest, levels[: math.ceil(share * len(levels))]

    def phases(self) -> list[tuple[int, tuple[str, ...]]]:
        """Returns what `reached` returns over the whole run, from the shortest to the longest texts."""
        steps = (phase * self.cfg.task.curriculum_steps // PHASES for phase in range(PHASES + 1))
        return list(dict.fromkeys(map(self.reached, steps)))

    def width(self, step: int) -> int:
        """Returns the padded width of the training texts of a step, which depends on the longest one."""
        return min(self.T, -(-self.reached(step)[0] // MULTIPLE) * MULTIPLE)

    def widths(self, n: int) -> list[tuple[int, int]]:
        """Returns the padded widths of the first n training texts, as pairs (number of texts, their width).

        n must be a whole number of steps."""
        C, B = self.cfg.task.curriculum_steps, self.cfg.batch_size
        starts = [min(n, math.ceil(phase * C / PHASES) * B) for phase in range(PHASES)]  # first text of each phase
        return [(end - start, self.width(start // B)) for start, end in zip(starts, [*starts[1:], n], strict=True)]
