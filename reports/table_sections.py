"""Builds the section of a probe: pictures and a table for the page, and one picture and a table for probe.py."""

import itertools
from collections.abc import Callable, Container
from typing import NamedTuple

from matplotlib.figure import Figure

from nanometa.common.statistics import DECIDES, brief, too_few
from nanometa.reports.drawing import png, run_title, tiled
from nanometa.reports.lines import apart, check_choices, check_facts, has_learned, most_texts
from nanometa.reports.markup import Markup, details, escaped, p_value, table, text_table
from nanometa.reports.page import Page, Section


class Column(NamedTuple):
    """A column of a section's table."""

    name: str
    value: Callable[[dict], object]
    text: bool = False


WHERE = (
    Column("task", lambda line: line["task"].replace("_", " "), text=True),
    Column("markers", lambda line: line["placement"], text=True),
    Column("length", lambda line: line["length"]),
)


def claim(name: str, value: str, show: Callable[[float], str], prefix: str | None = None) -> tuple[Column, ...]:
    """Returns the columns of a figure with a verdict: the figure, its interval, Holm's p and the verdict. They are
    empty where a line lacks the field. The field names of Holm's p and the verdict begin with `prefix`, by default the
    figure's name."""
    of = f"{value}_" if prefix is None else prefix
    return (
        Column(name, lambda line: show(line[value]) if value in line else ""),
        Column("95 %", lambda line: " .. ".join(map(show, line.get(f"{value}_interval", ())))),
        Column("Holm", lambda line: p_value(line.get(f"{of}holm"))),
        Column("verdict", lambda line: brief(line.get(f"{of}verdict", "")), text=True),
    )


def probe(
    kind: str,
    title: str,
    about: str,
    fields: dict[str, tuple],
    cell: tuple[str, ...],
    draw: Callable[[Figure, list[dict]], None],
    columns: tuple[Column, ...],
    panel: tuple[str, ...],
    choices: dict[str, Container[str]] | None = None,
    row: tuple[str, ...] = (),
    optional: dict[str, tuple] | None = None,
    verdicts: bool = True,
) -> Section:
    """Returns the section of a probe.

    about: paragraph that explains it. fields: types that a line must have, by name; optional: types of the fields that
    only some lines have; choices: allowed values, by field.
    cell: fields that distinguish lines about the same weights. draw: draws lines with equal `panel` fields. row: if
    one row of the table summarizes several lines, the fields that distinguish the rows; a row then contains its lines
    as `lines`. verdicts: whether some lines have a verdict if their texts suffice."""

    def check(line: dict) -> None:
        check_facts(line, fields, optional)
        check_choices(line, choices or {})

    def key(line: dict) -> tuple:
        return *weights_of(line), *(line[name] for name in cell)

    def body(page: Page, lines: list[dict]) -> str:
        means_first = sorted(lines, key=lambda line: line.get("layer", 0) is not None)
        return section_body(page, kind, title, about, lines, panel, draw,
                            rows(page, means_first, columns, row, verdicts))  # fmt: skip

    return Section(
        kind, check, key, body,
        picture=lambda lines: checkpoint_picture(lines, panel, draw),
        table=lambda lines: terminal_table(merged(lines, row), columns, verdicts),
    )  # fmt: skip


def section_body(
    page: Page, kind: str, title: str, about: str, lines: list[dict], panel: tuple[str, ...], draw, tables: str
) -> str:
    """Returns the HTML of a section: one picture for each group of lines about the same weights with equal `panel`
    fields, the paragraph that explains them, and the folded tables."""
    figures = []
    for number, of in enumerate(apart(lines, lambda line: (weights_of(line), fields_of(panel)(line))), 1):
        which = f"{_name(of[0])}; {', '.join(str(of[0][name]).replace('_', ' ') for name in panel)}"
        figures.append(page.picture(f"{kind}_{number}.png", f"{title}: {which}", png(draw, of), of, note=which))
    return f"""<h2 id="{kind}">{escaped(title)}</h2>
{unlearned(lines)}<div>{"".join(figures)}</div>
<p class="small">{escaped(about)}</p>
{details("All lines", tables)}"""


