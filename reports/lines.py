"""Checks lines of eval.py tasks, groups them into arms, and checks the facts that all lines share."""

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanometa.common.statistics import wilson
from nanometa.config.tasks import LEVELS, PLACEMENTS, QUESTIONS, TASKS

NUMBER = (int, float)
LARGEST = 1e300  # larger numbers overflow where a picture adds a margin to its axes
# facts about its run that every line of an evaluation or probe has (evals/common.facts_of)
FACTS = {
    "arm": (str,), "run": (str,), "checkpoint": (str,), "weights_sha256": (str,), "step": (int,), "seed": (int,),
    "trained_on": (list, str), "train_length": (int,), "train_placements": (list, type(None)), "command": (str,),
    "commit": (str,), "settings": (str,), "parameters": (int,),
}  # fmt: skip
# facts that lines of the first versions lack
LATER = {
    "scaling": (str,), "trained_scaling": (str,), "original_block_size": (int,), "origin": (dict,), "machine": (str,),
    "answered": (dict,),  # only in lines of probes: whether the run has learned the task
}  # fmt: skip
ORIGIN = {
    "weights": (str,), "dataset": (str, type(None)), "train_sha256": (str, type(None)),
    "content_tokens": (int, type(None)),
}  # fmt: skip
CELL = {
    "task": (str,), "placement": (str,), "level": (str,), "question": (str,), "length": (int,),
    "tokens_per_item": NUMBER, "n": (int,),
}  # fmt: skip
MEASURED = {
    "correct": (int,), "exact": NUMBER, "token_accuracy": NUMBER, "token_interval": (list,), "nats": NUMBER,
    "chance": NUMBER, "floors": (dict,), "outcomes": (str,),
}  # fmt: skip
# fields of a cell that lines of the first versions lack
LATER_CELL = {
    "visible": (str,), "semantic_lists": (bool,), "answer_exact": NUMBER, "format_failures": (int,), "aided": (dict,),
}  # fmt: skip
CHOICES = {"task": TASKS, "placement": tuple(PLACEMENTS), "level": LEVELS, "question": QUESTIONS}


class Panel(NamedTuple):
    """A task with its settings, which a picture shows by length."""

    task: str
    placement: str
    level: str
    question: str


class Training(NamedTuple):
    """What a run was trained on, as recorded in its lines. Only arms of equal training are compared."""

    on: tuple[str, ...]  # tasks, or the dataset's folder
    length: int
    placements: tuple[str, ...]  # empty if trained on text
    settings: str  # a hash of all other settings: learning rate, steps, batch and so on


@dataclass(frozen=True)
class Arm:
    """Runs whose lines differ only in the seed."""

    label: str
    training: Training
    lines: dict[tuple[Panel, int], dict[int, dict]]  # by (panel, length) and then by seed

    @property
    def name(self) -> tuple[str, int]:
        """Returns the unique name of the arm in a report."""
        return self.label, self.training.length


def cell_of(line: dict) -> tuple[Panel, int]:
    return Panel(*(line[name] for name in Panel._fields)), line["length"]


def check_facts(line: dict, fields: dict[str, tuple], optional: dict[str, tuple] | None = None) -> None:
    """Raises ValueError if a line lacks a fact about its run or one of `fields` (types by name), or if one of them, or
    of the `optional` fields, has another type."""
    check_numbers(line)
    later = {name: kinds for name, kinds in {**LATER, **(optional or {})}.items() if name in line}
    check_fields(line, FACTS | fields | later)
    if "origin" in later:
        check_fields(line["origin"], ORIGIN)
    check_choices(line, {name: known for name, known in CHOICES.items() if name in fields})
    for name in ("trained_on", "train_placements"):
        if not all(type(item) is str for item in line[name] or ()):
            raise ValueError(f"{name} is {str(line[name])[:40]!r}")
    if not 0 < line["train_length"] <= 2**30:
        raise ValueError(f"its train_length is {line['train_length']}")


