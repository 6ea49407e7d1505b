"""Runs a probe from its settings to its picture: measures cell by cell, prints a table, appends lines to a file, and
draws all lines of the file that are about the same weights."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.terminal import BOLD, write
from nanometa.evals.common import write_lines
from nanometa.evals.tasks import answered, doubt
from nanometa.probes.marked_texts import MarkedTextsProbe, judged
from nanometa.reports.probe_sections import SECTIONS
from nanometa.reports.table_sections import latest
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run


def run_probe(
    cfg: MarkedTextsProbe,
    name: str,
    placements: tuple[str, ...],
    claims: tuple[str, ...],
    measure: Callable[[Run, Maker, str, int], list[dict]],
    notes: Callable[[list[dict]], list[str]] = lambda lines: [],
) -> None:
    """Runs a probe whose lines have claims. placements: the placements read by default, if the run was trained with
    them; measure: a function that returns the lines of a cell; notes: sentences to print below the table."""
    run, facts = cfg.open()
    cells = cfg.makers(run, placements)

    def judge(measured: list[list[dict]]) -> list[dict]:
        return judged(list(itertools.chain(*measured)), claims, cfg.effect, cfg.margin)

    measure_cells(cfg, name, run, facts, cells, measure, judge, notes)


def measure_cells(
    cfg: MarkedTextsProbe,
    name: str,
    run: Run,
    facts: dict,
    cells: list[tuple[Maker, str, int]],
    measure: Callable[[Run, Maker, str, int], list[dict]],
    judge: Callable[[list[list[dict]]], list[dict]],
    notes: Callable[[list[dict]], list[str]] = lambda lines: [],
    preface: str = "",
) -> None:
    """Measures all cells, judges them together, and saves and prints the lines. The settings have been checked before.
    Only a damaged output file is still refused here, before anything is measured."""
    output = cfg.lines(run, name)
    before = read_earlier_lines(output, name, facts)
    write(f"{facts['arm']}, {run.folder}\n", BOLD)
    write(preface)
    with cfg.autocast(run):
        answers = warn_if_unlearned(run, cells, cfg.n)
        measured = [
            [{**line, "answered": answer} for line in measure(run, *cell)]
            for cell, answer in zip(cells, answers, strict=True)
        ]
    lines = [{**facts, **line} for line in judge(measured)]
    save(output, name, before, lines, notes(lines))


def warn_if_unlearned(run: Run, cells: list[tuple[Maker, str, int]], n: int) -> list[dict]:
    """Returns the result of `answered` for each cell, and first prints a warning if the run has not learned the
    task."""
    answered_by_cell = [answered(run, *cell, n) for cell in cells]
    write(
        doubt(run, [(maker, length, of) for (maker, _, length), of in zip(cells, answered_by_cell, strict=True)]), BOLD
    )
    return answered_by_cell


def read_earlier_lines(path: Path, name: str, facts: dict) -> list[dict]:
    """Returns the lines in a file from earlier calls of the same probe on the same weights, read in the same way.
    Raises UserError, naming the line, if one cannot be drawn, so that this is known before anything is measured."""
    out, rows = [], path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
            mine = line.get("probe") == name and all(line.get(key) == facts[key] for key in ("arm", "weights_sha256"))
            if mine:
                SECTIONS[name].check(line)
                out.append(line)
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is no line of eval.py or probe.py ({error}): remove it, or name another "
                f"--output."
            ) from None
    return out


def draw_picture(name: str, lines: list[dict]) -> bytes:
    return SECTIONS[name].picture(lines)


def save(output: Path, name: str, before: list[dict], lines: list[dict], notes: list[str]) -> None:
    """Prints the table, appends the lines to the file, and draws them together with those from `before`. Lines are
    written only after all measurements, because Holm's p needs all of them."""
    write("\n".join(["", SECTIONS[name].table(lines), *notes, ""]))
    write_lines(output, lines)
    drawn = output.with_suffix(".png")
    write_atomically(drawn, draw_picture(name, latest(SECTIONS[name], before + lines)))
    write(f"{output}\n{drawn}\n")
