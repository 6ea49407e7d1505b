"""Builds the section of eval.py tasks: accuracy by length, differences between arms, all cells, and the paper's
Figure 1."""

from nanometa.common.statistics import wilson
from nanometa.reports.compare import SEEDS, Difference, between_arms, between_checkpoints
from nanometa.reports.drawing import png
from nanometa.reports.lines import (
    Arm,
    Panel,
    apart,
    arms_of,
    check,
    impossible,
    key,
    panels_of,
    share_interval,
    summary,
)
from nanometa.reports.markup import Markup, details, escaped, p_value, percent, points, span, table
from nanometa.reports.page import Page, Section, footer
from nanometa.reports.paper import FIGURE_1, LENGTH, NOTES, SOURCE, TABLE_1, TABLE_1_SOURCE, WINDOW
from nanometa.reports.task_pictures import accuracy, title


def section(effect: float, margin: float) -> Section:
    def body(page: Page, lines: list[dict]) -> str:
        arms = arms_of(lines)
        own = pictures(page, arms) + differences(arms, lines, effect, margin) + cells(page, arms)
        return own + paper(arms) + longer_windows(lines)

    return Section("tasks", check, key, body)


def pictures(page: Page, arms: list[Arm]) -> str:
    """Returns one picture for each task, level and question, with a panel for each placement."""
    figures = []
    for panels in apart(panels_of(arms), lambda panel: panel._replace(placement="")):
        used = [line for arm in arms for (at, _), of in arm.lines.items() if at in panels for line in of.values()]
        first = panels[0]
        name = f"accuracy_{first.task}_{first.level}_{first.question}"
        what = f"{title(first._replace(placement='all placements'))}: exact answers by length"
        figures.append(page.picture(f"{name}.png", what, png(accuracy, arms, panels, footer(used)), used))
    return f"""<h2 id="accuracy">Tasks: accuracy by evaluation length</h2>
<div>{"".join(figures)}</div>
<p class="small">An answer is exact if greedy decoding produces all of it. Panels show placements of the markers. Bars
are Wilson's interval over texts; with several seeds they reach from the lowest to the highest seed, the line is their
mean and the small dots are the seeds. The thin grey line is the best shortcut that does not read the whole text. A
cross in the strip below 0 means that the model cannot read texts of that length. Runs of the same arm and settings
count as seeds of one arm; two runs with the same seed are separate arms.</p>
"""


def differences(arms: list[Arm], lines: list[dict], effect: float, margin: float) -> str:
    """Returns the comparisons of arms over seeds, and of single checkpoints."""
    checkpoints, by_seed = between_checkpoints(arms), between_arms(arms, effect, margin)
    head = '<h2 id="differences">Tasks: differences between arms</h2>\n'
    if not checkpoints:
        return f"{head}<p>No two arms of equal training share a cell.</p>\n"
    started = {tuple(line.get("origin", {}).get(name) for name in ("train_sha256", "content_tokens")) for line in lines}
    warning = """<p class="warn">The runs were not all pretrained on the same text for equally long, or some lines
do not record it (see origin in the table of weights), so a difference between arms may come from their pretraining.</p>
"""
    over_seeds = f"""{difference_table(by_seed)}
<p class="small">Student's t over pairs of equal seed. The claim is that the first arm is better than the second by more
than {percent(effect)} points. It <b>holds</b> if the interval lies above that, and p, after Holm's correction over all
rows with {SEEDS} seeds or more, is below 0.05; the reverse holds if the second is better by as much. It
<b>does not hold</b> if the whole interval lies within the margin, ±{percent(margin)} points. Otherwise, and with fewer
than {SEEDS} seeds, it is <b>undecided</b>. All seeds answer the same texts, so the interval does not cover other texts.
Effect, margin and the cells to compare must be fixed before looking at results.</p>
"""
    single = f"""<p class="warn">These rows are about two checkpoints, not their arms, and are
undecided with fewer than {SEEDS} seeds: trained again with another seed, the checkpoints would differ in another way.
</p>
<p class="small">Newcombe's interval for paired texts, McNemar's exact test, and its p after Holm's correction over all
rows.</p>
{difference_table(checkpoints)}"""
    return f"""{head}{warning if len(started) > 1 or (None, None) in started else ""}
<p>Differences are the first arm minus the second, in points. Arms are compared if they had the same training, in the
same cell and on the same texts.</p>
{over_seeds if by_seed else ""}{details("All differences between single checkpoints", single)}"""


def difference_table(rows: list[Difference]) -> str:
    head = ["length", "train length", "first", "second", "difference", "95 %", "verdict", "p", "Holm", "n", "seed"]
    groups: dict[str, list] = {}
    for row in rows:
        out = groups.setdefault(title(row.panel), [])
        n = row.first.lines[row.panel, row.length][row.seeds[0]]["n"] if row.seeds else ""
        where = [row.length, row.first.training.length, row.first.label, row.second.label]
        seeds = ", ".join(map(str, row.seeds))
        if row.refused:
            out.append([*where, "", "", f"not compared: {row.refused}", "", "", "", seeds])
            continue
        interval = f"{points(row.low)} .. {points(row.high)}"
        out.append([*where, points(row.mean), interval, row.verdict, p_value(row.p), p_value(row.holm), n, seeds])
    return table(head, groups, (2, 3, 6))


