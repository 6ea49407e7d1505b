"""Builds one page about runs: their training and its cost, and what eval.py and probe.py measured. A section appears if
there are lines for it.

python report.py out/meta_128 out/meta_256 out/pause_128 --output=out/report
python report.py records/2026-11-22_three_arms/tasks.jsonl --margin=0.05 --effect=0.02
python report.py curves out/meta_128 out/pause_128 --output=curves.png        # only the curves, as a picture
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.terminal import write_line
from nanometa.config.checks import check, check_types, similar_name
from nanometa.config.command_line import load_config, run_cli
from nanometa.reports import compression, curves, depth, longppl, summary, tasks, training, weights
from nanometa.reports.files import Found, read
from nanometa.reports.page import Page, Section
from nanometa.reports.probe_sections import SECTIONS

# Evaluations that the page does not show. tests/test_report.py fails for an evaluation that has no section and is not
# listed here.
NO_SECTION = ("nats", "passkey")


@dataclass(frozen=True)
class Report:
    """Turns run folders into one self-contained HTML page with plots. `report.py curves RUN...` only draws their
    curves; it has its own --help."""

    runs: Positional[tuple[str, ...]] = ()
    """folders of runs, or .jsonl files of eval.py and probe.py; in differences, arms named later are subtracted from
    arms named earlier"""
    output: str = "out/report"
    """folder for report.html and its pictures; pictures of an earlier report there are removed"""
    margin: float = 0.05
    """a difference between arms "does not hold" if its whole interval over seeds lies within +- this share"""
    effect: float = 0.0
    """a difference "holds" if its interval lies above this share; choose effect and margin before you look at
    results"""

    def __post_init__(self):
        check_types(self)
        check(self, "margin", 0 < self.margin < 1, "lie strictly between 0 and 1")
        check(self, "effect", 0 <= self.effect < 1, "be at least 0 and below 1")


def main(argv: list[str]) -> None:
    if argv[:1] == ["curves"]:
        return curves.main(argv[1:])
    if argv and not Path(argv[0]).exists() and similar_name(argv[0], ["curves"]):
        raise UserError(f"there is no folder or command {argv[0]}: did you mean 'curves'?")
    cfg = load_config(Report, argv)
    if not cfg.runs:
        raise UserError("runs is empty: name folders of runs, such as out/meta_128.")
    sections = sections_of(cfg.effect, cfg.margin)
    found = read(cfg.runs, sections)
    files = render(found, sections, shlex.join(["report.py", *argv]), cfg.effect, cfg.margin)
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    for old in pictures_of(output / "report.html") - files.keys():
        (output / old).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(output / name, content)
    write_line(str(output / "report.html"))


def sections_of(effect: float, margin: float) -> list[Section]:
    """Returns the sections of all evaluations and probes, in the order of the page."""
    shown = (depth.SECTION, compression.SECTION, longppl.SECTION, weights.SECTION, *SECTIONS.values())
    return [tasks.section(effect, margin), *shown]


def render(
    found: Found, sections: list[Section], command: str, effect: float = 0.0, margin: float = 0.05
) -> dict[str, bytes]:
    """Returns the bytes of report.html and of its pictures by file name.

    Raises UserError if lines of one kind do not fit together."""
    page = Page(command, found.repeated)
    body = training.curves(page, found.runs) if found.runs else ""
    for section in sections:
        if lines := found.lines.get(section.kind):
            try:
                body += section.body(page, lines)
            except ValueError as error:
                raise UserError(
                    f"the lines of {section.kind} cannot be shown together ({error}): report on fewer files."
                ) from error
    everything = [line for of in found.lines.values() for line in of]
    return page.render(everything, summary.body(found.lines, found.runs, effect, margin), body)


def pictures_of(page: Path) -> set[str]:
    """Returns the names of the pictures that belong to a page, none if there is no page."""
    text = page.read_text(errors="replace") if page.is_file() else ""
    return set(re.findall(r'data-file="([\w-]+\.png)"', text))


if __name__ == "__main__":
    run_cli(main)
