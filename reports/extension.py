"""Builds the section that has the form of the paper's Table 1: list recall by window extension, fine-tuning length and
evaluation length, all in multiples of the window before extension."""

from fractions import Fraction
from typing import NamedTuple

from matplotlib.figure import Figure

from nanometa.common.statistics import wilson
from nanometa.reports.drawing import key, legend, look, png, wrapped
from nanometa.reports.lines import Panel, cell_of, impossible, summary
from nanometa.reports.markup import escaped, percent, span, table
from nanometa.reports.page import Page, footer
from nanometa.reports.paper import TABLE_1, TABLE_1_SOURCE, WINDOW


class Row(NamedTuple):
    """A row of the table. Lengths are rounded to the nearest multiple or fraction of the window, because arms without
    markers have shorter windows of the same content and belong in the same row as arms with markers."""

    scaling: str  # such as "yarn 4x", or "none" for the original window
    how: str  # "trained" with the scaling, or only "read" with it
    tuned: Fraction  # length of the fine-tuning texts, in windows

    @property
    def factor(self) -> float:
        factor = self.scaling.rpartition(" ")[2].removesuffix("x")
        return float(factor) if factor.replace(".", "").isdigit() else 1.0

    @property
    def paper(self) -> dict[int, float]:
        """Returns the paper's row of the same lengths, empty if the paper has none."""
        return TABLE_1.get((self.factor, self.tuned), {})


Cells = dict[int, dict[int, dict]]  # length -> seed -> line


def body(page: Page, lines: list[dict]) -> str:
    """Returns the section for lines of eval.py tasks, "" if no line was read with a scaled window."""
    mine = [line for line in lines if belongs(line)]
    if not any(line["scaling"] != "none" for line in mine):
        return ""
    figures, groups = [], {}
    panels: dict[tuple[Panel, Row], dict[str, Cells]] = {}
    for line in sorted(mine, key=lambda line: (row_of(line).factor, row_of(line))):
        panel, length = cell_of(line)
        cells = panels.setdefault((panel, row_of(line)), {}).setdefault(arm_of(line), {})
        cells.setdefault(length, {})[line["seed"]] = line
    arms = list(dict.fromkeys(arm for of in panels.values() for arm in of))
    for number, ((panel, row), of) in enumerate(panels.items(), 1):
        used = [line for cells in of.values() for by_seed in cells.values() for line in by_seed.values()]
        what = f"{row_name(row)}: token accuracy and exact answers by length, as in the table below"
        content = png(picture, row, of, arms, footer(used))
        figures.append(page.picture(f"extension_{number}.png", what, content, used, note=row_name(row)))
        name = f"level {panel.level}, question {panel.question}"
        groups.setdefault(name, []).extend(rows(page, row, of))
    head = ["extension", "by", "fine-tuned at", "asked at", "arm", "seed", "tokens, %", "95 %", "exact, %", "95 %", "n",
            "paper, tokens %", "command"]  # fmt: skip
    return f"""<h2 id="extension">List recall in longer windows: the paper's Table 1, and ours</h2>
<p>Models were fine-tuned and evaluated with markers where the task points. Lengths are multiples (x) of the window
before extension, so that ours can be compared with the paper's, whose window was {WINDOW}: at 2x, a model of {
        WINDOW
    } reads
{2 * WINDOW} positions. Arms without markers have shorter windows of the same content and are shown at the nearest
multiple. "trained" means that the longer window was trained before fine-tuning, as in the paper; "read" means that
positions were scaled only for the evaluation. Solid lines are token accuracy with a bootstrap interval over texts, the
paper's measure; dashed lines are exact answers with Wilson's interval. With several seeds both reach from the lowest to
the highest. The two are equal where items are single tokens. Grey is the paper's row of the same extension and
fine-tuning.</p>
<p class="small">{escaped(TABLE_1_SOURCE)}.</p>
<div>{"".join(figures)}</div>
{
        table(
            ["paper: extension", "fine-tuned at", *(f"asked at {x}x" for x in TABLE_1[4, 2])],
            {"": [[f"{e}x", f"{t}x", *of.values()] for (e, t), of in TABLE_1.items()]},
            (),
        )
    }
{table(head, groups, (0, 1, 4, 12))}"""


