"""Builds the section of eval.py tasks: accuracy by length, differences between arms, the paper's Figure 1, all
cells."""

from nanometa.common.statistics import wilson
from nanometa.reports import drawing
from nanometa.reports.compare import SEEDS, Difference, between_arms, between_checkpoints
from nanometa.reports.lines import (
    CHOICES,
    Arm,
    Panel,
    arms_of,
    check,
    impossible,
    key,
    panels_of,
    share_interval,
    summary,
)
from nanometa.reports.markup import details, escaped, p_value, percent, points, span, table
from nanometa.reports.page import Page, Section, footer
from nanometa.reports.paper import FIGURE_1, LENGTH, NOTES, SOURCE


def section(effect: float, margin: float) -> Section:
    return Section("tasks", check, key, lambda page, lines: Tasks(page, lines, effect, margin).render())


class Tasks:
    """The HTML of the section, by subsections."""

    def __init__(self, page: Page, lines: list[dict], effect: float, margin: float):
        self.page, self.lines, self.effect, self.margin = page, lines, effect, margin
        self.arms = arms_of(lines)
        self.panels = panels_of(self.arms)
        self.checkpoints, self.by_seed = between_checkpoints(self.arms), between_arms(self.arms, effect, margin)

    def render(self) -> str:
        return "".join([self.accuracy(), self.differences(), self.paper(), self.cells()])

    def picture(self, name: str, what: str, used: list[dict], draw, *args) -> str:
        return self.page.picture(name, what, drawing.png(draw, *args, footer(used)), used)

    def paper(self) -> str:
        figures, groups = [], {}
        labels = list(dict.fromkeys(arm.label for arm in self.arms))
        for task, theirs in FIGURE_1.items():
            comparable = {panel: like_paper(self.arms, panel) for panel in self.panels if panel.task == task}
            comparable = {panel: arms for panel, arms in comparable.items() if arms}
            for panel, arms in (comparable or {Panel(task, "target", "hard", "index"): []}).items():
                name = drawing.title(panel)
                used = [line for arm in arms for line in arm.lines[panel, LENGTH].values()]
                what = f"{name}: accuracy by train length, the paper's and ours, as in the table below"
                args = (drawing.beside_paper, self.arms, arms, panel)
                figures.append(self.picture(f"paper_{file_name(panel)}.png", what, used, *args))
                lengths = {n for model in theirs.values() for n in model} | {arm.training.length for arm in arms}
                for length in sorted(lengths):
                    ours = {
                        arm.label: cell_text(arm.lines[panel, LENGTH]) for arm in arms if arm.training.length == length
                    }
                    given = [model.get(length, "–") for model in theirs.values()]
                    row = [length, *given, *(ours.get(label, "–") for label in labels)]
                    groups.setdefault(name, []).append(row)
        head = ["train length", *(f"paper: {model}" for model in FIGURE_1["parity"])]
        items = "".join(f"<li>{escaped(note)}</li>\n" for note in NOTES)
        notes = details("What is known of the paper's figures", f'<ul class="small">{items}</ul>\n')
        ours = [f"ours: {label}" for label in labels]
        return f"""<h2 id="paper">Tasks: the paper's Figure 1, and ours</h2>
<p class="warn">The paper's n is unknown, probably 28 to 84. Model sizes and budgets differ, so compare the order of
the arms, not the heights.</p>
<p>Accuracy in % at evaluation length {LENGTH}, by the longest texts in fine-tuning (train length). Our runs were
fine-tuned on the task and evaluated with markers where the task points ("target"), like the paper's. Bars are Wilson's
interval over texts; with several seeds they reach from the lowest to the highest seed, and the line is the mean.
Source: {escaped(SOURCE)}.</p>
<div>{"".join(figures)}</div>
{table(head + ours, groups, ())}{notes}
"""

    def accuracy(self) -> str:
        out = []
        for task in CHOICES["task"]:
            figures = []
            for panel in (panel for panel in self.panels if panel.task == task):
                cells = (of for arm in self.arms for (at, _), of in arm.lines.items() if at == panel)
                used = [line for of in cells for line in of.values()]
                what = f"{drawing.title(panel)}: exact answers by length, as in the table of all cells"
                name = f"accuracy_{file_name(panel)}.png"
                figures.append(self.picture(name, what, used, drawing.accuracy, self.arms, panel))
            if figures:
                out.append(f"<h3>{task.replace('_', ' ')}</h3>\n<div>{''.join(figures)}</div>\n")
        arms = []
        for arm in self.arms:
            runs = dict.fromkeys(line["run"] for of in arm.lines.values() for line in of.values())
            arms.append([arm.label, arm.training.length, ", ".join(runs)])
        return f"""<h2 id="accuracy">Tasks: accuracy by evaluation length</h2>
<p>An answer is exact if greedy decoding produces all of it. A panel shows a task with one placement of its markers.
Bars are Wilson's interval over texts; with several seeds they reach from the lowest to the highest seed, the line is
their mean and the small dots are the seeds. Dashes distinguish train lengths. The thin grey line is the best shortcut
that does not read the whole text, on the same texts, with Wilson's interval; the dotted line is chance. A cross in the
strip below 0 means that the model cannot read texts of that length. Runs of the same arm and settings count as seeds of
one arm; two runs with the same seed are separate arms.</p>
{table(["arm", "train length", "runs"], {"": arms}, (0, 2), (2,))}{"".join(out)}"""

    def differences(self) -> str:
        if not self.checkpoints:
            nothing = "<p>No two arms of equal training share a cell.</p>\n"
            return f'<h2 id="differences">Tasks: differences between arms</h2>\n{nothing}'
        decided = {_claim(row) for row in self.by_seed}
        rows = self.by_seed + [row for row in self.checkpoints if _claim(row) not in decided]
        figures = []
        for panel in self.panels:
            shown = [row for row in rows if row.panel == panel and not row.refused]
            both = ((row, arm) for row in shown for arm in (row.first, row.second))
            used = [arm.lines[panel, row.length][seed] for row, arm in both for seed in row.seeds]
            what = f"{drawing.title(panel)}: differences between arms, as in the tables below"
            args = (f"difference_{file_name(panel)}.png", what, used, drawing.differences, shown, panel, self.margin)
            figures += [self.picture(*args)] if shown else []
        started = {tuple(line.get("origin", {}).get(name) for name in ("train_sha256", "content_tokens"))
                   for line in self.lines}  # fmt: skip
        warning = """<p class="warn">The runs were not all pretrained on the same text for equally long, or some lines
do not record it (see origin in the table of runs), so a difference between arms may come from their pretraining.</p>
"""
        over_seeds = f"""<h3>Over seeds</h3>
<p>Student's t over pairs of equal seed. The claim is that the first arm is better than the second by more than
{percent(self.effect)} points. It <b>holds</b> if the interval lies above that, and p, after Holm over all rows with
{SEEDS} seeds or more, is below 0.05; the reverse holds if the second is better by as much. It <b>does not hold</b> if
the whole interval lies within ±{percent(self.margin)} points. Otherwise, and with fewer than {SEEDS} seeds, it
is <b>undecided</b>. All seeds answer the same texts, so the interval does not cover other texts. Effect, margin and the
cells to compare must be fixed before looking at results.</p>
{self.difference_table(self.by_seed)}"""
        return f"""<h2 id="differences">Tasks: differences between arms</h2>
<p>First minus second arm, in points, for arms of the same training, in the same cell and on the same texts. The grey
band is the margin, ±{percent(self.margin)} points. Where two arms share several seeds, the line is their mean
difference and bars are Student's interval over seeds; otherwise bars are intervals over texts.</p>
{warning if len(started) > 1 or (None, None) in started else ""}<div>{"".join(figures)}</div>
{over_seeds if self.by_seed else ""}<h3>Checkpoint against checkpoint</h3>
<p class="warn">These rows are about two checkpoints, not their arms, and are undecided with fewer than {SEEDS} seeds:
trained again with another seed, the checkpoints would differ in another way.</p>
<p>The table has Newcombe's interval for paired texts, McNemar's exact test, and its p after Holm over all its rows.</p>
{details("All differences between checkpoints", self.difference_table(self.checkpoints))}"""

    # ------------------------------------------------------------------------- tables

    def difference_table(self, rows: list[Difference]) -> str:
        head = ["length", "train length", "first", "second", "difference", "95 %", "verdict", "p", "Holm",
                "n", "seed"]  # fmt: skip
        groups: dict[str, list] = {}
        for row in rows:
            out = groups.setdefault(drawing.title(row.panel), [])
            n = row.first.lines[row.panel, row.length][row.seeds[0]]["n"] if row.seeds else ""
            where = [row.length, row.first.training.length, row.first.label, row.second.label]
            seeds = ", ".join(map(str, row.seeds))
            if row.refused:
                out.append([*where, "", "", f"not compared: {row.refused}", "", "", "", seeds])
                continue
            interval = f"{points(row.low)} .. {points(row.high)}"
            ps = [p_value(row.p), p_value(row.holm)]
            out.append([*where, points(row.mean), interval, row.verdict, *ps, n, seeds])
        return table(head, groups, (2, 3, 6))

    def cells(self) -> str:
        groups = {}
        for panel in self.panels:
            rows = groups[drawing.title(panel)] = []
            for arm in self.arms:
                for length in sorted(length for at, length in arm.lines if at == panel):
                    for line in arm.lines[panel, length].values():
                        where = [length, arm.label, arm.training.length, line["seed"]]
                        rows.append([*where, *self.cell(line)])
        head = ["length", "arm", "train length", "seed", "exact, %", "95 %", "tokens, %", "95 %", "nats",
                "chance, %", "n", "weights", "command", "shortcuts, %"]  # fmt: skip
        return f"""<h2 id="cells">Tasks: all cells</h2>
<p>Exact answers with Wilson's interval, tokens of the answers with a bootstrap interval over texts, nats of a whole
answer, and the share that each shortcut answers correctly, with Wilson's interval.</p>
{details("All cells", table(head, groups, (1, 11, 13)))}"""

    def cell(self, line: dict) -> list:
        who = [line["weights_sha256"][:8], self.page.links([line["command"]])]
        if "impossible" in line:
            return ["impossible", "", "", "", "", "", 0, *who, line["impossible"]]
        floors = sorted(line["floors"].items(), key=lambda item: -item[1])
        shares = "; ".join(
            f"{percent(share)} ({span(*share_interval(share, line['n']))}) {name}" for name, share in floors
        )
        exact = [percent(line["exact"]), span(*wilson(line["correct"], line["n"]))]
        tokens = [percent(line["token_accuracy"]), span(*line["token_interval"]), f"{line['nats']:.3f}"]
        return [*exact, *tokens, percent(line["chance"]), line["n"], *who, shares]


def _claim(row: Difference) -> tuple:
    return row.first.name, row.second.name, row.panel, row.length


def like_paper(arms: list[Arm], panel: Panel) -> list[Arm]:
    """Returns the arms that are comparable with the paper's: fine-tuned on the panel's task, evaluated with markers
    where the task points as in training, and measured at the paper's length."""
    return [
        arm
        for arm in arms
        if (panel, LENGTH) in arm.lines and panel.task in arm.training.on
        and panel.placement == "target" in arm.training.placements
    ]  # fmt: skip


def cell_text(of: dict[int, dict]) -> str:
    """Returns the text that stands for one cell of an arm in a table."""
    if impossible(of):
        return "impossible"
    mean, low, high = summary(of)
    return f"{percent(mean)} ({span(low, high)}; {footer(list(of.values()))})"


def file_name(panel: Panel) -> str:
    return "_".join(panel)
