"""Sends the figures of a run to Weights & Biases. A failure there costs the run a warning, but never a step."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig

WAIT = 20  # seconds in which the server must answer at the start


class WandbLog:
    """The log of a run on the wandb server, or in the run's folder with wandb=offline."""

    def __init__(self, run_dir: Path, cfg: TrainConfig, config: dict, resumed: bool, warn: Callable[[str], None]):
        """Starts the log.

        config: the settings that wandb records. warn: called with a sentence when wandb fails. Raises UserError if
        wandb=online fails at the start of a new run; a resumed run goes on without it."""
        self._run, self._warn = None, warn
        try:
            with _nobody_to_ask():
                import wandb

                settings = wandb.Settings(silent=True, console="off", init_timeout=WAIT)
                self._run = wandb.init(
                    project="nanometa", name=cfg.run_name, id=cfg.run_name, resume="allow", dir=run_dir, mode=cfg.wandb,
                    config=config, settings=settings,
                )  # fmt: skip
        except Exception as error:
            if cfg.wandb == "online" and not resumed:
                _tear_down()
                raise UserError(
                    f"wandb=online does not work ({_brief(error)}): log in with the command wandb login, check the "
                    f"connection, or give --wandb=offline."
                ) from error
            self._give_up(error)

    def record(self, figures: dict, step: int) -> None:
        """Logs the figures of a step."""
        if self._run is not None:
            try:
                self._run.log(figures, step=step)
            except Exception as error:
                self._give_up(error)

    def close(self, failed: bool) -> None:
        """Ends the log, and waits until it is written or uploaded. failed: marks the run as failed."""
        if self._run is not None:
            try:
                self._run.finish(exit_code=int(failed))
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        _tear_down()
        self._warn(
            f"warning: wandb has failed ({_brief(error)}), so it gets no more figures; metrics.jsonl has them all"
        )


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