def merged(lines: list[dict], row: tuple[str, ...]) -> list[dict]:
    """Merges lines with equal `row` fields into one line, which contains the group as `lines`. Without `row`, returns
    the lines unchanged."""
    return [{**of[0], "lines": of} for of in apart(lines, fields_of(row))] if row else lines


def checkpoint_picture(lines: list[dict], panel: tuple[str, ...], draw: Callable[[Figure, list[dict]], None]) -> bytes:
    """Returns one PNG of the lines of a checkpoint, with all its panels."""
    return tiled(run_title(lines), [png(draw, of) for of in apart(lines, fields_of(panel))])


def terminal_table(lines: list[dict], columns: tuple[Column, ...], verdicts: bool = True) -> str:
    """Returns text for a terminal: a table of the lines with a block for each level and mark, and the meaning of the
    verdicts, if there can be any."""
    texts, out = tuple(i for i, column in enumerate(columns) if column.text), []
    for of in apart(lines, lambda line: (line["level"], line.get("mark"))):
        mark = f", mark: {of[0]['mark']}" if "mark" in of[0] else ""
        rows = [[column.value(line) for column in columns] for line in of]
        out += [f"level {of[0]['level']}{mark}", text_table([column.name for column in columns], rows, texts)]
    last = lines[-1]
    if "comparisons" in last:
        out.append(f"Verdicts say whether a figure is above {last['effect']:g}. The margin is {last['margin']:g}. "
                   f"Holm's p is over {last['comparisons']} comparisons, all of this checkpoint.")  # fmt: skip
    return "\n".join(filter(None, [*out, too_few(lines) if verdicts else ""]))


def unlearned(lines: list[dict]) -> Markup:
    """Returns a warning that names the runs that have not learned their task, or "" if all have."""
    weak = {f"{line['run']} ({line['task'].replace('_', ' ')}, {line['placement']}, {line['length']})": None
            for line in lines if not has_learned(line)}  # fmt: skip
    if not weak:
        return Markup("")
    names = escaped("; ".join(weak))
    return Markup(
        f'<p class="warn">These runs answer no better than chance or a shortcut, so verdicts say nothing about how the '
        f"task is solved: {names}.</p>\n"
    )


def weights_of(line: dict) -> tuple:
    """Returns a key that is equal for lines about the same weights, read in the same way."""
    return line["run"], line["weights_sha256"], line["arm"]


def latest(section: Section, lines: list[dict]) -> list[dict]:
    """Returns one line for each cell from several calls on the same weights (see most_texts)."""
    return most_texts(lines, section.key)


def fields_of(names: tuple[str, ...]) -> Callable[[dict], tuple]:
    return lambda line: tuple(line[name] for name in names)


def layers_where(lines: list[dict], claim: str) -> str:
    """Returns text that lists the layers in which a claim holds, and those in which its reverse holds. A line about all
    layers at once has the layer None."""
    judged = [line for line in lines if f"{claim}_verdict" in line]
    if not judged:
        return ""
    if all(line["n"] < DECIDES for line in judged):
        return "undecided"
    holds, reverse = (
        " ".join(
            "all" if line["layer"] is None else str(line["layer"])
            for line in judged
            if line[f"{claim}_verdict"].startswith(verdict)
        )
        for verdict in ("holds", "the reverse")
    )
    return (holds or "none") + (f"; the reverse: {reverse}" if reverse else "")


def rows(
    page: Page, lines: list[dict], columns: tuple[Column, ...], row: tuple[str, ...] = (), verdicts: bool = True
) -> Markup:
    """Returns a table of the lines below the names of their runs, with one row for each line, or for each group of
    lines of a run with equal `row` fields. verdicts: a note says which lines have too few texts for a verdict."""
    groups = {}
    for of in apart(lines, weights_of):
        groups[_name(of[0])] = [
            [*(column.value(line) for column in columns), page.links([line["command"]])] for line in merged(of, row)
        ]
    head = [*(column.name for column in columns), "command"]
    texts = tuple(itertools.compress(range(len(head)), [*(column.text for column in columns), True]))
    few = too_few(lines) if verdicts else ""
    return Markup(table(head, groups, texts) + (f'<p class="small">{escaped(few)}</p>\n' if few else ""))


def _name(line: dict) -> str:
    return f"{line['run']}: {line['arm']}, step {line['step']}"
