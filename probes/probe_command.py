"""What a call of probe.py does, whatever it looks at: warns, measures cell by cell, appends lines, and draws a picture
of all that the file holds of the same weights."""

import json
from collections.abc import Callable
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.statistics import brief
from nanometa.common.terminal import BOLD, write
from nanometa.evals.common import write_lines
from nanometa.evals.tasks import answered, doubt
from nanometa.probes.marked_texts import MarkedTextsProbe, judged
from nanometa.reports.probe_sections import SECTIONS
from nanometa.reports.table_sections import latest
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run

SMALL = "(small)"


def run_probe(
    cfg: MarkedTextsProbe,
    name: str,
    placements: tuple[str, ...],
    claims: tuple[str, ...],
    measure: Callable[[Run, Maker, str, int], list[dict]],
    table: Callable[[list[dict]], str],
    picture: Callable[[list[dict]], bytes],
) -> None:
    """Runs a probe of marked texts from its settings to its picture. placements: those asked by default if the run was
    trained with them; measure: returns the lines of a cell."""
    run, facts = cfg.open()
    cells = cfg.makers(run, placements)  # what cannot be answered_by_cell is refused by here
    output = cfg.lines(run, name)
    before = read_earlier_lines(output, name, facts)
    write(f"{facts['arm']}, {run.folder}\n", BOLD)
    lines: list[dict] = []
    with cfg.autocast(run):
        answered_by_cell = warn_if_unlearned(run, cells, cfg.n)
        for cell, of in zip(cells, answered_by_cell, strict=True):
            lines += [{**line, "answered": of} for line in measure(run, *cell)]
    lines = [{**facts, **line} for line in judged(lines, claims, cfg.effect, cfg.margin)]
    write(f"\n{table(lines)}\n{save_lines_and_picture(output, name, before, lines, picture)}")


def warn_if_unlearned(run: Run, cells: list[tuple[Maker, str, int]], n: int) -> list[dict]:
    """Returns what the run `answered` in each cell, and warns first if it has not learned the task."""
    answered_by_cell = [answered(run, *cell, n) for cell in cells]
    write(
        doubt(run, [(maker, length, of) for (maker, _, length), of in zip(cells, answered_by_cell, strict=True)]), BOLD
    )
    return answered_by_cell


def read_earlier_lines(path: Path, name: str, facts: dict) -> list[dict]:
    """The lines of a file that calls of the same probe wrote of the same weights, read in the same way. Raises
    UserError, naming the line, if one cannot be drawn: better now than when all is measured."""
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


def short_verdict(verdict: str) -> str:
    """A verdict in a table on a terminal."""
    return brief(verdict).replace(", within the margin", f" {SMALL}")


def save_lines_and_picture(
    output: Path, name: str, before: list[dict], lines: list[dict], picture: Callable[[list[dict]], bytes]
) -> str:
    """Appends the lines, at the end, since Holm's p needs all of them, and draws them with those from `before` -> the
    names of both files, for a person."""
    write_lines(output, lines)
    drawn = output.with_suffix(".png")
    write_atomically(drawn, picture(latest(SECTIONS[name], before + lines)))
    return f"{output}\n{drawn}\n"
