"""Analyses the lines of a study: the gate, the hypotheses with their verdicts, and descriptive figures.

The unit is the training run. Arms are compared on paired seeds by Student's t, and the hypotheses with a share `p` form
one family under Holm's correction (common/statistics.py explains the verdicts). There are no verdicts until every
planned run of the deciding stage has its line.

The endpoint of a run is its mean share of exact answers over tasks and placements at one length. A run that did not
reach the accuracy of `stop_at` in validation counts like any other; the column "matched" repeats each comparison over
the pairs of which both did.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nanometa.common.statistics import decide, holm, mean_p, seed_difference
from nanometa.config.tasks import cells_of
from nanometa.reports.study_picture import study_picture
from nanometa.studies.plan import Plan

INSENSITIVE = "no verdict: the gate is closed"
WAITING = "not all runs are in"
SIDES = ("first", "second")  # of a contrast


@dataclass
class Comparison:
    """A claim about a difference over seeds, first minus second, with its interval and verdict."""

    name: str
    claim: str
    unit: str
    """of the differences: "points" or the name of another unit"""
    margin: float
    effect: float
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float | None
    matched: tuple[float, float, float, int] | None
    """mean difference, interval and number of pairs, over the pairs whose runs both reached the accuracy of stop_at"""
    holm: float | None = None
    verdict: str = WAITING


@dataclass
class Results:
    """What the lines of a study show."""

    finished: int
    planned: int
    curves: dict[str, dict[int, dict[int, float]]]
    """endpoint by arm, length and seed"""
    gate: Comparison | None
    comparisons: list[Comparison]
    cells: list[tuple[str, str, str, int, float, float, float, int]]
    """contrast, task, placement, length, mean difference, interval, number of pairs: descriptive"""
    earlier: list[tuple[str, str, str, int, float, float]]
    """stage, arm, variant, runs, mean steps until the accuracy of stop_at, mean of the lowest validated cell, for the
    stages before the deciding one; a run that did not reach the accuracy counts with its last step"""
    warnings: list[str]


def analyse(plan: Plan, lines: list[dict]) -> Results:
    """Returns what the lines of the plan's deciding stage show."""
    how = plan.analysis
    stage = plan.stages[how["stage"]]
    mine = {(line["arm"], line["seed"]): line for line in lines if line["stage"] == stage.name}
    wanted = {(cell.arm.name, cell.seed) for cell in plan.cells() if cell.stage is stage}
    planned, finished = len(wanted), len(wanted & mine.keys())
    lengths = how["lengths"]
    curves = {
        arm: {
            length: by_seed(mine, arm, lambda line, length=length: endpoint(plan, line, length)) for length in lengths
        }
        for arm in stage.arms
    }
    complete = finished == planned

    def of_endpoint(entry: dict, length: int, effect: float = 0.0) -> Comparison:
        pair = [curves[entry[side]][length] for side in SIDES]
        reached = {
            seed for seed in pair[0].keys() & pair[1].keys()
            if all(mine[entry[side], seed]["finetuning"]["reached_at"] is not None for side in SIDES)
        }  # fmt: skip
        return compare(entry["name"], entry["claim"], "points", how["margin"], effect, *pair, reached)

    gate = None
    if "gate" in how:
        gate = of_endpoint(how["gate"], how["gate"]["length"], how["gate"]["above"])
        gate.verdict = decide(gate.low, gate.high, 0.0, gate.effect, gate.margin) if complete else WAITING
    comparisons = [of_endpoint(entry, how["length"]) for entry in how.get("contrasts", ())]
    family = list(comparisons)
    for entry in how.get("bits", ()):
        pair = [by_seed(mine, entry[side], lambda line: line["pretraining"]["bits_per_byte"]) for side in SIDES]
        comparisons.append(compare(entry["name"], entry["claim"], "bits per byte", entry["margin"], 0.0, *pair, set()))
    for entry in how.get("ablations", ()):
        changed = by_seed(mine, entry["arm"], lambda line, entry=entry: ablation(line, entry))
        nothing = dict.fromkeys(changed, 0.0)
        comparisons.append(
            compare(entry["name"], entry["claim"], entry["unit"], entry["margin"], 0.0, changed, nothing, set())
        )
    adjusted = iter(holm([row.p for row in family if row.p is not None]))
    for row in comparisons:
        row.holm = (next(adjusted) if row in family else row.p) if row.p is not None else None
        if complete and row.p is not None:
            row.verdict = decide(row.low, row.high, row.holm, row.effect, row.margin)
            if gate and not gate.verdict.startswith("holds") and row.unit == "points":
                row.verdict = INSENSITIVE
    return Results(
        finished, planned, curves, gate, comparisons, by_cell(plan, mine), before(plan, lines), warnings_of(lines)
    )