def cells(page: Page, arms: list[Arm]) -> Markup:
    """Returns the folded table of all figures."""
    groups = {}
    for panel in panels_of(arms):
        rows = groups[title(panel)] = []
        for arm in arms:
            for length in sorted(length for at, length in arm.lines if at == panel):
                for line in arm.lines[panel, length].values():
                    window = line.get("original_block_size") or ""  # lines of the first versions lack it
                    where = [length, f"{length / window:.3g}x" if window else "", arm.label, arm.training.length]
                    where += [line["seed"], *_figures(line), line["n"], page.links([line["command"]])]
                    rows.append([*where, _shortcuts(line)])
    head = ["length", "of the window", "arm", "train length", "seed", "exact, %", "95 %", "tokens, %", "95 %", "nats",
            "chance, %", "n", "command", "shortcuts, %"]  # fmt: skip
    about = """<p class="small">Exact answers with Wilson's interval (a format failure is a right answer without
its line end, which is not exact), tokens of the answers with a bootstrap interval
over texts, nats of a whole answer, and the share that each shortcut answers correctly, with Wilson's interval.</p>
"""
    return details("Tasks: all cells", about + table(head, groups, (2, 12, 13)))


def _figures(line: dict) -> list[str]:
    if "impossible" in line:
        return ["impossible", "", "", "", "", ""]
    failures = f" ({line['format_failures']} format failures)" if line.get("format_failures") else ""
    exact = [percent(line["exact"]) + failures, span(*wilson(line["correct"], line["n"]))]
    tokens = [percent(line["token_accuracy"]), span(*line["token_interval"])]
    return [*exact, *tokens, f"{line['nats']:.3f}", percent(line["chance"])]


def _shortcuts(line: dict) -> str:
    """Returns the shares of the shortcuts, the best one first, or the reason why the cell is impossible."""
    if "impossible" in line:
        return line["impossible"]
    floors = sorted(line["floors"].items(), key=lambda item: -item[1])
    return "; ".join(f"{percent(share)} ({span(*share_interval(share, line['n']))}) {name}" for name, share in floors)


def paper(arms: list[Arm]) -> str:
    """Returns the folded table of the paper's Figure 1 and of our arms that are comparable with it."""
    groups, labels = {}, list(dict.fromkeys(arm.label for arm in arms))
    for panel in panels_of(arms):
        comparable = [arm for arm in arms if like_paper(arm, panel)]
        theirs = FIGURE_1[panel.task]
        lengths = {n for model in theirs.values() for n in model} | {arm.training.length for arm in comparable}
        for length in sorted(lengths) if comparable else ():
            ours = {arm.label: cell_text(arm.lines[panel, LENGTH]) for arm in comparable
                    if arm.training.length == length}  # fmt: skip
            row = [
                length,
                *(ours.get(label, "–") for label in labels),
                *(of.get(length, "–") for of in theirs.values()),
            ]
            groups.setdefault(title(panel), []).append(row)
    if not groups:
        return ""
    head = ["train length", *(f"ours: {label}" for label in labels), *(f"paper: {of}" for of in FIGURE_1["parity"])]
    notes = "".join(f"<li>{escaped(note)}</li>\n" for note in NOTES)
    about = f"""<p class="warn">The paper's n is unknown, probably 28 to 84. Model sizes and budgets differ, so compare
the order of the arms, not the heights.</p>
{table(head, groups, tuple(range(1, 1 + len(labels))))}
<p class="small">Accuracy in % at evaluation length {LENGTH}, by the longest texts in
fine-tuning (train length). Our runs were fine-tuned on the task and evaluated with markers where the task points
("target"), like the paper's. Source: {escaped(SOURCE)}.</p>
<ul class="small">{notes}</ul>
"""
    return details("Tasks: ours beside the paper's Figure 1", about)


def longer_windows(lines: list[dict]) -> str:
    """Returns the folded Table 1 of the paper if some of the lines were read with an extended window."""
    if all(line.get("scaling", "none") == "none" for line in lines):
        return ""
    rows = [[f"{extended}x", f"{tuned}x", *of.values()] for (extended, tuned), of in TABLE_1.items()]
    head = ["extended by YaRN to", "fine-tuned at", *(f"evaluated at {x}x" for x in TABLE_1[4, 2])]
    about = f"""{table(head, {"": rows}, ())}<p class="small">Token accuracy in % in list recall with markers where the
task points. Lengths are multiples (x) of the window before extension, {WINDOW}, like those in the table of all cells.
Source: {escaped(TABLE_1_SOURCE)}.</p>
"""
    return details("Tasks: the paper's Table 1, list recall in longer windows", about)


def like_paper(arm: Arm, panel: Panel) -> bool:
    """Returns whether an arm is comparable with the paper's: fine-tuned on the panel's task, evaluated with markers
    where the task points as in training, and measured at the paper's length."""
    trained = panel.task in arm.training.on and panel.placement == "target" in arm.training.placements
    return trained and (panel, LENGTH) in arm.lines


def cell_text(of: dict[int, dict]) -> str:
    """Returns the text of one cell of an arm in a table."""
    if impossible(of):
        return "impossible"
    mean, low, high = summary(of)
    return f"{percent(mean)} ({span(low, high)}; {footer(list(of.values()))})"
