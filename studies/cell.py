"""Runs one cell of a study: pretrains and fine-tunes a model, evaluates it, and returns its JSON line.

Every step is an ordinary command of this repository. A step that was finished before is not run again, and a training
run that was interrupted continues from its last checkpoint.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import read_json_lines, write_atomically
from nanometa.evals.common import FACTS
from nanometa.studies.plan import Cell, Measure, Plan, joined

# runs a command, given the name of its log; returns its CPU seconds; raises Interrupted or UserError
Run = Callable[[str, list[str]], float]


class Interrupted(Exception):
    """The queue stops before the cell is finished."""


class Step:
    """A command of a cell. Its stamp, a file with the command and its CPU seconds, shows that it was finished."""

    def __init__(self, work: Path, name: str, command: list[str]):
        self.command, self.stamp = command, work / "done" / f"{name}.json"

    def cpu_s(self) -> float | None:
        """Returns the CPU seconds of the command, or None if it was not finished."""
        stamp = json.loads(self.stamp.read_text()) if self.stamp.is_file() else None
        return stamp["cpu_s"] if stamp and stamp["command"] == self.command else None

    def finish(self, cpu_s: float) -> float:
        """Writes the stamp. Returns the CPU seconds."""
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.stamp, json.dumps({"command": self.command, "cpu_s": cpu_s}).encode())
        return cpu_s


def runs_of(plan: Plan, cell: Cell) -> dict[str, str]:
    """Returns the names of the training runs of a cell, "pretrain" and "finetune", in their order.

    Cells of equal seed and arm share the pretraining if they fine-tune it."""
    own = cell.key.replace("/", "_")
    if "finetune" in plan.settings:
        return {"pretrain": f"pretrain_{cell.arm.weights_of}_{cell.seed}", "finetune": f"finetune_{own}"}
    return {"pretrain": f"pretrain_{own}"}


def run_cell(plan: Plan, cell: Cell, work: Path, run: Run) -> dict:
    """Runs the steps of a cell that are not finished. Returns its figures.

    `cpu_s` maps each step to the CPU seconds of the call that finished it. Cells that share a pretraining run report
    the same seconds for it.

    Raises UserError if a command fails, and Interrupted if the queue stops."""
    names, base, cpu_s, measured = runs_of(plan, cell), "--init_from=scratch", {}, {}
    first = str(work / names["pretrain"])
    arguments = {
        kind: [value.replace("{pretrain}", first) for value in values]
        for kind, values in arguments_of(plan, cell).items()
    }
    for kind, name in names.items():
        common = [f"--seed={cell.seed}", f"--out_dir={work}", "--wandb=disabled"]
        cpu_s[name] = train(work, name, [*arguments[kind], *common], base, run)
        base = f"--init_from={work / name}"
        if plan.branches:
            base = f"--branch_from={work / name / (work / name / 'latest').read_text().strip()}"
        for measure in measures_of(plan, cell):
            if measure.of == kind:
                step = f"{name}_{measure.name}"
                cpu_s[step] = measure_run(work, step, [*measure.command, *arguments[measure.name]], name, run)
                measured[measure.name] = [figures_of(line) for line in lines_of(work / f"{step}.jsonl")]
    return {
        **{kind: training_figures(work / name) for kind, name in names.items()},
        "measures": measured,
        "cpu_s": cpu_s,
        **environment_of(*(work / name for name in reversed(names.values()))),
    }


def measures_of(plan: Plan, cell: Cell) -> list[Measure]:
    """Returns what is measured on the runs of a cell."""
    return [measure for measure in plan.measures.values() if cell.arm.name in measure.arms]


def arguments_of(plan: Plan, cell: Cell) -> dict[str, list[str]]:
    """Returns the arguments of each training run and each measure of a cell, without those that name its seed and its
    folders."""
    arm, base = cell.arm, plan.arms[cell.arm.weights_of]
    arguments = {"pretrain": joined(plan.settings["pretrain"], base.pretrain)}
    last = runs_of(plan, cell).popitem()[0]
    if last == "finetune":
        trunk = arguments["pretrain"] if plan.branches else ()
        arguments["finetune"] = joined(trunk, joined(plan.settings["finetune"], arm.finetune))
    arguments[last] = joined(arguments[last], cell.stage.variants[cell.variant])
    arguments |= {measure.name: measure.arguments for measure in measures_of(plan, cell)}
    return {name: placed(cell, list(values)) for name, values in arguments.items()}


def fingerprint(plan: Plan, cell: Cell) -> str:
    """Returns a hash of everything in the plan that the figures of a cell depend on."""
    depends = json.dumps([plan.prepare, arguments_of(plan, cell)], sort_keys=True)
    return hashlib.sha256(depends.encode()).hexdigest()[:16]


def placed(cell: Cell, arguments: list[str]) -> list[str]:
    """Returns arguments with the placements that the arm reads in place of those of the plan."""

    def replaced(argument: str) -> str:
        name, *values = argument.split()
        if name != "--placements":
            return argument
        return " ".join([name, *dict.fromkeys(cell.arm.placements.get(value, value) for value in values)])

    return [replaced(argument) for argument in arguments]


def train(work: Path, name: str, arguments: list[str], base: str, run: Run) -> float:
    """Trains a run to its end, unless it was trained before. Returns the CPU seconds.

    base: how the run starts if it has no checkpoint yet, such as --init_from=scratch."""
    command = ["train.py", *words(arguments), f"--run_name={name}"]
    step = Step(work, name, [*command, base])
    started = any((work / name).glob("step_*"))
    if started and (known := step.cpu_s()) is not None:
        return known
    for old in (work / "done").glob(f"{name}_*.json"):
        old.unlink()  # what was measured on an earlier run of this name
    if not started:
        shutil.rmtree(work / name, ignore_errors=True)  # a start that was killed before its first checkpoint
    cpu_s = run(name, [*command, "--init_from=resume" if started else base])
    if not any(line["kind"] == "final" for line in metrics(work / name)):
        raise Interrupted  # the run received a signal, and saved its state
    return step.finish(cpu_s)


def measure_run(work: Path, name: str, command: list[str], run_name: str, run: Run) -> float:
    """Runs an evaluation or a probe, which writes NAME.jsonl, unless it was run before. Returns the CPU seconds."""
    output = work / f"{name}.jsonl"
    command = [*words(command), f"--run={work / run_name}", f"--output={output}"]
    step = Step(work, name, command)
    if output.is_file() and (known := step.cpu_s()) is not None:
        return known
    output.unlink(missing_ok=True)  # lines of a call that was interrupted
    return step.finish(run(name, command))


def words(arguments: list[str]) -> list[str]:
    """Returns arguments such as "--lengths 128 256" as separate words."""
    return [word for argument in arguments for word in argument.split()]


def metrics(folder: Path) -> list[dict]:
    """Returns the records of a run."""
    return read_json_lines(folder / "metrics.jsonl", lambda line: line["kind"], "train.py", growing=True)


def training_figures(folder: Path) -> dict:
    """Returns the last evaluation of a run, with its step, and the step at which it reached stop_at, if it did."""
    records = metrics(folder)
    final = next(line for line in reversed(records) if line["kind"] == "final")
    reached = [line["step"] for line in records if line["kind"] == "stop_at"]
    figures = {name: value for name, value in final.items() if name not in ("kind", "eval_s")}
    return {**figures, "reached_at": reached[0] if reached else None}


def figures_of(line: dict) -> dict:
    """Returns the figures of a line of a measure, without the facts about its run and the outcome of every text."""
    return {name: value for name, value in line.items() if name not in (*FACTS, "outcomes", "seconds")}


def lines_of(path: Path) -> list[dict]:
    return read_json_lines(path, lambda line: line["arm"], "eval.py or probe.py")


def environment_of(*folders: Path) -> dict:
    """Returns the commits, the machine and the data of the training runs of a cell, over all starts of each run.

    Raises UserError if the runs, or the starts of one run, differ in the machine or the data."""
    found, commits, changed = [], [], False
    for folder in folders:
        saved = json.loads((folder / "config.json").read_text())
        names = ("processor", "cpu_capability", "threads", "torch")
        for start in (*saved.get("earlier_environments", ()), saved["environment"]):
            found.append({name: start[name] for name in names} | {"data": saved["data"]["content_sha256"]})
            commits.append(start["commit"])
            changed |= start["uncommitted_changes"]
    for name in found[0]:
        values = [str(one[name]) for one in found]
        if len(set(values)) > 1:
            raise UserError(
                f"the starts of {' and '.join(map(str, folders))} differ in {name} ({', '.join(values)}): delete these "
                f"folders, so that the cell starts again."
            )
    return {**found[0], "commit": " and ".join(dict.fromkeys(commits)), "uncommitted_changes": changed}