def compare(
    name: str, claim: str, unit: str, margin: float, effect: float, first: dict, second: dict, reached: set[int]
) -> Comparison:
    """Compares values by seed, over the seeds that both have. reached: the seeds of the column "matched"."""
    seeds = tuple(sorted(first.keys() & second.keys()))
    differences = tuple(first[seed] - second[seed] for seed in seeds)
    if len(seeds) < 2:
        nan = float("nan")
        return Comparison(name, claim, unit, margin, effect, seeds, differences, nan, nan, nan, None, None)
    interval, p = difference(first, second, seeds), mean_p(np.array(differences))
    both = [seed for seed in seeds if seed in reached]
    matched = (*difference(first, second, both), len(both)) if len(both) >= 2 else None
    return Comparison(name, claim, unit, margin, effect, seeds, differences, *interval, p, matched)


def by_seed(mine: dict, arm: str, figure: Callable[[dict], float | None]) -> dict[int, float]:
    """Returns a figure of each run of an arm by its seed, without those of which it is None.

    mine: the lines by arm and seed."""
    found = {seed: figure(line) for (name, seed), line in sorted(mine.items()) if name == arm}
    return {seed: value for seed, value in found.items() if value is not None}


def difference(first: dict[int, float], second: dict[int, float], seeds: Iterable[int]) -> tuple[float, float, float]:
    """Returns the mean difference of values by seed over some seeds, and its interval."""
    seeds = sorted(seeds)
    return seed_difference([first[seed] for seed in seeds], [second[seed] for seed in seeds])


def endpoint(plan: Plan, line: dict, length: int) -> float | None:
    """Returns the mean share of exact answers of a run over the tasks and placements of the endpoint, or None if the
    run cannot read texts of this length."""
    how = plan.analysis
    values = [
        exact(plan, line, task, placement, length)
        for task, placement in itertools.product(how["tasks"], how["placements"])
    ]
    return None if None in values else float(np.mean(values))


def exact(plan: Plan, line: dict, task: str, placement: str, length: int) -> float | None:
    """Returns the share of exact answers in one cell, read with the placement that the arm has in place of this one."""
    read_as = plan.arms[line["arm"]].placements.get(placement, placement)
    for cell in line["tasks"]:
        if (cell["task"], cell["placement"], cell["length"]) == (task, read_as, length):
            return cell.get("exact")
    return None


def ablation(line: dict, entry: dict) -> float | None:
    """Returns the figure of a line of probe.py ablation that has the values of entry["where"]."""
    for found in line[entry["of"]]:
        if all(found.get(name) == value for name, value in entry["where"].items()):
            return found[entry["figure"]]
    return None


def by_cell(plan: Plan, mine: dict) -> list[tuple]:
    """Returns the paired difference of every contrast in every cell. These are descriptive."""
    how, rows = plan.analysis, []
    for entry in how.get("contrasts", ()):
        for task, placement, length in itertools.product(how["tasks"], how["placements"], how["lengths"]):
            cell = functools.partial(exact, plan, task=task, placement=placement, length=length)
            values = [by_seed(mine, entry[side], cell) for side in SIDES]
            seeds = values[0].keys() & values[1].keys()
            if len(seeds) >= 2:
                rows.append((entry["name"], task, placement, length, *difference(*values, seeds), len(seeds)))
    return rows


def before(plan: Plan, lines: list[dict]) -> list[tuple]:
    """Returns what the runs of the stages before the deciding one show about learning at the trained length.

    Learning rates are chosen by these figures, which come from validation texts of the trained length alone."""
    rows = []
    for stage in plan.stages.values():
        for arm, variant in itertools.product(stage.arms, stage.variants):
            found = [
                line["finetuning"] for line in lines
                if (line["stage"], line["arm"], line["variant"]) == (stage.name, arm, variant)
            ]  # fmt: skip
            if found and stage.name != plan.analysis["stage"]:
                steps = np.mean([one["reached_at"] or one["step"] for one in found])
                lowest = np.mean([min(cells_of(one, plan.analysis["tasks"]).values()) for one in found])
                rows.append((stage.name, arm, variant, len(found), float(steps), float(lowest)))
    return rows


def warnings_of(lines: list[dict]) -> list[str]:
    """Returns a sentence for everything in which lines differ although they should not."""
    out = []
    for name in ("commit", "processor", "threads", "torch", "data"):
        values = {repr(line[name]) for line in lines}
        if len(values) > 1:
            out.append(f"The lines have {len(values)} different values of {name}.")
    if any(line["uncommitted_changes"] for line in lines):
        out.append("Some runs were trained with uncommitted changes of the code.")
    return out


