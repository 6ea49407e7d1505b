"""python eval.py tasks: how many texts of a task does a run answer exactly, by length and placement?"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nanometa.common.statistics import bootstrap_ratio, wilson
from nanometa.common.terminal import BOLD, write
from nanometa.config import Level, Placement, Question, Task, TaskConfig
from nanometa.config.checks import check
from nanometa.config.settings import setting
from nanometa.config.tasks import TASKS
from nanometa.data.layout import Batch
from nanometa.evals.common import POSITIONS, Evaluation, check_finite, check_lengths, fits, write_lines
from nanometa.inference.scoring import score_batch
from nanometa.tasks.example import Example, Maker
from nanometa.tasks.source import collate, count_right
from nanometa.tasks.words import tokens_per_item
from nanometa.training.checkpoint import Run


@dataclass(frozen=True)
class TasksEval(Evaluation):
    """Exact answers to texts of the synthetic tasks, by length."""

    tasks: tuple[Task, ...] = ()
    """by default those that the run was trained on, else all"""
    lengths: tuple[int, ...] = (128, 256, 512)
    """positions of the longest texts of a cell; the shortest have nine tenths of that"""
    placements: tuple[Placement, ...] = ()
    """where meta-tokens stand; by default as in the run's training, else target"""
    level: Level | None = None
    """by default the run's, else hard"""
    question: Question | None = setting(None, only_with={"tasks": ((), "list_recall")})  # noqa: RUF009
    """of list recall; by default the run's"""
    n: int = 1000
    """texts in a cell"""

    def __post_init__(self):
        super().__post_init__()
        check_lengths(self)
        check(self, "n", 1 <= self.n <= 10**6, "lie in 1 .. 1000000")

    def cells(self, run: Run) -> Iterator[tuple[str, str, TaskConfig, str, int]]:
        """Task, placement, settings, level and length of every cell."""
        trained = run.config.task
        tasks, placements = self.tasks or trained.tasks or TASKS, self.placements or trained.placements
        question = self.question or trained.question
        settings = dataclasses.replace(trained, question=question, questions=1, shuffle_answers=False)
        level = self.level or (trained.level if trained.tasks else "hard")
        return itertools.product(tasks, placements, (settings,), (level,), self.lengths)


def main(cfg: TasksEval) -> None:
    run, facts = cfg.open()
    output = cfg.lines(run, "tasks")
    cells = list(cfg.cells(run))
    for task, placement, settings, _, _ in cells:
        Maker(task, placement, settings, run.tokenizer)  # what cannot be asked is refused by here
    write(f"{facts['arm']}, {run.folder}, {tokens_per_item(run.tokenizer):.3f} tokens an item\n", BOLD)
    with cfg.autocast(run):
        for where in cells:
            cell = measure_tasks(run, *where, cfg.n)
            write_lines(output, [{**facts, **cell}])
            write(sentence(cell) + "\n")
    write(f"{output}\n", BOLD)


def measure_tasks(run: Run, task: str, placement: str, settings: TaskConfig, level: str, length: int, n: int) -> dict:
    """One cell: n texts of the test split. The same texts for every run with this tokenizer."""
    maker = Maker(task, placement, settings, run.tokenizer)
    cell = {"eval": "tasks", **about(maker, level, length)}
    if why := fits(run, length):
        return {**cell, "n": 0, "impossible": why}
    started, examples = time.perf_counter(), texts(maker, level, length, n)
    figures, floors = read(run, examples, length), floors_of(examples)
    rest = {"chance": maker.task.CHANCE, "floors": floors, "seconds": time.perf_counter() - started}
    return {**cell, **figures, **rest}


def about(maker: Maker, level: str, length: int) -> dict:
    """What a line says of its cell."""
    return {
        "task": maker.name, "placement": maker.placement, "level": level, "question": maker.cfg.question,
        "length": length, "tokens_per_item": tokens_per_item(maker.tokenizer),
    }  # fmt: skip


def texts(maker: Maker, level: str, length: int, n: int, split: str = "test") -> list[Example]:
    """The first n of a split, of nine tenths of `length` positions to all of them."""
    return [maker.example(split, i, math.ceil(0.9 * length), length, (level,)) for i in range(n)]