def check_numbers(value) -> None:
    """Raises ValueError if a number at any depth of a line is not finite or too large to be drawn."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            check_numbers(part)
    elif (type(value) is int and abs(value) >= 2**63) or (type(value) is float and not abs(value) <= LARGEST):
        raise ValueError(f"the number {str(value)[:40]} is too large")


def check_choices(line: dict, choices: dict[str, Container[str]]) -> None:
    """Raises ValueError if a field has none of its allowed values."""
    for name, known in choices.items():
        if type(line.get(name)) is not str or line[name] not in known:
            raise ValueError(f"{name} is {str(line.get(name))[:40]!r}, but must be one of {', '.join(known)}")


def check_fields(of: dict, fields: dict[str, tuple]) -> None:
    """Raises ValueError if one of `fields` (types by name) is missing or has another type, or if an interval is not a
    pair."""
    for name, kinds in fields.items():
        if name not in of:
            raise ValueError(f"{name} is missing")
        if type(of[name]) not in kinds:
            raise ValueError(f"{name} is {str(of[name])[:40]!r}")
        if name.endswith("interval") and [type(end) in NUMBER for end in of[name]] != [True, True]:
            raise ValueError(f"{name} is {str(of[name])[:40]!r}")


def check(line: dict) -> None:
    """Raises ValueError, with the reason, for a damaged line of eval.py tasks."""
    check_facts(line, CELL if "impossible" in line else CELL | MEASURED, LATER_CELL)
    if not 0 < line["length"] <= 2**30:
        raise ValueError(f"its length is {line['length']}")
    if not math.isfinite(line["tokens_per_item"]) or type(line.get("impossible", "")) is not str:
        raise ValueError("tokens_per_item is not finite, or the reason in the field impossible is not text")
    if "impossible" in line:
        return
    n, right = line["n"], line["correct"]
    if not 0 <= right <= n or n == 0 or not math.isclose(line["exact"], right / n, abs_tol=1e-9):
        raise ValueError(f"exact is {line['exact']}, but {right} of {n} answers are correct")
    if len(line["outcomes"]) != n or Counter(line["outcomes"]) != Counter({"1": right, "0": n - right}):
        raise ValueError(f"its outcomes are not {right} ones and {n - right} zeros")
    shares = [line["token_accuracy"], line["chance"], *line["token_interval"], *line["floors"].values()]
    if not all(type(share) in NUMBER and 0 <= share <= 1 for share in shares):
        raise ValueError("token_accuracy, token_interval, chance or floors is not a share from 0 to 1")
    if not line["floors"] or not math.isfinite(line["nats"]):
        raise ValueError("floors is empty, or nats is not finite")


def key(line: dict) -> tuple:
    """Returns a key that is equal for lines about the same run, the same scaling of positions and the same cell."""
    return line["run"], line["weights_sha256"], line["arm"], cell_of(line)


def apart(lines: Iterable, key: Callable) -> list[list]:
    """Returns the lines in groups of equal keys."""
    groups: dict[tuple, list] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return list(groups.values())


def most_texts(lines: list[dict], key: Callable[[dict], tuple]) -> list[dict]:
    """Returns one line for each key: the one with the most texts, or the last of those with equally many."""
    kept: dict[tuple, dict] = {}
    for line in lines:
        if line.get("n", 0) >= kept.get(key(line), line).get("n", 0):
            kept[key(line)] = line
    return list(kept.values())


def arms_of(lines: list[dict]) -> list[Arm]:
    """Returns the arms in the order in which they first appear. Runs with the same arm and training are its seeds. If
    two of them have the same seed, the lines do not record how they differ, and each becomes an arm of its own."""
    found = []  # (arm, training, its runs' lines)
    for of in apart(lines, lambda line: (line["arm"], training_of(line))):
        runs = apart(of, lambda line: (line["run"], line["weights_sha256"]))
        seeds = {run[0]["seed"] for run in runs}
        together = [runs] if len(seeds) == len(runs) else [[run] for run in runs]
        found += [(of[0]["arm"], training_of(of[0]), runs) for runs in together]
    names, trainings, runs_of = map(list, zip(*found, strict=True)) if found else ([], [], [])
    trained = [f"trained with {', '.join(training.placements) or 'text'}" for training in trainings]
    labels = told_apart(names, [trained, [f"on {', '.join(training.on)}" for training in trainings]])
    settings = [f"settings {training.settings[:6]}" for training in trainings]
    labels = told_apart(labels, [settings, list(map(_runs, runs_of))], [training.length for training in trainings])
    arms = []
    for label, training, runs in zip(labels, trainings, runs_of, strict=True):
        by_cell: dict[tuple, dict[int, dict]] = {}
        for line in (line for run in runs for line in run):
            by_cell.setdefault(cell_of(line), {})[line["seed"]] = line
        arms.append(Arm(label, training, by_cell))
    return arms


def training_of(line: dict) -> Training:
    placements = tuple(map(str, line["train_placements"] or ()))
    return Training(trained_on(line), line["train_length"], placements, line["settings"])


def _runs(runs: list[list[dict]]) -> str:
    line, more = runs[0][0], f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{line['run']}{more}, step {line['step']}, {line['weights_sha256'][:8]}"


def trained_on(line: dict) -> tuple[str, ...]:
    """Returns the tasks that the run of a line was trained on, or the folder of its dataset."""
    on = line["trained_on"]
    return (on,) if isinstance(on, str) else tuple(map(str, on))


def told_apart(labels: list[str], details: Iterable[Iterable[str]], groups: list | None = None) -> list[str]:
    """Returns the labels, extended by the details that distinguish equal ones.

    details: lists of further facts, one for each label; a list is used only where labels are still equal. groups: for
    each label something else that already distinguishes it, such as its dashes in a picture."""
    groups = groups or [""] * len(labels)
    for detail in details:
        known = set(zip(labels, groups, detail, strict=True))
        among = Counter((label, group) for label, group, _ in known)
        labels = [f"{label}, {text}" if among[label, group] > 1 else label
                  for label, group, text in zip(labels, groups, detail, strict=True)]  # fmt: skip
    return labels


def has_learned(line: dict) -> bool:
    """Returns whether the run of a probe's line has learned the task; True if the line does not record it."""
    return (line.get("answered") or {}).get("better", True)


