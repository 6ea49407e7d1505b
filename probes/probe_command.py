"""Runs a probe from its settings to its picture: measures cell by cell, prints a table, appends lines to a file, and
draws all lines of the file that are about the same weights."""

from collections.abc import Callable
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import read_json_lines, write_atomically
from nanometa.common.terminal import BOLD, write, write_line
from nanometa.evals.common import write_lines
from nanometa.evals.tasks import about, answered, cell_name, doubt
from nanometa.probes.marked_texts import MarkedTextsProbe, judged
from nanometa.reports.probe_sections import SECTIONS
from nanometa.reports.table_sections import latest
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run


def run_probe(
    cfg: MarkedTextsProbe,
    name: str,
    run: Run,
    facts: dict,
    cells: list[tuple[Maker, str, int]],
    claims: dict[str, str],
    measure: Callable[[MarkedTextsProbe, Run, Maker, str, int], list[dict]],
    judge: Callable[..., list[dict]] = judged,
    preface: str = "",
    alike: dict | None = None,
) -> None:
    """Measures all cells, judges their lines together, and prints, saves and draws them. The settings and the cells
    are already checked; only a damaged output file is refused here, before anything is measured.

    claims: the figures that get verdicts, as in `judged`. measure: returns the lines of a cell, without the fields that
    every line has. judge: used in place of `judged`. preface: text to print first. alike: fields in which earlier
    lines must have these values, in addition to the same arm and weights, to be drawn too."""
    output = cfg.lines(run, name)
    same = {"arm": facts["arm"], "weights_sha256": facts["weights_sha256"], **(alike or {})}
    before = read_earlier_lines(output, name, same)
    write_line(f"{facts['arm']}, {run.folder}", BOLD)
    write(preface)
    with cfg.autocast(run):
        learned = [(maker, length, answered(run, maker, level, length, cfg.n)) for maker, level, length in cells]
        if warning := doubt(run, learned):
            write_line(warning, BOLD)
        lines = []
        for cell, (*_, answer) in zip(cells, learned, strict=True):
            shared = {**facts, "probe": name, **about(*cell), "answered": answer}
            write(f"{cell_name(shared)}\n")
            lines += [{**shared, **line} for line in measure(cfg, run, *cell)]
    if not lines:
        raise UserError("nothing is left to measure, for the reasons above: ask for other targets or states.")
    judge(lines, claims, cfg.effect, cfg.margin)
    # written only after all measurements, because Holm's p needs all of them
    write("\n".join(["", SECTIONS[name].table(lines), ""]))
    write_lines(output, lines)
    drawn = output.with_suffix(".png")
    write_atomically(drawn, draw_picture(name, latest(SECTIONS[name], before + lines)))
    write_line(str(output))
    write_line(str(drawn))


def read_earlier_lines(path: Path, name: str, same: dict) -> list[dict]:
    """Returns the lines in a file from earlier calls of the same probe that have the same values in the fields `same`.
    Raises UserError, naming the line, if one cannot be drawn, so that this is known before anything is measured."""

    def mine(line: dict) -> bool:
        return line.get("probe") == name and all(line.get(key) == value for key, value in same.items())

    def check(line: dict) -> None:
        if mine(line):
            SECTIONS[name].check(line)

    return [line for line in read_json_lines(path, check, "eval.py or probe.py") if mine(line)] if path.exists() else []


def draw_picture(name: str, lines: list[dict]) -> bytes:
    return SECTIONS[name].picture(lines)
