"""Reads the plan of a study: a TOML file that states arms, seeds, commands, endpoints and margins before any result.

The tables of a plan:

    [study]       name, question, and `lines`: the file that receives a JSON line for every finished run
    [prepare]     for the name of each dataset, the commands that make it
    [settings]    arguments of train.py that all arms share: pretrain, and finetune for a second run that starts from
                  the first one's weights; without finetune, a cell trains once. With branches = true, the second run
                  has the first one's arguments, too, and continues it as a branch, with its optimizer and data
    [measures.X]  what is measured on the finished runs: `command`, such as "eval.py tasks"; `of`: the run, "pretrain"
                  or "finetune"; its arguments; and optionally the arms that are measured, if not all
    [arms.X]      label, and arguments of this arm in addition: pretrain, finetune; `weights_of`: the arm whose
                  pretrained weights it takes over; `placements`: the placement that replaces another one, for arms
                  without meta-tokens
    [stages.X]    arms, seeds, and optionally fewer = {arm = number of its seeds}, and variants = {name = arguments of
                  the fine-tuning}
    [sizes.X]     a smaller study, to test its machinery: stages, the number of seeds, and arguments of pretrain,
                  finetune and measures; its lines are in out/NAME_X
    [analysis]    endpoint, gate, contrasts, figures and margins, and curves that are described (studies/analysis.py)

In the arguments of measures and of a second run, {pretrain} stands for the folder of the cell's first run.

A cell is one arm with one seed in one stage. Each cell is a series of ordinary commands: train.py once or twice, and
the measures.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.config.checks import nearest_name
from nanometa.config.tasks import PLACEMENTS, TASKS

RUNS = ("pretrain", "finetune")
PROGRAMS = ("eval.py", "probe.py")


@dataclass(frozen=True)
class Measure:
    """A command that measures a finished run of a cell, and writes JSON lines."""

    name: str
    command: tuple[str, ...]
    """program and subcommand, such as ("eval.py", "tasks")"""
    of: str
    """the run that it measures: "pretrain" or "finetune" """
    arguments: tuple[str, ...]
    arms: tuple[str, ...]
    """the arms that are measured"""


@dataclass(frozen=True)
class Arm:
    """An arm of the study, with the arguments that its commands have in addition to those of all arms."""

    name: str
    label: str
    pretrain: tuple[str, ...]
    finetune: tuple[str, ...]
    weights_of: str
    """the arm whose pretraining this arm uses; its own name if it is pretrained itself"""
    placements: dict[str, str]
    """the placement that this arm reads in place of another one; an arm without meta-tokens reads none"""


@dataclass(frozen=True)
class Stage:
    """A part of the study: all its arms with all its seeds. Tuning stages fine-tune each run in several variants."""

    name: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    fewer: dict[str, int]
    """the number of seeds, from the first one on, of the arms that do not have all"""
    variants: dict[str, tuple[str, ...]]
    """arguments of the fine-tuning by the name of the variant; {"": ()} if there is only one"""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed in one stage and one variant: the unit that the queue works on."""

    stage: Stage
    arm: Arm
    seed: int
    variant: str

    @property
    def key(self) -> str:
        """The name of the cell in the lines of the study, such as "deciding/M/17"."""
        return "/".join(filter(None, (self.stage.name, self.arm.name, str(self.seed), self.variant)))


@dataclass(frozen=True)
class Plan:
    """A study as its plan file states it."""

    path: Path
    name: str
    question: str
    lines: Path
    prepare: dict[str, tuple[str, ...]]
    """the commands that make each dataset; the last one is prepare.py"""
    settings: dict[str, tuple[str, ...]]
    """arguments of the training runs of a cell: "pretrain", and "finetune" if there is a second one"""
    branches: bool
    """whether the second run is a branch of the first one, and does not only start from its weights"""
    measures: dict[str, Measure]
    arms: dict[str, Arm]
    stages: dict[str, Stage]
    analysis: dict

    def cells(self) -> list[Cell]:
        """Returns all cells in the order of work: stage by stage, all arms of a seed together."""
        return [
            Cell(stage, self.arms[arm], seed, variant)
            for stage in self.stages.values()
            for number, seed in enumerate(stage.seeds)
            for arm in stage.arms
            if number < stage.fewer.get(arm, len(stage.seeds))
            for variant in stage.variants
        ]


