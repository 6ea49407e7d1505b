"""The section of eval.py weights: training windows as text, whose background shows the weights of the loss."""

from nanometa.reports.lines import NUMBER, check_facts
from nanometa.reports.markup import Markup, details, escaped
from nanometa.reports.page import Page, Section

ABOUT = """The background of a token shows its weight in the loss: none where it is 1 or less, darker up to five times
that. Struck tokens have no weight. A token's title names its weight and its nats with the whole context and with a
short one."""


def check(line: dict) -> None:
    """Raises ValueError for a line that the section cannot show."""
    check_facts(line, {"weighting": (str,), "scorer": (str,), "window": (int,), "dataset": (str,), "tokens": (list,)})
    columns = [line.get(name) for name in ("weights", "long", "short", "markers")]
    if not all(isinstance(column, list) and len(column) == len(line["tokens"]) for column in columns):
        raise ValueError("its columns differ in length")
    if not all(isinstance(token, str) for token in line["tokens"]):
        raise ValueError("a token is no text")
    if not all(value is None or type(value) in NUMBER for column in columns[:3] for value in column):
        raise ValueError("a weight or a loss is no number")


def cell(line: dict) -> tuple:
    """Returns a key that is equal for lines of the same figure."""
    return tuple(line[name] for name in ("run", "weights_sha256", "weighting", "scorer", "window", "dataset"))


def body(page: Page, lines: list[dict]) -> str:
    """Returns the HTML of the section."""
    texts = "".join(
        details(
            f"{line['run']}: {line['weighting']}, scored by {line['scorer']}, window {line['window']}",
            f'<p class="weights">{text(line)}</p><p class="small">{page.links([line["command"]])}</p>\n',
        )
        for line in lines
    )
    return f"""<h2 id="weights">Weights of the loss</h2>
<p class="small">{escaped(" ".join(ABOUT.split()))}</p>
{texts}"""


def text(line: dict) -> Markup:
    """Returns the tokens of a line with their weights as backgrounds."""
    parts = []
    for token, weight, long, short in zip(
        *(line[name] for name in ("tokens", "weights", "long", "short")), strict=True
    ):
        shown = str(escaped(token)).replace("\n", "⏎<br>")
        if weight is None:
            parts.append(f"<small>{shown}</small>")
            continue
        title = f"weight {weight:.2f}, {long:.2f} nats" + ("" if short is None else f", short {short:.2f}")
        share = min(1.0, max(0.0, (weight - 1) / 4))
        style = f"background:rgba(213,94,0,{share:.2f})" + (";text-decoration:line-through" if weight == 0 else "")
        parts.append(f'<span title="{escaped(title)}" style="{style}">{shown}</span>')
    return Markup("".join(parts))


SECTION = Section("weights", check, cell, body)