def panels_of(arms: list[Arm]) -> list[Panel]:
    """Returns all panels, in the order of the settings' choices."""
    return sorted({panel for arm in arms for panel, _ in arm.lines}, key=order)


def order(panel: Panel) -> list[int]:
    return [CHOICES[name].index(value) for name, value in panel._asdict().items()]


def impossible(of: dict[int, dict]) -> str:
    """Returns the reason why a cell cannot be measured, from its lines by seed, or "" if it can."""
    return next((line["impossible"] for line in of.values() if "impossible" in line), "")


def summary(of: dict[int, dict], share: str = "exact", interval: str = "") -> tuple[float, float, float]:
    """Returns a share of a cell and the ends of its error bar, from the cell's lines by seed. With one seed the ends
    are the line's field `interval` (over texts), or Wilson's interval of the exact answers if it has none. With several
    seeds the share is their mean, and the ends are the lowest and the highest seed."""
    if len(of) == 1:
        (line,) = of.values()
        return line[share], *(line.get(interval) or wilson(line["correct"], line["n"]))
    shares = [line[share] for line in of.values()]
    return float(np.mean(shares)), min(shares), max(shares)


def share_interval(share: float, n: int) -> tuple[float, float]:
    """Returns Wilson's interval of a share of n texts, for shares whose count is not recorded."""
    return wilson(round(share * n), n)
