"""Decides after which step a run ends: after max_steps, or earlier once its answers are exact enough (--stop_at)."""

from nanometa.config import TrainConfig
from nanometa.config.tasks import cells_of
from nanometa.training.optimizer import decay_of, learning_rate


class Ending:
    """The last step of a run and the learning rate up to it, which --stop_at may bring forward.

    All processes see the same figures, because these are quotients of counts that were summed over the processes. So
    they decide alike. Checkpoints contain `reached`, so a resumed run ends like an uninterrupted one."""

    def __init__(self, cfg: TrainConfig, reached: dict | None = None, step: int = 0):
        """reached: the record in the checkpoint after `step`, which may stem from other settings. It is dropped if its
        exact answers are fewer than cfg.stop_at demands. If the run has made no step since, its end is computed anew
        from cfg."""
        self.cfg = cfg
        self.reached: dict | None = None
        """The first evaluation with enough exact answers in every cell: its "step", the "exact" answers of its lowest
        cell, and the step after which the run therefore ends ("end"), None if the end remains max_steps."""
        if reached and cfg.stop_at is not None and cfg.stop_at <= reached["exact"]:
            again = {"end": self._end(step)} if reached["step"] == step else {}
            self.reached = {**reached, **again}

    def _end(self, step: int) -> int | None:
        """Returns after which step the run ends if `step` is the first with enough exact answers.

        None: the end stays where it is, because the decay of wsd has begun already."""
        if self.cfg.schedule != "wsd":
            return step
        start, end = decay_of(self.cfg)
        return step + (end - start) if step < start else None

    @property
    def is_early(self) -> bool:
        """Whether the end of the run has been brought forward."""
        return self.reached is not None and self.reached["end"] is not None

    @property
    def last(self) -> int:
        """The step after which the run ends, which may still be brought forward."""
        return min(self.cfg.max_steps, self.reached["end"]) if self.is_early else self.cfg.max_steps

    def due(self, step: int, interval: int) -> bool:
        """Returns whether something that is done every `interval` steps, and at the end, is due after a step."""
        return step % interval == 0 or step == self.last

    def rate(self, step: int) -> float:
        """Returns the learning rate of update number `step`, counted from 0."""
        return learning_rate(step, self.cfg, (self.reached["step"], self.reached["end"]) if self.is_early else None)

    def judge(self, step: int, figures: dict) -> bool:
        """Takes the figures of the evaluation after a step. Returns whether it is the first with enough exact answers.

        The evaluation before the first step does not count, nor do those before the end of the curriculum."""
        cfg = self.cfg
        if cfg.stop_at is None or self.is_early or step < max(1, cfg.task.curriculum_steps):
            return False
        exact, end = min(cells_of(figures, cfg.task.tasks).values()), self._end(step)
        if exact < cfg.stop_at or (self.reached and end is None):
            return False
        self.reached = {"step": step, "exact": exact, "end": end}
        return True

    def finished(self, step: int) -> list[str]:
        """Returns a sentence that says how to go on, for a run that has ended early after `step`; else nothing."""
        if not self.is_early or step < self.reached["end"]:
            return []
        further = f" and a --max_steps above {step}" if self.cfg.max_steps <= step else ""
        return [
            f"the run is finished: after step {self.reached['step']:,} every cell had at least "
            f"{self.reached['exact']:.1%} exact answers (stop_at={self.cfg.stop_at:g}), so it ended after step "
            f"{step:,}; to train further, give --stop_at=None or a --stop_at above "
            f"{self.reached['exact']:.4g}{further}"
        ]
