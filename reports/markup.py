"""Builds HTML and text: tables, folded parts, formatted figures. Every string that is not Markup is escaped."""

import html
import math
import textwrap

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 920px; margin: 0 auto;
  padding: 0 14px 40px; overflow-wrap: anywhere }
h1 { font-size: 1.6em; margin: 1em 0 .3em }
h2 { font-size: 1.25em; margin: 2em 0 .4em; border-bottom: 1px solid #ccc }
h3 { font-size: 1.05em; margin: 1.4em 0 .3em }
p, li { max-width: 46em }
a { color: #0b57a4 }
code { font-size: .9em }
figure { margin: 0 16px 18px 0; display: inline-block; width: 400px; max-width: 100%; vertical-align: top;
  break-inside: avoid }
figure.wide { display: block; width: auto; margin-right: 0 }
img { width: 100%; height: auto; display: block }
.wide img { width: var(--natural); max-width: 100% }
figcaption, .small { font-size: 14px; color: #444 }
.small code { font-size: 1em }
.scroll { overflow: auto; max-height: min(80vh, 640px) }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: .5em 0 }
th, td { padding: .2em .55em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top;
  overflow-wrap: normal }
td { white-space: nowrap }
th { background: #f4f4f4; vertical-align: bottom }
th[scope=rowgroup] { white-space: nowrap }
thead th { position: sticky; top: 0; z-index: 1 }
tbody td:first-child { position: sticky; left: 0; background: #fff }
thead th:first-child { left: 0; z-index: 2 }
details { margin: .6em 0 }
summary { cursor: pointer; color: #0b57a4 }
.text, .long { text-align: left }
td.long { white-space: normal; min-width: 14em; max-width: 30em; overflow-wrap: anywhere }
.warn { border-left: 4px solid #d55e00; padding: .1em .8em; background: #fff6f0 }
@media screen and (min-width: 960px) {
  /* a table that needs more than the text has goes on over both margins */
  body > .scroll { position: relative; left: 50%; transform: translateX(-50%); width: max-content; min-width: 100%;
    max-width: calc(100vw - 40px); box-sizing: border-box }
  td.text { white-space: normal; min-width: 4.5em }
  .many { font-size: 13px }
  .many th, .many td { padding: .2em .35em }
  .many td.text { min-width: 3.6em }
}
@media screen and (max-width: 600px) {
  figure { margin-right: 0; width: 100% }
  .wide img { max-width: none }
  .overview { display: none }
  /* the first column stays in view and must leave room for the others */
  tbody td:first-child { white-space: normal; min-width: 5em; max-width: 9em }
}
@media print {
  @page { margin: 14mm }
  body { max-width: none; padding: 0; font-size: 10.5pt }
  h2, h3 { break-after: avoid }
  tr { break-inside: avoid }
  .scroll { overflow: visible; max-height: none }
  tbody td:first-child, thead th { position: static }
  .small, figcaption { font-size: 8pt }
  table { font-size: 7pt; max-width: 100% }
  th, td { padding: .15em .3em; white-space: normal }
  td { white-space: nowrap }
  td.text, td.long { min-width: 0; white-space: normal; overflow-wrap: anywhere }
  figure { width: 47%; margin-right: 2% }
}
"""


class Markup(str):
    """HTML written by this program, which is not escaped again."""


def escaped(value) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def document(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title><style>{CSS}</style></head><body>
{body}</body></html>
"""


def table(head: list[str], groups: dict[str, list[list]], text: tuple[int, ...], long: tuple[int, ...] = ()) -> Markup:
    """Returns a table that scrolls in its box. groups: rows by the heading above them, "" for none; `text`: columns
    that contain no numbers; `long`: columns whose lines may break."""
    kinds = [" class=long" if i in long else " class=text" if i in text else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escaped(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    body = ""
    for name, rows in groups.items():
        if name:
            body += f'<tr><th scope="rowgroup" class=text colspan="{len(head)}">{escaped(name)}</th></tr>\n'
        for row in rows:
            cells = (f"<td{kind}>{escaped(value)}</td>" for kind, value in zip(kinds, row, strict=True))
            body += f"<tr>{''.join(cells)}</tr>\n"
    many = " class=many" if len(head) > 14 else ""
    return Markup(
        f'<div class="scroll"><table{many}><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
    )


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


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def span(low: float, high: float) -> str:
    return f"{percent(low)} .. {percent(high)}"


def points(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{100 * value:+.1f}"


def p_value(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
