"""Assembles the page of a report: one HTML file that needs no scripts and no network. Its pictures are inline, and also
beside it as PNG files.

A section shows the lines of one kind and is built in a file of its own; report.py lists the sections."""

import base64
import re
from collections.abc import Callable
from typing import NamedTuple

from nanometa.reports.lines import trained_on
from nanometa.reports.markup import Markup, command_line, details, document, escaped, table

HASH = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")


class Section(NamedTuple):
    """The part of the page about lines of one kind."""

    kind: str  # value of "eval" or "probe" in the lines; in a run's folder they are in <kind>.jsonl
    check: Callable[[dict], None]  # raises ValueError for a line that the section cannot draw
    key: Callable[[dict], tuple]  # equal for lines of the same figure, of which only one counts (see most_texts)
    body: Callable[["Page", list[dict]], str]  # its HTML, with headings <h2 id=..>
    picture: Callable[[list[dict]], bytes] | None = None  # one PNG of all lines of a checkpoint, for probe.py
    table: Callable[[list[dict]], str] | None = None  # the table of these lines for a terminal


class Page:
    """The page under construction, with the pictures, files and numbered commands that its sections share."""

    def __init__(self, command: str, repeated: int = 0):
        self.command, self.repeated = command, repeated
        self.files: dict[str, bytes] = {}
        self.numbers: dict[str, int] = {}  # numbers of commands, in the order of their first mention

    def render(self, lines: list[dict], summary: str, body: str) -> dict[str, bytes]:
        """Returns the bytes of report.html and of its pictures by file name. The same lines give the same bytes.

        lines: all lines, for the table of runs; summary, body: HTML that was built with this page."""
        contents = [*re.findall(r'<h2 id="(\w+)">(.*?)</h2>', body), ("commands", "Commands")]
        links = " · ".join(f'<a href="#{name}">{title}</a>' for name, title in contents)
        again = (
            f'<p class="small">Lines that repeat a figure of the same run and weights: {self.repeated}. The line with '
            f"the most texts counts, or the last of those with equally many.</p>\n"
        )
        facts = details("All facts of the weights", runs_table(lines)) if lines else ""
        commands = "".join(f'<li id="command{n}">{command_line(command)}</li>\n' for command, n in self.numbers.items())
        page = f"""<h1>Results of the runs</h1>
{summary}{again if self.repeated else ""}<p class="small">{links}</p>
{body}<h2 id="commands">Commands</h2>
<p class="small">{command_line(self.command)}</p>
{facts}<ol class="small">{commands}</ol>"""
        # a name of a file may have bytes that are no text
        return {"report.html": document("nanoMeta report", page).encode(errors="backslashreplace"), **self.files}

    def picture(self, name: str, what: str, content: bytes, used: list[dict], note: str = "") -> str:
        """Returns a <figure> of a PNG, and keeps the PNG as a file. what: alternative text; used: lines whose n, seeds
        and machines the caption names."""
        self.files[name] = content
        machines = list(dict.fromkeys(line["machine"] for line in used if line.get("machine")))
        caption = escaped("; ".join(text for text in (note, footer(used), *machines, name) if text))
        image = f'<img alt="{escaped(what)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        return f'<figure>{image}<figcaption data-file="{escaped(name)}">{caption}</figcaption></figure>\n'

    def links(self, commands: list[str]) -> Markup:
        """Returns links to the commands, such as [1] [3]."""
        numbers = {self.numbers.setdefault(command, len(self.numbers) + 1) for command in commands}
        return Markup(" ".join(f'<a href="#command{n}">[{n}]</a>' for n in sorted(numbers)))


def runs_table(lines: list[dict]) -> str:
    """Returns a table of the weights that the lines are about."""
    rows = {}
    for line in lines:
        rows[line["run"], line["weights_sha256"], line["arm"]] = [
            line["run"], line["arm"], f"{line['parameters'] / 1e6:.2f}M", line["seed"], line["train_length"],
            ", ".join(map(str, line["train_placements"] or ())) or "text", line["settings"][:6], line["step"],
            ", ".join(trained_on(line)), origin(line), line["weights_sha256"][:8], line["commit"][:8],
            line["checkpoint"],
        ]  # fmt: skip
    head = ["run", "arm", "parameters", "seed", "train length", "trained with", "settings", "step", "on", "origin",
            "weights", "commit", "checkpoint"]  # fmt: skip
    return f"""<p class="small">Settings is a hash of all training settings except model, seed and folders. Origin
names the weights that a run started from and the text that these and the run itself have seen. Intervals are 95 %.</p>
{table(head, {"": list(rows.values())}, (0, 1, 5, 6, 8, 9, 10, 11, 12))}"""


def origin(line: dict) -> str:
    """Returns where a line's weights come from, in words."""
    if not (known := line.get("origin")):
        return "the line does not say"
    tokens, weights = known["content_tokens"], HASH.sub(r"\1", known["weights"])
    if tokens == 0:
        return f"{weights}; no text"
    many = "an uncounted number of content tokens" if tokens is None else f"{tokens:,} content tokens"
    return f"{weights}; {many} of {known['dataset']}"


def footer(lines: list[dict]) -> str:
    """Returns n and the seeds of the lines that a picture or figure summarizes."""
    n, seeds = sorted({line["n"] for line in lines if line.get("n")}), sorted({line["seed"] for line in lines})
    few = ", ".join(map(str, seeds)) if len(seeds) < 6 else f"{len(seeds)} from {seeds[0]} to {seeds[-1]}"
    if not n:
        return "n = 0" if any("n" in line for line in lines) else f"seed {few}"
    return f"n = {n[0]}{f' to {n[-1]}' if len(n) > 1 else ''}, seed {few}"
