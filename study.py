"""Runs a study of many training runs from a plan, and analyses its results.

    python study.py run studies/meta_tokens.toml --workers=2      # continues after any interruption
    python study.py report studies/meta_tokens.toml               # verdict table and figure from the finished lines
    python study.py run studies/meta_tokens.toml --size=minutes   # the same with 20 steps a run, as a test

The plan states arms, seeds, endpoints and margins before any result (studies/plan.py describes the file). To pause a
queue, for example during a timing, send SIGSTOP to its process group, and later SIGCONT.
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.terminal import write, write_line
from nanometa.config.checks import check, check_types
from nanometa.config.command_line import run_cli, run_named
from nanometa.studies.analysis import analyse, picture, picture_of_curves, table
from nanometa.studies.plan import read_plan
from nanometa.studies.queue import Queue, read_lines


@dataclass(frozen=True)
class StudySettings:
    """The plan and the file of its results."""

    plan: Positional[str] = ""
    """the plan, a TOML file"""
    size: str = ""
    """a name in [sizes] of the plan, to run a smaller version of the study; its lines go to a file of their own"""
    output: str = ""
    """file of the study's JSON lines; if empty, the one that the plan names"""

    def __post_init__(self):
        check_types(self)
        if not self.plan:
            raise UserError("plan is empty: name a plan, such as studies/meta_tokens.toml.")

    def lines(self, named: Path) -> Path:
        """Returns the file of lines. named: the file that the plan names."""
        return Path(self.output) if self.output else named


@dataclass(frozen=True)
class RunStudy(StudySettings):
    """Runs the cells of a plan that have no line yet."""

    out_dir: str = "out"
    """folder that contains the runs of the study, in a folder of its name"""
    workers: int = 1
    """number of cells that run side by side"""
    threads: int = 1
    """threads of every command"""
    minutes: float | None = None
    """stop after this time: running training runs save a checkpoint, and the next call continues; None = no limit"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("workers", "threads"):
            check(self, name, 1 <= getattr(self, name) <= 1024, "lie in 1 .. 1024")
        check(self, "minutes", self.minutes is None or self.minutes > 0, "be above 0, or None")


@dataclass(frozen=True)
class ReportStudy(StudySettings):
    """Prints the verdict table of a study and draws its figures, beside the file of its lines."""


def run(cfg: RunStudy) -> None:
    plan = read_plan(cfg.plan, cfg.size)
    limit = None if cfg.minutes is None else 60 * cfg.minutes
    Queue(plan, cfg.lines(plan.lines), Path(cfg.out_dir).absolute(), cfg.workers, cfg.threads, limit).run()


def report(cfg: ReportStudy) -> None:
    plan = read_plan(cfg.plan, cfg.size)
    path = cfg.lines(plan.lines)
    lines = read_lines(path, plan)
    if not lines:
        raise UserError(f"{path} has no lines yet: run python study.py run {cfg.plan} first.")
    results = analyse(plan, lines)
    text = table(plan, results)
    write(text)
    for target, content in (
        (path.with_name(f"{plan.name}.md"), text.encode()),
        (path.with_name(f"{plan.name}.png"), picture(plan, results)),
        (path.with_name(f"{plan.name}_curves.png"), picture_of_curves(plan, results)),
    ):
        if content is not None:
            write_atomically(target, content)
            write_line(str(target))


COMMANDS = {"run": (RunStudy, run), "report": (ReportStudy, report)}


def main(argv: list[str]) -> None:
    run_named(argv, COMMANDS, "command", __doc__)


if __name__ == "__main__":
    run_cli(main)
