"""python eval.py tasks: how many texts of a task does a run answer exactly, by length and placement?"""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from checkpoint import Run
from config import Level, Placement, Question, Task, TaskConfig, check
from evals.common import POSITIONS, Evaluation, check_lengths, connected, fits, hidden_of, write_lines
from loss import scored_rows, token_hits, token_nats
from stats import bootstrap_ratio, wilson
from tasks import TASKS
from tasks.example import Example, Maker
from tasks.source import collate, count_right
from tasks.words import tokens_per_item
from terminal import BOLD, write


@dataclass(frozen=True)
class TasksEval(Evaluation):
    """Exact answers to texts of the synthetic tasks, by length."""

    tasks: tuple[Task, ...] = ()
    """list_recall, segment_counting, parity, copying; by default those that the run was trained on, else all"""
    lengths: tuple[int, ...] = (128, 256, 512)
    """positions of the longest texts of a cell; the shortest have nine tenths of that"""
    placements: tuple[Placement, ...] = ()
    """target, every, none, background; by default those that the run was trained with, else target"""
    level: Level | None = None
    """by default the run's, else hard"""
    question: Question | None = None
    """of list recall: index, after, misnamed; by default the run's"""
    n: int = 1000
    """texts in a cell"""

    def __post_init__(self):
        super().__post_init__()
        check_lengths(self)
        check(self, "n", 1 <= self.n <= 10**6, "lie in 1 .. 1000000")


def main(cfg: TasksEval) -> None:
    run, facts = cfg.open()
    trained = run.config.task
    settings = dataclasses.replace(
        trained, question=cfg.question or trained.question, questions=1, shuffle_answers=False
    )
    output = cfg.lines(run, "tasks")
    write(f"{facts['arm']}, {run.folder}, {tokens_per_item(run.tokenizer):.3f} tokens an item\n", BOLD)
    with cfg.autocast(run):
        for task in cfg.tasks or trained.tasks or TASKS:
            for placement in cfg.placements or trained.placements:
                for length in cfg.lengths:
                    level = cfg.level or (trained.level if trained.tasks else "hard")
                    cell = measure(run, task, placement, settings, level, length, cfg.n)
                    write_lines(output, [{**facts, **cell}])
                    write(sentence(cell) + "\n")
    write(f"{output}\n", BOLD)


def measure(run: Run, task: str, placement: str, settings: TaskConfig, level: str, length: int, n: int) -> dict:
    """One cell: n texts of the test split. The same texts for every run with this tokenizer."""
    maker = Maker(task, placement, settings, run.tokenizer)
    cell = {
        "eval": "tasks", "task": task, "placement": placement, "level": level, "question": settings.question,
        "length": length, "tokens_per_item": tokens_per_item(run.tokenizer),
    }  # fmt: skip
    if why := fits(run, length):
        return {**cell, "n": 0, "impossible": why}
    started, examples, counts, nats = time.perf_counter(), [], [], 0.0
    for part in batches(maker, level, length, n):
        T = max(len(example.ids) for example in part)
        numbers = np.arange(len(examples), len(examples) + len(part))
        drawn = connected(run, numbers, T, "tasks test")
        batch = collate(part, T, run.tokenizer, run.config.target_rule, connected=drawn).to(run.model.wte.weight.device)
        hidden, targets = scored_rows(hidden_of(run, batch), batch.targets, batch.scored_index)
        head = (run.model.wte.weight, targets, run.tokenizer.n_content)
        right = token_hits(hidden, *head).view(len(part), -1)
        nats += float(token_nats(hidden, *head).sum())
        counts += count_right(targets.view(len(part), -1), right).tolist()
        examples += part
    exact, ids, right = np.array(counts).T
    tokens = bootstrap_ratio(right, ids)
    answers = ["".join(example.draft.questions[0][1]).strip() for example in examples]
    floors = {
        name: sum(e.draft.shortcuts[name].strip() == a for e, a in zip(examples, answers, strict=True)) / n
        for name in examples[0].draft.shortcuts
    }
    return {
        **cell,
        "n": n,
        "correct": int(exact.sum()),
        "exact": float(exact.mean()),
        "interval": wilson(int(exact.sum()), n),
        "token_accuracy": float(right.sum() / ids.sum()),
        "token_interval": tokens,
        "nats": nats / n,  # of a whole answer
        "chance": maker.task.CHANCE,
        "floors": floors,
        "outcomes": "".join(map(str, exact.astype(int))),  # by text, for paired tests
        "seconds": time.perf_counter() - started,
    }


def batches(maker: Maker, level: str, length: int, n: int) -> Iterator[list[Example]]:
    """The first n texts of the test split, as many at a time as a forward takes."""
    size = max(1, POSITIONS // length)
    for start in range(0, n, size):
        numbers = range(start, min(start + size, n))
        yield [maker.example("test", i, math.ceil(0.9 * length), length, (level,)) for i in numbers]


def sentence(cell: dict) -> str:
    """A cell for a person."""
    name = f"{cell['task']:<16} {cell['placement']:<10} {cell['level']:<10} {cell['length']:>5}"
    if "impossible" in cell:
        return f"{name}  impossible: {cell['impossible']}"
    low, high = cell["interval"]
    best = max(cell["floors"], key=cell["floors"].get)
    return (
        f"{name}  exact {cell['exact']:6.1%} ({low:.1%} .. {high:.1%}, n = {cell['n']})  tokens "
        f"{cell['token_accuracy']:.1%}  chance {cell['chance']:.1%}  shortcut {cell['floors'][best]:.1%} ({best})  "
        f"{cell['seconds']:.1f} s"
    )
