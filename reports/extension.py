"""Builds the table in the form of the paper's Table 1: list recall by window extension, fine-tuning length and
evaluation length, all in multiples of the window before extension."""

from fractions import Fraction

from nanometa.common.statistics import wilson
from nanometa.reports.markup import Markup, details, escaped, percent, span, table
from nanometa.reports.page import Page
from nanometa.reports.paper import TABLE_1, TABLE_1_SOURCE, WINDOW


def body(page: Page, lines: list[dict]) -> Markup:
    """Returns the folded table for lines of eval.py tasks, "" if no line was read with a scaled window."""
    mine = [line for line in lines if belongs(line)]
    if not any(line["scaling"] != "none" for line in mine):
        return Markup("")
    groups: dict[str, list[list]] = {}
    for line in sorted(mine, key=lambda line: (factor_of(line), line["scaling"], line["train_length"], line["length"])):
        groups.setdefault(f"level {line['level']}, question {line['question']}", []).append(row(page, line))
    head = ["extension", "by", "fine-tuned at", "asked at", "arm", "seed", "tokens, %", "95 %", "exact, %", "95 %", "n",
            "paper, tokens %", "command"]  # fmt: skip
    about = f"""<p class="small">Models were fine-tuned and evaluated with markers where the task points. Lengths are
multiples (x) of the window before extension, so that ours can be compared with the paper's, whose window was {WINDOW}:
at 2x, a model of {WINDOW} reads {2 * WINDOW} positions. The paper's figures are those of the nearest multiples, because
arms without markers have shorter windows of the same content. "trained" means that the longer window was trained before
fine-tuning, as in the paper; "read" means that positions were scaled only for the evaluation. Intervals are over texts:
bootstrap for token accuracy, the paper's measure, and Wilson's for exact answers. {escaped(TABLE_1_SOURCE)}.</p>
"""
    return details("Tasks: list recall in longer windows, ours beside the paper's Table 1",
                   table(head, groups, (0, 1, 4, 12)) + about)  # fmt: skip


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


def factor_of(line: dict) -> float:
    """Returns by which factor the window of a line is extended."""
    factor = line["scaling"].rpartition(" ")[2].removesuffix("x")
    return float(factor) if factor.replace(".", "").isdigit() else 1.0


def nearest(length: int, window: int) -> Fraction:
    """Returns the multiple or fraction of a window nearest to a length."""
    return Fraction(round(length / window)) if length >= window else Fraction(1, round(window / length))


def row(page: Page, line: dict) -> list:
    window, scaling = line["original_block_size"], line["scaling"]
    tuned, asked = line["train_length"], line["length"]
    theirs = TABLE_1.get((factor_of(line), nearest(tuned, window)), {}).get(nearest(asked, window), "–")
    how = "" if scaling == "none" else "trained" if scaling == line["trained_scaling"] else "read"
    arm = line["arm"].removesuffix(f", read with {scaling}").replace(f", {line['trained_scaling']}", "", 1)
    figures = ["impossible", "", "", "", 0]
    if "impossible" not in line:
        figures = [percent(line["token_accuracy"]), span(*line["token_interval"]), percent(line["exact"]),
                   span(*wilson(line["correct"], line["n"])), line["n"]]  # fmt: skip
    lengths = [f"{length / window:.3g}x = {length}" for length in (tuned, asked)]
    return [scaling, how, *lengths, arm, line["seed"], *figures, theirs, page.links([line["command"]])]