def belongs(line: dict) -> bool:
    """Returns whether a line is comparable with the paper's Table 1. Lines of the first versions do not record their
    window and are left out."""
    return (
        line["task"] == "list_recall"
        and line["placement"] == "target"
        and {"scaling", "trained_scaling", "original_block_size"} <= line.keys()
        and "list_recall" in line["trained_on"]
        and "target" in (line["train_placements"] or ())
    )


def row_of(line: dict) -> Row:
    how = "trained" if line["scaling"] == line["trained_scaling"] else "read"
    return Row(line["scaling"], how, nearest(line["train_length"], line["original_block_size"]))


def nearest(length: int, window: int) -> Fraction:
    """Returns the multiple or fraction of a window nearest to a length."""
    return Fraction(round(length / window)) if length >= window else Fraction(1, round(window / length))


def arm_of(line: dict) -> str:
    """Returns the arm without its scaling, because the row already names it."""
    name = line["arm"].removesuffix(f", read with {line['scaling']}")
    return name.replace(f", {line['trained_scaling']}", "", 1)


def row_name(row: Row) -> str:
    extension = "original window" if row.scaling == "none" else f"{row.scaling}, {row.how}"
    return f"{extension}; fine-tuned at {row.tuned}x"


def times(length: int, line: dict) -> str:
    return f"{length / line['original_block_size']:.3g}x = {length}"


def rows(page: Page, row: Row, of: dict[str, Cells]) -> list[list]:
    out = []
    for length in sorted({length for cells in of.values() for length in cells}):
        for arm, cells in of.items():
            for seed, line in sorted(cells.get(length, {}).items()):
                figures = ["impossible", "", "", "", 0]
                if "impossible" not in line:
                    figures = [percent(line["token_accuracy"]), span(*line["token_interval"]), percent(line["exact"]),
                               span(*wilson(line["correct"], line["n"])), line["n"]]  # fmt: skip
                out.append([row.scaling, row.how if row.scaling != "none" else "", times(line["train_length"], line),
                            times(length, line), arm, seed, *figures,
                            row.paper.get(nearest(length, line["original_block_size"]), "–"),
                            page.links([line["command"]])])  # fmt: skip
    return out


def picture(figure: Figure, row: Row, of: dict[str, Cells], arms: list[str], about: str) -> None:
    """Draws one row of the table: accuracy by evaluation length, with one color for each arm."""
    axes, handles = figure.subplots(), []
    for number, (arm, cells) in enumerate(of.items()):
        style = look(arms.index(arm))
        handles.append(key(arm, linestyle="", **style))
        possible = {length: by_seed for length, by_seed in sorted(cells.items()) if not impossible(by_seed)}
        for share, interval, dash in (("token_accuracy", "token_interval", "-"), ("exact", "interval", (0, (4, 2)))):
            dodge = 1 + 0.03 * (number - (len(of) - 1) / 2) + (0.015 if share == "exact" else 0)
            x = [dodge * length / window_of(by_seed) for length, by_seed in possible.items()]
            ends = [summary(by_seed, share, interval) for by_seed in possible.values()]
            axes.plot(x, [100 * mean for mean, _, _ in ends], linestyle=dash, linewidth=1.3, **style)
            axes.vlines(x, [100 * low for _, low, _ in ends], [100 * high for _, _, high in ends],
                        color=style["color"], linewidth=1.3)  # fmt: skip
    if row.paper:
        axes.plot(list(row.paper), list(row.paper.values()), color="#999999", marker=".", linewidth=1.2)
        handles.append(key("paper, n unknown", color="#999999", marker="."))
    axes.axvline(row.factor, linestyle=":", linewidth=1.2, color="#555555")
    handles += [
        key("token accuracy"),
        key("exact answers", linestyle=(0, (4, 2))),
        key("end of the window", linestyle=":"),
    ]
    axes.set_ylim(-4, 104)
    axes.set_xlim(left=0)
    axes.set(title=wrapped(row_name(row)), ylabel="%", xlabel=f"asked at, in windows of the model\n{about}")
    legend(figure, handles)


def window_of(of: dict[int, dict]) -> int:
    """Returns the window before any extension, from a cell's lines by seed."""
    return next(iter(of.values()))["original_block_size"]
