"""Builds HTML and text: tables, folded parts, formatted figures. Every string that is not Markup is escaped."""

import html
import math
import textwrap
from pathlib import Path

STYLE_SHEET = Path(__file__).with_name("page.css")


class Markup(str):
    """HTML written by this program, which is not escaped again."""


def escaped(value) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def document(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title><style>
{STYLE_SHEET.read_text()}</style></head><body>
{body}</body></html>
"""


def table(head: list[str], groups: dict[str, list[list]], text: tuple[int, ...]) -> Markup:
    """Returns a table that scrolls in its box. groups: rows by the heading above them, "" for none; `text`: columns
    that contain no numbers."""
    kinds = [" class=text" if i in text else "" for i in range(len(head))]
    return Markup(f'<div class="scroll"><table>{_rows(head, groups, kinds)}</table></div>\n')


def first_table(head: list[str], rows: list[list], text: tuple[int, ...], minor: tuple[int, ...]) -> Markup:
    """Returns the table of the first screen, which fits a phone without scrolling. `minor`: columns that a phone does
    not show."""
    names = [f"{'text' * (i in text)} {'minor' * (i in minor)}".strip() for i in range(len(head))]
    kinds = [f' class="{name}"' if name else "" for name in names]
    return Markup(f'<table class="first">{_rows(head, {"": rows}, kinds)}</table>\n')


def _rows(head: list[str], groups: dict[str, list[list]], kinds: list[str]) -> str:
    top = "".join(f'<th scope="col"{kind}>{escaped(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    body = ""
    for name, rows in groups.items():
        if name:
            body += f'<tr><th scope="rowgroup" class=text colspan="{len(head)}">{escaped(name)}</th></tr>\n'
        for row in rows:
            cells = (f"<td{kind}>{escaped(value)}</td>" for kind, value in zip(kinds, row, strict=True))
            body += f"<tr>{''.join(cells)}</tr>\n"
    return f"<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody>"


def text_table(head: list[str], rows: list[list], text: tuple[int, ...]) -> str:
    """Returns a table for a terminal, without the columns that are empty. `text`: the columns aligned to the left."""
    cells = [[str(value) for value in row] for row in rows]
    shown = [i for i in range(len(head)) if any(row[i] for row in cells)]
    wide = {i: max(8, *(len(row[i]) for row in cells)) for i in shown}
    names = {i: textwrap.wrap(head[i], wide[i], break_long_words=False) for i in shown}
    height = max(map(len, names.values()))
    top = [[([""] * (height - len(names[i])) + names[i])[k] if i in names else "" for i in range(len(head))]
           for k in range(height)]  # fmt: skip
    wide = {i: max(len(row[i]) for row in [*top, *cells]) for i in shown}
    return "\n".join(
        "  ".join(row[i].ljust(wide[i]) if i in text else row[i].rjust(wide[i]) for i in shown).rstrip()
        for row in [*top, *cells]
    )


def details(name: str, content: str) -> Markup:
    """Returns content that is folded below its name until a reader opens it."""
    return Markup(f"<details><summary>{escaped(name)}</summary>\n{content}</details>\n")


def command_line(command: str) -> Markup:
    """Returns a command that can be pasted into a shell. A line breaks between its arguments, not inside them."""
    words = command.split(" ")
    words = ["python", *words] if words[0].endswith(".py") else words
    return Markup(f"<code>{' '.join(f'<span>{escaped(word)}</span>' for word in words)}</code>")


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def span(low: float, high: float) -> str:
    return f"{percent(low)} .. {percent(high)}"


def points(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{100 * value:+.1f}"


def p_value(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
