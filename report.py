"""Puts what `eval.py tasks` measured on one page: the paper's Figure 1 and ours, accuracy by length, arms against each
other on the same texts, and every cell with its interval.

python report.py out/meta_128 out/meta_256 out/pause_128 --output=out/report
python report.py records/tasks/*.jsonl --margin=0.05 --effect=0.02
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from cli import load_config, run_cli
from config import UserError, check, check_types
from reports.lines import read
from reports.page import Page
from terminal import write


@dataclass(frozen=True)
class Report:
    """Run folders -> one self-contained HTML page with plots."""

    runs: Positional[tuple[str, ...]] = ()
    """folders of runs with a tasks.jsonl, or .jsonl files; the first arm named is the first of a difference"""
    output: str = "out/report"
    """folder for report.html and its pictures"""
    margin: float = 0.05
    """a difference between arms "does not hold" if its whole interval over seeds lies within +- this share"""
    effect: float = 0.0
    """it "holds" if the interval lies above this share; fix both before you look"""

    def __post_init__(self):
        check_types(self)
        check(self, "margin", 0 < self.margin < 1, "lie strictly between 0 and 1")
        check(self, "effect", 0 <= self.effect < 1, "be at least 0 and below 1")


def main(argv: list[str]) -> None:
    cfg = load_config(Report, argv)
    if not cfg.runs:
        raise UserError("runs is empty: name folders of runs that eval.py tasks has measured, such as out/meta_128.")
    lines, repeated = read(cfg.runs)
    command = " ".join(["report.py", *argv])
    files = Page(lines, repeated, command, cfg.effect, cfg.margin).render()
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
    write(f"{output / 'report.html'}\n")


if __name__ == "__main__":
    run_cli(main)
