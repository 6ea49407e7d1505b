"""python eval.py tasks: measures the share of task texts that a run answers exactly, by length and placement."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.statistics import bootstrap_ratio, wilson
from nanometa.config import Level, Placement, Question, Task
from nanometa.config.settings import setting
from nanometa.config.tasks import TASKS
from nanometa.data.layout import Batch
from nanometa.evals.common import POSITIONS, Evaluation, check_finite, check_ranges, fits, progress
from nanometa.inference.scoring import score_batch
from nanometa.tasks.example import Example, Maker
from nanometa.tasks.source import collate, count_right
from nanometa.tasks.words import tokens_per_item
from nanometa.training.checkpoint import Run


@dataclass(frozen=True)
class TasksEval(Evaluation):
    """Accuracy on texts of the synthetic tasks, by length."""

    READS = ("limited", "previous")

    tasks: tuple[Task, ...] = ()
    """tasks to evaluate; if empty, those that the run was trained on, or all"""
    lengths: tuple[int, ...] = (128, 256, 512)
    """maximum positions of the texts of a cell; the shortest texts have nine tenths of that"""
    placements: tuple[Placement, ...] = ()
    """placements of the meta-tokens; if empty, those of the run's training, or target"""
    level: Level | None = None
    """difficulty of the texts; None = the run's level, or hard"""
    question: Question | None = setting(None, only_with={"tasks": ((), "list_recall")})  # noqa: RUF009
    """form of the question in list recall; None = the run's"""
    n: int = 1000
    """number of texts in a cell"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, lengths=(8, 2**20), n=(1, 10**6))

    def cells(self, run: Run) -> list[tuple[Maker, str, int]]:
        """Returns the Maker of each cell's texts, their level and length. Raises UserError for impossible questions."""
        trained = run.config.task
        tasks, placements = self.tasks or trained.tasks or TASKS, self.placements or trained.placements
        if self.question and "list_recall" not in tasks:
            raise UserError(
                f"--question has no effect on {', '.join(tasks)}, the tasks of {run.folder}: leave it out, or add "
                f"--tasks=list_recall."
            )
        question = self.question or trained.question
        settings = dataclasses.replace(trained, question=question, questions=1, shuffle_answers=False)
        level = self.level or (trained.level if trained.tasks else "hard")
        makers = [Maker(*pair, settings, run.tokenizer) for pair in itertools.product(tasks, placements)]
        return list(itertools.product(makers, (level,), self.lengths))


def main(cfg: TasksEval) -> None:
    """Runs the evaluation: writes a JSON line and prints a line for each cell."""
    run, facts = cfg.open()
    cells = cfg.cells(run)
    for maker, level, length in cells:
        if not fits(run, length):
            texts(maker, level, length, 1)  # raises UserError before anything is measured
    measured = (measure_tasks(run, *cell, cfg.n) for cell in cells)
    heading = f", {tokens_per_item(run.tokenizer):.3f} tokens per item"
    cfg.record(run, facts, "tasks", (one for line in measured for one in (line, sentence(line))), heading)


def measure_tasks(run: Run, maker: Maker, level: str, length: int, n: int) -> dict:
    """Returns the JSON line of one cell, measured on n texts of the test split.

    All runs with the same tokenizer get the same texts."""
    cell = {"eval": "tasks", **about(maker, level, length)}
    if why := fits(run, length):
        return {**cell, "n": 0, "impossible": why}
    started = time.perf_counter()
    label = f"{maker.name}, {maker.placement}, {length} positions: writing and answering texts"
    with progress(label, 2 * n) as advance:
        examples = texts(maker, level, length, n, advance=advance)
        figures, floors, aided = read(run, examples, length, advance), floors_of(examples), aided_of(examples)
    rest = {"chance": maker.task.CHANCE, "floors": floors, **({"aided": aided} if aided else {})}
    rest["seconds"] = time.perf_counter() - started
    return {**cell, **figures, **rest}


def about(maker: Maker, level: str, length: int) -> dict:
    """Returns the fields of a JSON line that describe its cell."""
    return {
        "task": maker.name, "placement": maker.placement, "level": level, "question": maker.cfg.question,
        "length": length, "visible": maker.cfg.visible, "semantic_lists": maker.semantic,
        "tokens_per_item": tokens_per_item(maker.tokenizer),
    }  # fmt: skip


def texts(
    maker: Maker, level: str, length: int, n: int, split: str = "test", advance: Callable[[int], None] = lambda n: None
) -> list[Example]:
    """Returns the first n texts of a split that have from nine tenths of `length` to `length` positions.

    advance: called with 1 after each text, to show progress."""
    out = []
    for i in range(n):
        out.append(maker.example(split, i, math.ceil(0.9 * length), length, (level,)))
        advance(1)
    return out


def floors_of(examples: list[Example]) -> dict[str, float]:
    """Returns for each shortcut of the task the share of texts that it answers exactly."""
    return _shares(examples, [example.draft.shortcuts for example in examples])


def aided_of(examples: list[Example]) -> dict[str, float]:
    """Returns the same for each program that is told a part of the answer; these shares are no floors."""
    return _shares(examples, [example.draft.aided for example in examples])