def floors_of(examples: list[Example]) -> dict[str, float]:
    """Shortcut -> the share of the texts that it answers exactly."""
    answers = ["".join(example.draft.questions[0][1]).strip() for example in examples]
    return {
        name: sum(e.draft.shortcuts[name].strip() == a for e, a in zip(examples, answers, strict=True)) / len(examples)
        for name in examples[0].draft.shortcuts
    }


def answered(run: Run, maker: Maker, level: str, length: int, n: int) -> dict:
    """A quick look at whether a run can do what a probe asks: exact answers to the first texts of a cell, 100 at most,
    beside chance and the shortcuts on the same texts. `better`: Wilson's interval lies above both."""
    examples = texts(maker, level, length, min(n, 100))
    figures, floor = read(run, examples, length), max(maker.task.CHANCE, *floors_of(examples).values())
    return {
        "n": len(examples), "exact": figures["exact"], "interval": figures["interval"], "floor": floor,
        "better": figures["interval"][0] > floor,
    }  # fmt: skip


def doubt(run: Run, found: list[tuple[Maker, int, dict]]) -> str:
    """What is to be said first if a run has not learned what a probe asks, "" if it has: of each cell its maker, its
    length and what it `answered`."""
    if not run.config.task.tasks:
        return (
            f"warning: {run.folder} was trained on no task, so that no answer can be expected of it: take a run of "
            f"config/tiny_tasks.py, or read what follows as what a model of text makes of such texts.\n"
        )
    weak = [
        f"{maker.name} {maker.placement} {length} to {of['exact']:.1%} against {of['floor']:.1%}"
        for maker, length, of in found
        if not of["better"]
    ]
    if not weak:
        return ""
    return (
        f"warning: {run.folder} answers {'; '.join(weak)} of a shortcut or chance, of the first {found[0][2]['n']} "
        f"texts: no better, so that verdicts there say nothing of how it solves the task\n"
    )


def batches_of(run: Run, examples: list[Example], size: int) -> Iterator[tuple[slice, Batch]]:
    """Yields the texts as Batches of `size` on the model's device, each with the slice of the texts that it holds."""
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        numbers, T = np.arange(start, start + len(part)), max(len(example.ids) for example in part)
        batch = collate(part, numbers, T, run.config, run.tokenizer, "tasks test")
        yield slice(start, start + len(part)), batch.to(run.model.wte.weight.device)


def read(run: Run, examples: list[Example], length: int) -> dict:
    """Figures of texts of at most `length` positions. Raises UserError for a model that gives no numbers."""
    counts, nats, n, size = [], 0.0, len(examples), max(1, POSITIONS // length)
    for _, batch in batches_of(run, examples, size):
        scores = score_batch(run.model, batch)
        nats += float(scores.nats.sum())
        counts += count_right(scores.targets, scores.right).tolist()
    check_finite(run, np.array(nats))
    exact, ids, right = np.array(counts).T
    return {
        "n": n,
        "correct": int(exact.sum()),
        "exact": float(exact.mean()),
        "interval": wilson(int(exact.sum()), n),
        "token_accuracy": float(right.sum() / ids.sum()),
        "token_interval": bootstrap_ratio(right, ids),
        "nats": nats / n,  # of a whole answer
        "outcomes": "".join(map(str, exact.astype(int))),  # by text, for paired tests
    }


def sentence(cell: dict) -> str:
    """A cell for a person."""
    question = "" if cell["question"] == "index" else f" {cell['question']}"
    name = f"{cell['task']:<16} {cell['placement']:<10} {cell['level']:<10} {cell['length']:>5}{question}"
    if "impossible" in cell:
        return f"{name}  impossible: {cell['impossible']}"
    low, high = cell["interval"]
    best = max(cell["floors"], key=cell["floors"].get)
    return (
        f"{name}  exact {cell['exact']:6.1%} ({low:.1%} .. {high:.1%}, n = {cell['n']})  tokens "
        f"{cell['token_accuracy']:.1%}  chance {cell['chance']:.1%}  shortcut {cell['floors'][best]:.1%} ({best})  "
        f"{cell['seconds']:.1f} s"
    )