# ----------------------------------------------------------------------------- the table


def figure(value: float, unit: str) -> str:
    """Returns a difference as text: shares in points with one decimal, other units with four."""
    return f"{100 * value:+.1f}" if unit == "points" else f"{value:+.4f}"


def interval(row: Comparison) -> str:
    if row.p is None:
        return "needs two pairs"
    return f"{figure(row.mean, row.unit)} ({figure(row.low, row.unit)} .. {figure(row.high, row.unit)})"


def table(plan: Plan, results: Results) -> str:
    """Returns the verdicts as Markdown."""
    how = plan.analysis
    head = ["", "claim", "difference", "pairs", "margin", "p", "verdict", "matched pairs only"]
    out = [
        f"# {plan.question}",
        "",
        f"{results.finished} of {results.planned} planned runs of the stage {how['stage']} are in. Differences are "
        f"paired by seed, with 95 % intervals over seeds (Student's t); p of the contrasts of the "
        f"endpoint is Holm's.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in [*([results.gate] if results.gate else []), *results.comparisons]:
        margin = f"above {figure(row.effect, row.unit)}" if row.effect else f"±{figure(row.margin, row.unit)[1:]}"
        matched = "" if row.matched is None else (
            f"{figure(row.matched[0], row.unit)} ({figure(row.matched[1], row.unit)} .. "
            f"{figure(row.matched[2], row.unit)}), {row.matched[3]} pairs"
        )  # fmt: skip
        p = "" if row.holm is None else f"{row.holm:.3f}"
        unit = "" if row.unit == "points" else f" {row.unit}"
        unit = "" if row.p is None else unit
        out.append(
            f"| {row.name} | {row.claim} | {interval(row)}{unit} | {len(row.seeds)} | {margin} | {p} | {row.verdict} | "
            f"{matched} |"
        )
    lengths = how["lengths"]
    out += ["", "Mean share of exact answers over tasks and placements (standard deviation over seeds):", ""]
    out += [
        f"| arm | runs | {' | '.join(f'{length} positions' for length in lengths)} |",
        "|---" * (2 + len(lengths)) + "|",
    ]
    for arm, curve in results.curves.items():
        runs = len(curve[lengths[0]])
        shown = [spread(list(curve[length].values())) for length in lengths]
        out.append(f"| {plan.arms[arm].label} ({arm}) | {runs} | {' | '.join(shown)} |")
    if results.cells:
        out += ["", "Differences by cell, in points (descriptive, without correction):", ""]
        out += ["| | task | placement | positions | difference | pairs |", "|---|---|---|---|---|---|"]
        for name, task, placement, length, mean, low, high, n in results.cells:
            shown = f"{figure(mean, 'points')} ({figure(low, 'points')} .. {figure(high, 'points')})"
            out.append(f"| {name} | {task} | {placement} | {length} | {shown} | {n} |")
    if results.earlier:
        out += ["", "Stages before, on validation texts of the trained length alone:", ""]
        out += [
            "| stage | arm | variant | runs | steps until stop_at | lowest cell at the end |",
            "|---|---|---|---|---|---|",
        ]
        for stage, arm, variant, runs, steps, lowest in results.earlier:
            out.append(f"| {stage} | {arm} | {variant} | {runs} | {steps:,.0f} | {100 * lowest:.1f} % |")
    out += ["", *results.warnings]
    return "\n".join(out).rstrip() + "\n"


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    deviation = f" ({100 * float(np.std(values, ddof=1)):.1f})" if len(values) > 1 else ""
    return f"{100 * float(np.mean(values)):.1f} %{deviation}"


def picture(plan: Plan, results: Results) -> bytes:
    """Returns the figure of the study as PNG: all endpoints, and the differences that are measured in points."""
    rows = [
        {
            "name": f"{row.name}: {row.claim}", "verdict": row.verdict, "margin": 100 * row.margin,
            "above": 100 * row.effect,
            "differences": [100 * value for value in row.differences],
            **{name: None if row.p is None else 100 * getattr(row, name) for name in ("mean", "low", "high")},
        }
        for row in [*([results.gate] if results.gate else []), *results.comparisons]
        if row.unit == "points"
    ]  # fmt: skip
    curves = {plan.arms[arm].label: curve for arm, curve in results.curves.items()}
    return study_picture(curves, rows, f"{plan.question} ({results.finished} of {results.planned} runs)")
