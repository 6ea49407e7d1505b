"""Registers the names of the synthetic tasks, of their difficulty levels, marker placements and forms of question.

Settings, reports and tests take all lists of these names from here. Each task is implemented in tasks/NAME.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Task = Literal["list_recall", "segment_counting", "parity", "copying"]
TASKS: tuple[str, ...] = get_args(Task)

Level = Literal["easy", "medium", "hard", "extra_hard", "long"]
LEVELS: tuple[str, ...] = get_args(Level)  # in order of difficulty

Question = Literal["index", "after", "misnamed"]
QUESTIONS: tuple[str, ...] = get_args(Question)


@dataclass(frozen=True)
class MarkerPlacement:
    """Where a placement puts meta-tokens and pointer words into the text of a task."""

    pointer: Literal["meta", "word"]
    """What marks the places that the task points at: a meta-token, or the ordinary word "mark"."""
    points_at_named: bool = True
    """Whether the pointer also occurs in tasks whose question names the place (QUESTION_NAMES_PLACE)."""
    after_lists: bool = False
    """Whether a meta-token follows every list, span or group."""
    scattered: bool = False
    """Whether meta-tokens are at random positions throughout the text, as in pretraining."""

    @property
    def has_meta(self) -> bool:
        """Whether texts contain meta-tokens at all."""
        return self.pointer == "meta" or self.after_lists or self.scattered


PLACEMENTS = {
    "target": MarkerPlacement(pointer="meta"),
    "every": MarkerPlacement(pointer="word", points_at_named=False, after_lists=True),
    "none": MarkerPlacement(pointer="word"),
    "background": MarkerPlacement(pointer="word", scattered=True),
}
Placement = Literal[tuple(PLACEMENTS)]


def cells_of(figures: dict, tasks: Iterable[str]) -> dict[str, float]:
    """Returns the share of exact answers of each validated cell, by its name in words.

    A cell is a pair of a task and a placement, such as "copying with background"; or a task, if the run has one
    placement or is older than the figures by placement. figures: those of tasks.source.Answers, among others.
    A task without figures has no cell."""
    cells = {}
    for task in tasks:
        names = {placement: f"exact_{task}_{placement}" for placement in PLACEMENTS}
        placed = {f"{task} with {at}": figures[name] for at, name in names.items() if name in figures}
        whole = {task: figures[f"exact_{task}"]} if f"exact_{task}" in figures else {}
        cells |= placed or whole
    return cells
