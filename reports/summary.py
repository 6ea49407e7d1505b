"""Builds the first screen of the page: the runs, their main figures and the verdicts."""

import itertools
from collections import Counter

from nanometa.common.statistics import brief
from nanometa.config.tasks import TASKS
from nanometa.reports.compare import between_arms, between_checkpoints
from nanometa.reports.lines import apart, arms_of, told_apart
from nanometa.reports.markup import Markup, details, escaped, first_table, percent
from nanometa.reports.training import Metrics, groups_of, parameters

SHOWN = 6  # verdicts on the first screen; the others are folded


def body(lines: dict[str, list[dict]], runs: list[Metrics], effect: float, margin: float) -> str:
    """Returns the summary of the lines of each kind and of the runs; effect and margin set the verdicts."""
    return weights(lines, runs) + verdicts(lines, effect, margin)


def weights(lines: dict[str, list[dict]], runs: list[Metrics]) -> str:
    """Returns a table with one row for each run and weights: how they were trained, and their main figures."""
    everything = itertools.chain(*lines.values())
    groups = apart(everything, lambda line: (line["run"], line["weights_sha256"]))
    records = {run.name: run.last for run in runs}
    rows = []  # arm, placements, run, step, training length, seed, parameters, lengths, bits per byte, task figures
    for of in groups:
        first, name, arm = of[0], of[0]["run"], of[0]["arm"].partition(", read with ")[0]
        tasks = [line for line in of if line.get("eval") == "tasks" and line["arm"] == arm]
        longest = max((line["length"] for line in tasks), default=first["train_length"])
        ends = list(dict.fromkeys([first["train_length"], longest]))
        figures = [exact(tasks, records.get(name, {}), task, *ends) for task in TASKS]
        rows.append([arm, ", ".join(first["train_placements"] or ()) or "text", name, first["step"],
                     first["train_length"], first["seed"], f"{first['parameters'] / 1e6:.2f}M",
                     " → ".join(map(str, ends)), bits(records.get(name, {})), *figures])  # fmt: skip
    for run in runs:
        if all(of[0]["run"] != run.name for of in groups):
            config = run.facts["config"]
            task = config["task"] if run.tasks else {}
            length = task.get("train_length") or config["model"].get("block_size", "")
            rows.append([run.arm, ", ".join(task.get("placements", ())) or "text", run.name, run.last.get("step", 0),
                         length, run.seed, parameters(run), length, bits(run.last),
                         *(exact([], run.last, task) for task in TASKS)])  # fmt: skip
    arms, placements, names, steps, trained, seeds, sizes, lengths, *figures = map(list, zip(*rows, strict=True))
    labels = told_apart(arms, [[f"with {of}" for of in placements]], list(zip(seeds, trained, strict=True)))
    cells = [Markup(f"{escaped(label)}<br><small>{escaped(name)}, step {step}</small>")
             for label, name, step in zip(labels, names, steps, strict=True)]  # fmt: skip
    heads = ["bits per byte at the end", *(f"{task.replace('_', ' ')}, %" for task in TASKS)]
    columns = {"run": cells, "seed": seeds, "parameters": sizes, "lengths": lengths,
               **dict(zip(heads, figures, strict=True))}  # fmt: skip
    columns = {name: of for name, of in columns.items() if any(cell not in ("", "–") for cell in of)}
    minor = tuple(i for i, name in enumerate(columns) if name in ("seed", "parameters"))
    about = """<p class="small">Arrows lead from the training length to the longest evaluated length, and from the exact
answers at the one to those at the other. Markers are placed as in training. A single figure is that of the last
evaluation during training.</p>
"""
    table = first_table(list(columns), list(zip(*columns.values(), strict=True)), (0,), minor)
    cautions = " ".join(cautions_of(list(zip(labels, trained, strict=True)), seeds, runs))
    warning = f'<p class="small warn">{cautions}</p>\n' if cautions else ""
    return table + warning + about * any(task in columns for task in heads[1:])


def cautions_of(arms: list[tuple], seeds: list, runs: list[Metrics]) -> list[str]:
    """Returns sentences that warn of wrong conclusions from the table. arms, seeds: those of its rows."""
    said = []
    if len(arms) > 1 and len(set(arms)) == len(set(zip(arms, seeds, strict=True))):
        said.append("One seed per arm: differences between rows may be chance.")
    if any(len(set(map(budget, group))) > 1 for group in groups_of(runs)):
        said.append("Training budgets differ: a run may be better only because it was trained on more.")
    return said


def budget(run: Metrics) -> int:
    """Returns the content tokens or texts that a run has seen until its last evaluation."""
    return run.last.get("texts" if run.tasks else "content_tokens", 0)


def bits(record: dict) -> str:
    """Returns the bits per byte of an evaluation during training on text."""
    on_text = "bits_per_byte" in record and not any(name.startswith("exact_") for name in record)
    return f"{record['bits_per_byte']:.4f}" if on_text else ""


def exact(lines: list[dict], record: dict, task: str, *lengths: int) -> str:
    """Returns the shares of exact answers at these lengths, from lines of one run. Without lines it returns the share
    of the last evaluation during training."""
    mine = [line for line in lines if line["task"] == task]
    if not mine:
        return percent(record[f"exact_{task}"]) if f"exact_{task}" in record else ""
    as_trained = [line for line in mine if line["placement"] in (line["train_placements"] or ())] or mine
    cell = {name: as_trained[0][name] for name in ("placement", "level", "question")}
    by_length = {line["length"]: line for line in as_trained if cell.items() <= line.items()}
    found = map(by_length.get, lengths)
    return " → ".join("–" if not of else "impossible" if "impossible" in of else percent(of["exact"]) for of in found)


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
    items = [
        f"<li>{escaped(name)}: {escaped(', '.join(f'{verdict} ({n})' for verdict, n in of.most_common()))}</li>\n"
        for name, of in counts.items()
    ]
    if not items:
        return Markup("")
    rest = details(f"{len(items) - SHOWN} more verdicts", f'<ul class="small">{"".join(items[SHOWN:])}</ul>')
    return Markup(
        f'<p class="small">Verdicts, and in how many cells each was reached:</p>\n<ul class="small">'
        f"{''.join(items[:SHOWN])}</ul>\n{rest if len(items) > SHOWN else ''}"
    )