def read_plan(path: str, size: str = "") -> Plan:
    """Returns the plan in a TOML file. size: a name in its [sizes], or "" for the study itself.

    Raises UserError if the file cannot be read, has unknown entries, or names an unknown arm."""
    try:
        raw = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"the plan {path} cannot be read ({error}): give a file such as studies/meta_tokens.toml."
        ) from error
    try:
        return _plan(Path(path), raw, size)
    except KeyError as error:
        raise UserError(f"the plan {path} has no entry {error}: add it, see studies/plan.py.") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"the plan {path} has an entry of a wrong type ({error}): see studies/plan.py.") from error


def _plan(path: Path, raw: dict, size: str) -> Plan:
    _refuse_unknown(path, raw, ("study", "prepare", "settings", "measures", "arms", "stages", "sizes", "analysis"))
    study, smaller = raw["study"], {}
    if size:
        if size not in raw.get("sizes", {}):
            sizes = list(raw.get("sizes", {}))
            cure = nearest_name(size, sizes) if sizes else "it defines none; leave --size out."
            raise UserError(f"{path} has no size {size!r}: {cure}")
        smaller = raw["sizes"][size]
        _refuse_unknown(path, smaller, (*RUNS, "measures", "stages", "seeds"))
    _refuse_unknown(path, raw["settings"], (*RUNS, "branches"))
    raw["settings"]["pretrain"]  # must be there
    branches = raw["settings"].pop("branches", False)
    if type(branches) is not bool or (branches and "finetune" not in raw["settings"]):
        raise UserError(f"{path} has branches={branches!r}: give true, and the arguments of the branches as finetune.")
    # of an argument that is given twice, only the later one is kept
    settings = {name: joined(given, smaller.get(name, ())) for name, given in raw["settings"].items()}
    arms = {}
    for name, arm in raw["arms"].items():
        _refuse_unknown(path, arm, ("label", "pretrain", "finetune", "weights_of", "placements"))
        arms[name] = Arm(
            name, arm["label"], tuple(arm.get("pretrain", ())), tuple(arm.get("finetune", ())),
            arm.get("weights_of", name), dict(arm.get("placements", {})),
        )  # fmt: skip
        for entry in ("finetune", "weights_of"):
            if entry in arm and "finetune" not in settings:
                raise UserError(f"{path} has {entry} in [arms.{name}], but no finetune in [settings]: add it there.")
    measures, fewer = {}, smaller.get("measures", {})
    _refuse_unknown(path, fewer, tuple(raw.get("measures", {})))
    for name, measure in raw.get("measures", {}).items():
        _refuse_unknown(path, measure, ("command", "of", "arguments", "arms"))
        command = tuple(measure["command"].split())
        if command[0] not in PROGRAMS:
            raise UserError(f"{path} measures {name} with {command[0]!r}: {nearest_name(command[0], PROGRAMS)}")
        if measure["of"] not in settings:
            raise UserError(f"{path} measures {name} of {measure['of']!r}: {nearest_name(measure['of'], settings)}")
        arguments = joined(measure["arguments"], fewer.get(name, ()))
        measures[name] = Measure(name, command, measure["of"], arguments, tuple(measure.get("arms", arms)))
    stages = {}
    for name, stage in raw["stages"].items():
        if name not in smaller.get("stages", raw["stages"]):
            continue
        _refuse_unknown(path, stage, ("arms", "seeds", "fewer", "variants"))
        variants = {label: tuple(values) for label, values in stage.get("variants", {"": ()}).items()}
        seeds = tuple(stage["seeds"])[: smaller.get("seeds")]
        if not all(type(seed) is int for seed in stage["seeds"]):
            raise UserError(f"{path} has seeds={stage['seeds']!r} in stage {name}: give a list of whole numbers.")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{path} names a seed of stage {name} twice: name each once.")
        stages[name] = Stage(name, tuple(stage["arms"]), seeds, dict(stage.get("fewer", {})), variants)
    for name in [
        *(arm for measure in measures.values() for arm in measure.arms),
        *(arm.weights_of for arm in arms.values()),
        *(arm for stage in stages.values() for arm in stage.arms),
    ]:
        if name not in arms:
            raise UserError(f"{path} names the arm {name!r}: {nearest_name(name, list(arms))}")
    _check_analysis(path, raw["analysis"], stages, measures)
    name = f"{study['name']}_{size}" if size else study["name"]
    return Plan(
        path, name, study["question"], Path("out", name, "lines.jsonl") if size else Path(study["lines"]),
        {name: tuple(commands) for name, commands in raw["prepare"].items()},
        settings, branches, measures, arms, stages, raw["analysis"],
    )  # fmt: skip


