"""Registers the synthetic tasks, the placements of their markers, their levels and the forms of their question.

Every list of these names, in settings, reports and tests, comes from here. A task is also a module, tasks/NAME.py.
"""

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
    """Describes what a placement puts into a task's text, and where."""

    pointer: Literal["meta", "word"]
    """What stands at the places that the task points at: a meta-token, or the ordinary word "mark"."""
    points_at_named: bool = True
    """Whether the pointer also stands in tasks whose question names the place (QUESTION_NAMES_PLACE)."""
    after_lists: bool = False
    """Whether a meta-token follows every list, span or group."""
    scattered: bool = False
    """Whether meta-tokens stand at random positions throughout the text, as in pretraining."""

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
