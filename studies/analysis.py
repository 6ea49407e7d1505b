"""Analyses the lines of a study: the gate, the hypotheses with their verdicts, and descriptive figures.

The unit is the training run. Arms are compared on paired seeds by Student's t (common/statistics.py explains the
verdicts). There are no verdicts until every planned run of the deciding stage has its line.

The `contrasts` compare the endpoint of the tasks: the mean share of exact answers of a run over tasks and placements at
one length. A run that did not reach the accuracy of `stop_at` in validation counts like any other; the column "matched"
repeats each comparison over the pairs of which both did. The `figures` compare any other figure of two arms, or a
figure of one arm with 0: the last evaluation of a training run ("pretrain" or "finetune"), or a line of a measure.
A figure's claim is that its difference is above 0, or with lower = true that it is below 0.

The `curves` describe how a figure of a measure depends on another field `x` of its lines, such as a ratio or a length,
in all arms that have the measure. They have no verdicts.

Holm's correction applies to the contrasts, or, in a study without contrasts, to the figures.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.statistics import decide, holm, mean_p, seed_difference
from nanometa.config.tasks import cells_of
from nanometa.reports.study_picture import curves_picture, levels_picture, study_picture
from nanometa.studies.plan import RUNS, Plan

INSENSITIVE = "no verdict: the gate is closed"
WAITING = "not all runs are in"
SIDES = ("first", "second")  # of a contrast


@dataclass
class Comparison:
    """A claim about a difference over seeds, first minus second, with its interval and verdict.

    The claim is that the difference is above `effect`, or below -`effect` if `lower`."""

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
    lower: bool = False
    """whether the claim is that the first is lower, not that it is higher"""


class Levels(NamedTuple):
    """The values of all arms of a figure that is compared."""

    name: str
    unit: str
    values: dict[str, dict[int, float]]
    """by arm and seed, of the arms that have any"""


class Curves(NamedTuple):
    """A figure of all arms by the value of another field, such as the ratio of compression."""

    name: str
    x: str
    unit: str
    values: dict[str, dict[float, dict[int, float]]]
    """by arm, value of x and seed"""


@dataclass
class Results:
    """What the lines of a study show."""

    finished: int
    planned: int
    curves: dict[str, dict[int, dict[int, float]]]
    """endpoint by arm, length and seed"""
    gate: Comparison | None
    comparisons: list[Comparison]
    levels: list[Levels]
    described: list[Curves]
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
    lengths = how.get("lengths", ())
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
            if all(last_run(mine[entry[side], seed])["reached_at"] is not None for side in SIDES)
        }  # fmt: skip
        return compare(entry["name"], entry["claim"], "points", how["margin"], effect, *pair, reached)

    gate = None
    if "gate" in how:
        gate = of_endpoint(how["gate"], how["gate"]["length"], how["gate"]["above"])
        gate.verdict = decide(gate.low, gate.high, 0.0, gate.effect, gate.margin) if complete else WAITING
    contrasts = [of_endpoint(entry, how["length"]) for entry in how.get("contrasts", ())]
    figures = []
    for entry in how.get("figures", ()):
        check_fields(entry, mine)
        first = by_seed(mine, entry["first"], lambda line, entry=entry: figure_of(line, entry))
        second = dict.fromkeys(first, 0.0)
        if "second" in entry:
            other = entry | {"where": entry.get("where_second", entry.get("where", {}))}
            second = by_seed(mine, entry["second"], lambda line, entry=other: figure_of(line, entry))
        row = compare(entry["name"], entry["claim"], entry["unit"], entry["margin"], 0.0, first, second, set())
        row.lower = entry.get("lower", False)
        figures.append(row)
    family = contrasts or figures
    adjusted = iter(holm([row.p for row in family if row.p is not None]))
    for row in (comparisons := [*contrasts, *figures]):
        row.holm = (next(adjusted) if row in family else row.p) if row.p is not None else None
        if complete:
            # with fewer than two pairs there is no interval, and nothing is decided
            ends = (-row.high, -row.low) if row.lower else (row.low, row.high)
            row.verdict = "undecided" if row.p is None else decide(*ends, row.holm, row.effect, row.margin)
            if gate and not gate.verdict.startswith("holds") and row.unit == "points":
                row.verdict = INSENSITIVE
    return Results(
        finished, planned, curves, gate, comparisons, levels(plan, mine), described(plan, mine), by_cell(plan, mine),
        before(plan, lines), warnings_of(lines),
    )  # fmt: skip


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


def last_run(line: dict) -> dict:
    """Returns the figures of the last training run of a cell."""
    return line.get("finetune", line["pretrain"])


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
    for cell in line["measures"]["tasks"]:
        if (cell["task"], cell["placement"], cell["length"]) == (task, read_as, length):
            return cell.get("exact")
    return None


def figure_of(line: dict, entry: dict) -> float | None:
    """Returns the figure that an entry of [analysis.figures] names, or None if the line of a run does not have it.

    Of a measure, it is the figure of the line that has the values of entry["where"], or with mean = true the mean of
    all such lines. Raises UserError if there are several lines, with different figures, and no mean is asked for."""
    of, where = entry["of"], entry.get("where", {})
    found = [
        one[entry["figure"]] for one in lines_of(line, of)
        if all(one.get(name) == value for name, value in where.items()) and one.get(entry["figure"]) is not None
    ]  # fmt: skip
    if len(set(found)) > 1 and not entry.get("mean"):
        raise UserError(
            f"the plan names {entry['figure']} of {of} where {where}, and {line['cell']} has {len(found)} lines of "
            f"that kind: name more fields in `where`, or give mean = true."
        )
    return float(np.mean(found)) if found else None


def lines_of(line: dict, of: str) -> list[dict]:
    """Returns what the line of a run has of a training run or of a measure."""
    return [line[of]] if of in RUNS else line["measures"].get(of, [])


def check_fields(entry: dict, mine: dict) -> None:
    """Raises UserError if no line has a field that an entry of [analysis.figures] or [analysis.curves] names.

    Without this, a misspelled field would look like a comparison that is undecided, or leave a curve out."""
    found = [one for line in mine.values() for one in lines_of(line, entry["of"])]
    for name in filter(None, (entry["figure"], entry.get("x"))):
        if found and not any(name in one for one in found):
            raise UserError(f"the plan names {title_of(entry)}, but no line of {entry['of']} has the field {name!r}.")


def title_of(entry: dict) -> str:
    """Returns what an entry of [analysis.figures] or [analysis.curves] names, in words."""
    where = ", ".join(f"{name}={value}" for name, value in entry.get("where", {}).items())
    by = f" by {entry['x']}" if "x" in entry else ""
    return f"{entry['figure']} of {entry['of']}{by}" + (f" ({where})" if where else "")


def levels(plan: Plan, mine: dict) -> list[Levels]:
    """Returns the values by arm and seed of every figure of [analysis.figures]."""
    found: dict[str, Levels] = {}
    entries = plan.analysis.get("figures", ())
    others = [entry | {"where": entry["where_second"]} for entry in entries if "where_second" in entry]
    for entry in (*entries, *others):
        name = title_of(entry)
        values = {
            arm: by_seed(mine, arm, lambda line, entry=entry: figure_of(line, entry))
            for arm in plan.stages[plan.analysis["stage"]].arms
        }
        found[name] = Levels(name, entry["unit"], {arm: given for arm, given in values.items() if given})
    return [level for level in found.values() if level.values]


def described(plan: Plan, mine: dict) -> list[Curves]:
    """Returns the curves of [analysis.curves] of which the lines have any point."""
    found = []
    for entry in plan.analysis.get("curves", ()):
        x, where, values = entry["x"], entry.get("where", {}), {}
        check_fields(entry, mine)
        for arm in plan.stages[plan.analysis["stage"]].arms:
            measured = [of for (name, _), line in mine.items() if name == arm for of in lines_of(line, entry["of"])]
            places = sorted({of[x] for of in measured if of.get(x) is not None})
            points = {
                at: by_seed(mine, arm, functools.partial(figure_of, entry=entry | {"where": where | {x: at}}))
                for at in places
            }
            if points := {at: given for at, given in points.items() if given}:
                values[arm] = points
        if values:
            found.append(Curves(title_of(entry), x, entry["unit"], values))
    return found


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
    if "tasks" not in plan.analysis:
        return rows
    for stage in plan.stages.values():
        for arm, variant in itertools.product(stage.arms, stage.variants):
            found = [
                last_run(line) for line in lines
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
    head = ["", "claim", "difference", "claimed", "pairs", "margin", "p", "verdict", "matched pairs only"]
    out = [
        f"# {plan.question}",
        "",
        f"{results.finished} of {results.planned} planned runs of the stage {how['stage']} are in. Differences are "
        f"paired by seed, with 95 % intervals over seeds (Student's t); p of the "
        f"{'contrasts of the endpoint' if how.get('contrasts') else 'differences'} is Holm's.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in [*([results.gate] if results.gate else []), *results.comparisons]:
        margin = f"±{figure(row.margin, row.unit)[1:]}"
        claimed = f"above {figure(row.effect, row.unit)}" if row.effect else "below 0" if row.lower else "above 0"
        matched = "" if row.matched is None else (
            f"{figure(row.matched[0], row.unit)} ({figure(row.matched[1], row.unit)} .. "
            f"{figure(row.matched[2], row.unit)}), {row.matched[3]} pairs"
        )  # fmt: skip
        p = "" if row.holm is None else f"{row.holm:.3f}"
        unit = "" if row.unit == "points" else f" {row.unit}"
        unit = "" if row.p is None else unit
        out.append(
            f"| {row.name} | {row.claim} | {interval(row)}{unit} | {claimed} | {len(row.seeds)} | {margin} | {p} | "
            f"{row.verdict} | {matched} |"
        )
    if lengths := how.get("lengths"):
        out += ["", "Mean share of exact answers over tasks and placements (standard deviation over seeds):", ""]
        out += [
            f"| arm | runs | {' | '.join(f'{length} positions' for length in lengths)} |",
            "|---" * (2 + len(lengths)) + "|",
        ]
        for arm, curve in results.curves.items():
            runs = len(curve[lengths[0]])
            shown = [spread(list(curve[length].values())) for length in lengths]
            out.append(f"| {plan.arms[arm].label} ({arm}) | {runs} | {' | '.join(shown)} |")
    for level in results.levels:
        out += ["", f"{level.name}, {level.unit}:", ""]
        out += ["| arm | runs | mean | standard deviation | lowest | highest |", "|---|---|---|---|---|---|"]
        for arm, by_seed_ in level.values.items():
            values = np.array(list(by_seed_.values()))
            deviation = f"{values.std(ddof=1):.4f}" if len(values) > 1 else "–"
            out.append(
                f"| {plan.arms[arm].label} ({arm}) | {len(values)} | {values.mean():.4f} | {deviation} | "
                f"{values.min():.4f} | {values.max():.4f} |"
            )
    for curves in results.described:
        places = sorted({at for curve in curves.values.values() for at in curve})
        out += ["", f"{curves.name}, {curves.unit} (mean over runs; descriptive):", ""]
        out += [f"| arm | runs | {' | '.join(f'{at:g}' for at in places)} |", "|---" * (2 + len(places)) + "|"]
        for arm, curve in curves.values.items():
            means = [f"{np.mean(list(curve[at].values())):.4f}" if at in curve else "" for at in places]
            runs = max(map(len, curve.values()))
            out.append(f"| {plan.arms[arm].label} ({arm}) | {runs} | {' | '.join(means)} |")
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
    """Returns the figure of the study as PNG: the endpoint by length, or the first of its figures, and the differences
    that have its unit."""
    level = None if plan.analysis.get("lengths") or not results.levels else results.levels[0]
    unit, scale = ("points", 100) if level is None else (level.unit, 1)
    rows = [
        {
            "name": f"{row.name}: {row.claim}", "verdict": row.verdict, "margin": scale * row.margin,
            "above": scale * row.effect,
            "differences": [scale * value for value in row.differences],
            **{name: None if row.p is None else scale * getattr(row, name) for name in ("mean", "low", "high")},
        }
        for row in [*([results.gate] if results.gate else []), *results.comparisons]
        if row.unit == unit
    ]  # fmt: skip
    title = f"{plan.question} ({results.finished} of {results.planned} runs)"
    if level is not None:
        values = {plan.arms[arm].label: list(given.values()) for arm, given in level.values.items()}
        return levels_picture(values, rows, unit, title)
    return study_picture({plan.arms[arm].label: curve for arm, curve in results.curves.items()}, rows, title)


def picture_of_curves(plan: Plan, results: Results) -> bytes | None:
    """Returns the curves that the plan describes as PNG, or None without any."""
    panels = [
        (of.name, of.x, of.unit, {plan.arms[arm].label: curve for arm, curve in of.values.items()})
        for of in results.described
    ]
    return curves_picture(panels, plan.question) if panels else None