CONTRAST = {"name": str, "claim": str, "first": str, "second": str}
FIGURE = {"name": str, "claim": str, "of": str, "figure": str, "unit": str, "margin": float, "first": str}
TABLES = {  # of [analysis]: the entries of each, with their types
    "gate": CONTRAST | {"length": int, "above": float},
    "contrasts": CONTRAST,
    "figures": FIGURE,
    "curves": {"of": str, "x": str, "figure": str, "unit": str},
}
OPTIONAL = {
    "figures": {"second": str, "where": dict, "where_second": dict, "mean": bool, "lower": bool},
    "curves": {"where": dict, "mean": bool},
}
ENDPOINT = {"tasks": list, "placements": list, "lengths": list, "length": int, "margin": float}


def _check_analysis(path: Path, analysis: dict, stages: dict[str, Stage], measures: dict[str, Measure]) -> None:
    """Raises UserError for an entry of [analysis] that is missing, unknown or of a wrong type, and for an unknown name,
    so that this is known before the first run. stages: those of the study, or of the smaller size."""
    has_endpoint = any(name in analysis for name in (*ENDPOINT, "gate", "contrasts"))
    entries = {"stage": str, **(ENDPOINT if has_endpoint else {})}
    _check_entries(path, "[analysis]", {k: v for k, v in analysis.items() if k not in TABLES}, entries)
    if has_endpoint and "tasks" not in measures:
        raise UserError(f"{path} analyses the endpoint of tasks without [measures.tasks]: add it, see studies/plan.py.")
    if analysis["stage"] not in stages:
        raise UserError(f"{path} analyses stage {analysis['stage']!r}: {nearest_name(analysis['stage'], list(stages))}")
    stage = stages[analysis["stage"]]
    if len(stage.variants) > 1:
        raise UserError(
            f"{path} analyses stage {stage.name!r}, which has {len(stage.variants)} variants, but a seed of an arm "
            f"must have one result: leave variants out of that stage."
        )
    if has_endpoint:
        for name, known in (("tasks", TASKS), ("placements", PLACEMENTS)):
            for value in analysis[name]:
                if value not in known:
                    cure = nearest_name(value, list(known))
                    raise UserError(f"{path} names {value!r} in {name} of [analysis]: {cure}")
    gate = [analysis["gate"]] if "gate" in analysis else []
    for length in [analysis["length"], *(entry.get("length") for entry in gate)] if has_endpoint else []:
        if length not in analysis["lengths"]:
            raise UserError(f"{path} has length={length} in [analysis], which is none of lengths: add it there.")
    for table, entries in TABLES.items():
        for entry in gate if table == "gate" else analysis.get(table, []):
            where = f"[analysis.{table}]"
            _check_entries(path, where, entry, entries, OPTIONAL.get(table, {}))
            for side in ("first", "second"):
                if side in entry and entry[side] not in stage.arms:
                    cure = nearest_name(entry[side], list(stage.arms))
                    raise UserError(f"{path} names the arm {entry[side]!r} in {where} of stage {stage.name}: {cure}")
            if "of" in entry and entry["of"] not in (*RUNS, *measures):
                cure = nearest_name(entry["of"], [*RUNS, *measures])
                raise UserError(f"{path} names a figure of {entry['of']!r} in {where}: {cure}")


def _check_entries(path: Path, where: str, table: dict, entries: dict, optional: dict | None = None) -> None:
    known = entries | (optional or {})
    _refuse_unknown(path, table, tuple(known))
    for name, kind in known.items():
        if name in entries and name not in table:
            raise UserError(f"{path} lacks {name} in {where}: add it.")
        if name in table and not isinstance(table[name], (int, float) if kind is float else kind):
            raise UserError(
                f"{path} has {name}={table[name]!r} in {where}, which has a wrong type: see studies/plan.py."
            )


def joined(first, second) -> tuple[str, ...]:
    """Returns two lists of arguments as one, a config file first. Where both give the same setting, or a config file,
    the second one counts.

    A setting with several values, such as --lengths, is written as one argument: "--lengths 128 256"."""

    def name(argument: str) -> str:
        return argument.split("=")[0].split()[0] if argument.startswith("--") else ""

    given = {name(argument) for argument in second}
    together = [*(argument for argument in first if name(argument) not in given), *second]
    return tuple(sorted(together, key=lambda argument: name(argument) != ""))


def _refuse_unknown(path: Path, table: dict, known: tuple[str, ...]) -> None:
    for name in table:
        if name not in known:
            raise UserError(f"{path} has an unknown entry {name!r}: {nearest_name(name, list(known))}")
