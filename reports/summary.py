"""Builds the first screen of the page: the runs, their main figures and the verdicts."""

from collections import Counter

from nanometa.common.statistics import brief
from nanometa.reports import drawing
from nanometa.reports.compare import between_arms, between_checkpoints
from nanometa.reports.lines import Arm, Panel, arms_of, impossible, panels_of, summary
from nanometa.reports.markup import Markup, escaped, percent, table
from nanometa.reports.page import Page, footer
from nanometa.reports.training import Metrics


def body(page: Page, lines: dict[str, list[dict]], runs: list[Metrics], effect: float, margin: float) -> str:
    """Returns the summary of the lines of each kind and of the runs; effect and margin are those of the verdicts."""
    return "".join([trained(lines, runs), answered(page, lines.get("tasks", [])), verdicts(lines, effect, margin)])


def trained(lines: dict[str, list[dict]], runs: list[Metrics]) -> str:
    """Returns a table with one row for each run: how it was trained, and the figures of its last evaluation."""
    rows: dict[str, list] = {}
    for line in (line for of in lines.values() for line in of):
        on = [line["trained_on"]] if isinstance(line["trained_on"], str) else line["trained_on"]
        rows[line["run"]] = [line["run"], line["arm"], ", ".join(map(str, on)), line["train_length"], line["seed"], ""]
    for run in runs:
        config, last = run.facts.get("config", {}), (run.final or run.val or [{}])[-1]
        on = ", ".join(run.tasks) or run.facts["data"].get("dataset", "")
        ends = [f"{task.replace('_', ' ')} {percent(last[f'exact_{task}'])} %" for task in run.tasks]
        ends += [f"{last['bits_per_byte']:.4f} bits per byte"] if "bits_per_byte" in last and not ends else []
        row = rows.setdefault(run.name, [run.name, "", on, "", config.get("seed", ""), ""])
        row[-1] = ", ".join(ends)
    head = ["run", "arm", "trained on", "train length", "seed", "end of training"]
    return table(head, {"": list(rows.values())}, (0, 1, 2, 5))


def answered(page: Page, lines: list[dict]) -> str:
    """Returns a table of the exact answers of every arm at its training length and at the longest length, and a picture
    of all lengths; "" without lines of eval.py tasks."""
    if not lines:
        return ""
    arms = arms_of(lines)
    panels = panels_of(arms)
    rows = [[arm.label, arm.training.length, *(_exact(arm, panel) for panel in panels)] for arm in arms]
    head = ["arm", "train length", *map(drawing.title, panels)]
    content = drawing.png(drawing.overview, arms, panels, footer(lines))
    picture = page.picture("overview.png", "exact answers by length, all tasks and placements", content, lines)
    return f"""<p>Exact answers in %, at the length of training → at the longest length:</p>
{table(head, {"": rows}, (0,))}<div class="overview">{picture}</div>"""


def _exact(arm: Arm, panel: Panel) -> str:
    """Returns the share at the length of training and at the longest length, "–" where it was not measured."""
    longest = max((length for at, length in arm.lines if at == panel), default=0)
    ends = (arm.lines.get((panel, length)) for length in (arm.training.length, longest))
    shares = ["–" if not of else "impossible" if impossible(of) else percent(summary(of)[0]) for of in ends]
    return f"{shares[0]} → {shares[1]} at {longest}" if longest else "–"


def verdicts(lines: dict[str, list[dict]], effect: float, margin: float) -> Markup:
    """Returns a list that says how often each verdict was reached, by claim; "" if nothing was judged."""
    counts: dict[str, Counter] = {}
    arms = arms_of(lines.get("tasks", []))
    rows = between_arms(arms, effect, margin) or between_checkpoints(arms)
    for row in rows:
        name = f"{row.first.label} is better than {row.second.label}"
        counts.setdefault(name, Counter())[brief(row.verdict or "not compared")] += 1
    for kind, of in lines.items():
        for line in of:
            for field in line:
                if field.endswith("verdict") and kind != "tasks":
                    claim = field.removesuffix("verdict").strip("_") or line.get("claim", "difference")
                    counts.setdefault(f"{kind.replace('_', ' ')}: {claim}", Counter())[brief(str(line[field]))] += 1
    items = "".join(
        f"<li>{escaped(name)}: {escaped(', '.join(f'{verdict} ({n})' for verdict, n in of.most_common()))}</li>\n"
        for name, of in counts.items()
    )
    return Markup(f"<p>Verdicts, and in how many cells each was reached:</p>\n<ul>{items}</ul>\n" if items else "")