def _shares(examples: list[Example], given: list[dict[str, str]]) -> dict[str, float]:
    """Returns by name the share of right answers among those given to each text."""
    answers = ["".join(example.draft.questions[0][1]).strip() for example in examples]
    return {
        name: sum(of[name].strip() == answer for of, answer in zip(given, answers, strict=True)) / len(examples)
        for name in given[0]
    }


def answered(run: Run, maker: Maker, level: str, length: int, n: int) -> dict:
    """Tests quickly whether a run has learned the task that a probe asks about.

    Returns the share of exact answers to the first texts of a cell, 100 at most, and the floor: the larger of chance
    and the best shortcut on the same texts. `better` is true if the Wilson interval lies above the floor."""
    examples = texts(maker, level, length, min(n, 100))
    figures, floor = read(run, examples, length), max(maker.task.CHANCE, *floors_of(examples).values())
    return {
        "n": len(examples), "exact": figures["exact"], "interval": figures["interval"], "floor": floor,
        "better": figures["interval"][0] > floor,
    }  # fmt: skip


def doubt(run: Run, found: list[tuple[Maker, int, dict]]) -> str:
    """Returns a warning if the run has not learned the task of every cell of a probe, and "" if it has.

    found: for each cell its maker, its length and the result of `answered`."""
    if not run.config.task.tasks:
        return (
            f"warning: {run.folder} was trained on no task, so right answers cannot be expected: use a run of "
            f"config/tiny_tasks.py, or read the results as the behavior of a plain language model on task texts."
        )
    weak = [
        f"{cell['exact']:.1%} of {maker.name} {maker.placement} {length} (shortcut or chance {cell['floor']:.1%})"
        for maker, length, cell in found
        if not cell["better"]
    ]
    if not weak:
        return ""
    return (
        f"warning: of the first {found[0][2]['n']} texts, {run.folder} answers {', '.join(weak)} exactly, no better "
        f"than a shortcut or chance: verdicts about these cells say nothing about how the run solves the task."
    )


def batches_of(run: Run, examples: list[Example], size: int) -> Iterator[tuple[slice, Batch]]:
    """Yields Batches of `size` texts on the model's device, each with the slice of `examples` that it contains."""
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        numbers, T = np.arange(start, start + len(part)), max(len(example.ids) for example in part)
        batch = collate(part, numbers, T, run.config, run.tokenizer, "tasks test")
        yield slice(start, start + len(part)), batch.to(run.model.wte.weight.device)


def read(run: Run, examples: list[Example], length: int, advance: Callable[[int], None] = lambda n: None) -> dict:
    """Returns the figures of a run on texts of at most `length` positions.

    advance: called with the number of texts after each batch, to show progress.
    Raises UserError if the model's loss is not finite."""
    counts, nats, n, size = [], 0.0, len(examples), max(1, POSITIONS // length)
    for part, batch in batches_of(run, examples, size):
        scores = score_batch(run.model, batch)
        nats += float(scores.nats.sum())
        counts += count_right(scores.targets, scores.right).tolist()
        advance(part.stop - part.start)
    check_finite(run, np.array(nats))
    exact, ids, right = np.array(counts).T
    written = right == ids  # all ids of the answer are right, but perhaps not the line end
    # nats: per answer; outcomes: 1 or 0 for each text, for paired tests
    return {
        "n": n, "correct": int(exact.sum()), "exact": float(exact.mean()), "interval": wilson(int(exact.sum()), n),
        "token_accuracy": float(right.sum() / ids.sum()), "token_interval": bootstrap_ratio(right, ids),
        "answer_exact": float(written.mean()), "format_failures": int((written & (exact == 0)).sum()),
        "nats": nats / n, "outcomes": "".join(map(str, exact.astype(int))),
    }  # fmt: skip


def cell_name(line: dict) -> str:
    """Returns the cell of a line as the start of a printed line."""
    question = "" if line["question"] == "index" else f" {line['question']}"
    lists = " semantic" if line.get("semantic_lists") else ""
    part = " only what is marked" if line.get("visible") == "marked" else ""
    return f"{line['task']:<16} {line['placement']:<10} {line['level']:<10} {line['length']:>5}{question}{lists}{part}"


def sentence(cell: dict) -> str:
    """Returns the printed line of a cell."""
    name = cell_name(cell)
    if "impossible" in cell:
        return f"{name}  impossible: {cell['impossible']}\n"
    low, high = cell["interval"]
    best = max(cell["floors"], key=cell["floors"].get)
    failures = cell["format_failures"]
    without = f"  ({cell['answer_exact']:.1%} without the line end, {failures} format failures)" if failures else ""
    aided = "".join(f"  {name} {share:.1%}" for name, share in cell.get("aided", {}).items())
    return (
        f"{name}  exact {cell['exact']:6.1%} ({low:.1%} .. {high:.1%}, n = {cell['n']}){without}"
        f"  tokens {cell['token_accuracy']:.1%}  chance {cell['chance']:.1%}"
        f"  shortcut {cell['floors'][best]:.1%} ({best}){aided}  {cell['seconds']:.1f} s\n"
    )
