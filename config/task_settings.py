"""Settings of the synthetic tasks that a run trains on."""

from dataclasses import dataclass
from typing import Literal

from nanometa.config.checks import check, check_types
from nanometa.config.settings import SET, Settings, setting
from nanometa.config.tasks import PLACEMENTS, Level, Placement, Question, Task

SCATTERED_PLACEMENTS = tuple(name for name, placement in PLACEMENTS.items() if placement.scattered)


@dataclass(frozen=True)
class TaskConfig(Settings):
    """Synthetic tasks to train on, in place of a dataset's text."""

    tasks: tuple[Task, ...] = ()
    """list_recall, segment_counting, parity, copying: texts are made of these in turn; the model and its tokenizer are
    those of the run that init_from names, or from scratch with the tokenizer of the dataset; none = train on text"""
    train_length: int = setting(256, only_with={"tasks": SET})
    """positions of the longest texts, markers, question and answer included; the shortest have 32"""
    level: Level = setting("hard", only_with={"tasks": SET})  # noqa: RUF009
    """difficulty (the size of lists, segments, spans); training also draws the levels below"""
    placements: tuple[Placement, ...] = setting(("target",), only_with={"tasks": SET})
    """where meta-tokens go, texts taking these in turn: target, where the task points (the paper's); every, after
    every list or span; none, an ordinary word pointing instead; background, that word pointing, and meta-tokens at
    random"""
    meta_share: float = setting(0.1, only_with={"placements": SCATTERED_PLACEMENTS})
    """share of a text's positions that background gives to meta-tokens"""
    question: Question = setting("index", only_with={"tasks": ("list_recall",)})  # noqa: RUF009
    """what list recall asks for: item j of a list (the paper's); the item that follows another one in it (after); or
    item j under the name of another list than the one that is pointed at (misnamed, a control)"""
    questions: int = setting(1, only_with={"tasks": ("list_recall",)})
    """in a training text of list recall; the other tasks have one, and so has every text that is evaluated"""
    loss_on: Literal["answer", "all"] = setting("answer", only_with={"tasks": SET})
    """train on the answers alone, or on all content"""
    curriculum_steps: int = setting(0, only_with={"tasks": SET})
    """in so many first steps longest length and level grow, in five phases, from 32 positions and easy"""
    shuffle_answers: bool = setting(False, only_with={"tasks": SET})
    """give every training text the answer of another one: a control that must stay at chance"""

    def __post_init__(self):
        check_types(self)
        for name in ("tasks", "placements"):
            check(self, name, len(set(getattr(self, name))) == len(getattr(self, name)), "name each once")
        check(self, "placements", self.placements, "name one at least")
        check(self, "train_length", 32 <= self.train_length <= 2**20, "lie in 32 .. 1048576")
        check(self, "meta_share", 0 < self.meta_share < 0.9, "lie strictly between 0 and 0.9")
        check(self, "questions", 1 <= self.questions <= 16, "lie in 1 .. 16")
        check(self, "curriculum_steps", self.curriculum_steps >= 0, "be at least 0")
