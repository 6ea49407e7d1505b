"""Sections that are a picture, or a few, and a table: what probe.py looked at."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from reports.lines import check_facts
from reports.markup import escaped, table
from reports.page import Page, Section


class Column(NamedTuple):
    """Of a section's table."""

    name: str
    value: Callable[[dict], object]
    text: bool = False


def probe(
    kind: str,
    title: str,
    about: str,
    fields: dict[str, tuple],
    cell: tuple[str, ...],
    picture: Callable[[list[dict]], bytes],
    columns: tuple[Column, ...],
    panel: tuple[str, ...] = (),
    paper: Callable[[], bytes] | None = None,
) -> Section:
    """The section of a probe's lines.

    about: a paragraph of what it shows. fields: name -> types that a line must have. cell: the fields that tell lines
    of one call apart. picture: lines -> PNG, of all lines of one call that have the same `panel`. paper: the PNG of
    what the paper says of it."""

    def check(line: dict) -> None:
        check_facts(line, fields)

    def key(line: dict) -> tuple:
        return line["weights_sha256"], line["arm"], line["command"], *(line[name] for name in cell)

    def body(page: Page, lines: list[dict]) -> str:
        figures = [page.picture(f"{kind}_paper.png", f"{title}: the paper's figures", paper())] if paper else []
        calls: dict[tuple, list[dict]] = {}
        for line in lines:
            calls.setdefault((line["run"], line["weights_sha256"], line["arm"], line["command"]), []).append(line)
        groups: dict[str, list[list]] = {}
        for call in calls.values():
            first = call[0]
            name = f"{first['run']}: {first['arm']}, step {first['step']}"
            panels: dict[tuple, list[dict]] = {}
            for line in call:
                panels.setdefault(tuple(line[name] for name in panel), []).append(line)
            for of in panels.values():
                number = len(figures) + (not paper)
                what = f"{title}: {name}, as in the table below"
                figures.append(page.picture(f"{kind}_{number}.png", what, picture(of), of, note=name))
            rows = ([column.value(line) for column in columns] + [page.links([line["command"]])] for line in call)
            groups.setdefault(name, []).extend(rows)
        head = [*(column.name for column in columns), "command"]
        texts = tuple(itertools.compress(range(len(head)), [*(column.text for column in columns), True]))
        return f"""<h2 id="{kind}">{escaped(title)}</h2>
<p>{escaped(about)}</p>
<div>{"".join(figures)}</div>
{table(head, groups, texts)}"""

    return Section(kind, check, key, body)
