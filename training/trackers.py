"""Sends the figures of a run to Weights & Biases or TensorBoard. A failure there costs a warning, but never a step."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig

WAIT = 20  # seconds in which the wandb server must answer at the start
FOLDERS = ("wandb", "tensorboard")  # in the run's folder


class TrackerLog:
    """The log of a run in its tracker, in addition to metrics.jsonl."""

    def __init__(
        self, name: str, run_dir: Path, cfg: TrainConfig, config: dict, step: int, warn: Callable[[str], None]
    ):
        """Starts the log.

        name: "wandb" or "tensorboard". config: the settings that the tracker records. step: the step at which the run
        resumes; -1 for a new run. warn: called with a sentence when the tracker fails. Raises UserError if the tracker
        was asked for and its package is missing, or if wandb=online fails at the start of a new run; a resumed run goes
        on without the server."""
        self._name, self._warn, self._log = name, warn, None
        try:
            self._log = {"wandb": _Wandb, "tensorboard": _TensorBoard}[name](run_dir, cfg, config, step)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and (cfg.tracker or cfg.wandb == "online"):
                raise UserError(
                    f"tracker={name} needs a package that is not installed ({_brief(error)}): pip install {name}, or "
                    f"give --tracker=none."
                ) from error
            if name == "wandb" and cfg.wandb == "online" and step < 0:
                _tear_down()
                raise UserError(
                    f"wandb=online does not work ({_brief(error)}): log in with the command wandb login, check the "
                    f"connection, or give --wandb=offline."
                ) from error
            self._give_up(error)

    def record(self, figures: dict, step: int) -> None:
        """Logs the figures of a step."""
        if self._log is not None:
            try:
                self._log.record(figures, step)
            except Exception as error:
                self._give_up(error)

    def close(self, failed: bool) -> None:
        """Ends the log, and waits until it is written or uploaded. failed: marks the run as failed."""
        if self._log is not None:
            try:
                self._log.close(failed)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._log = None
        if self._name == "wandb":
            _tear_down()
        self._warn(
            f"warning: {self._name} has failed ({_brief(error)}), so it gets no more figures; metrics.jsonl has them "
            f"all"
        )


class _Wandb:
    """A run on the wandb server, or in the run's folder with wandb=offline."""

    def __init__(self, run_dir: Path, cfg: TrainConfig, config: dict, step: int):
        with _nobody_to_ask():
            import wandb

            settings = wandb.Settings(silent=True, console="off", init_timeout=WAIT)
            self._run = wandb.init(
                project="nanometa", name=cfg.run_name, id=cfg.run_name, resume="allow", dir=run_dir, mode=cfg.wandb,
                config=config, settings=settings,
            )  # fmt: skip

    def record(self, figures: dict, step: int) -> None:
        self._run.log(figures, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _TensorBoard:
    """An event file in the run's folder. TensorBoard stores single precision, and numbers only."""

    def __init__(self, run_dir: Path, cfg: TrainConfig, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier start recorded of the steps that are trained again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step >= 0 else None)

    def record(self, figures: dict, step: int) -> None:
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


@contextlib.contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Hides the terminal in a with block, because wandb would wait there for somebody to type an API key."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin


def _tear_down() -> None:
    """Ends wandb's helper process, which would otherwise end at the exit of this process, maybe with a traceback."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def _brief(error: Exception) -> str:
    """Returns the first line of an error's message, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
