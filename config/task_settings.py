"""Defines TaskConfig, the settings of a run that trains on the synthetic tasks."""

from dataclasses import dataclass
from typing import Literal

from nanometa.config.checks import check, check_types
from nanometa.config.settings import SET, Settings, setting
from nanometa.config.tasks import PLACEMENTS, Level, Placement, Question, Task

SCATTERED_PLACEMENTS = tuple(name for name, placement in PLACEMENTS.items() if placement.scattered)


@dataclass(frozen=True)
class TaskConfig(Settings):
    """Synthetic tasks to train on instead of the text of a dataset."""

    tasks: tuple[Task, ...] = ()
    """tasks to train on, in turn; by default the run trains on the text of the dataset. The model and the tokenizer
    come from the run that init_from names; with init_from=scratch, the model is new and the tokenizer is that of the
    dataset"""
    train_length: int = setting(256, only_with={"tasks": SET})
    """positions of the longest texts, including markers, question and answer; the shortest texts have 32, or more if
    the tokenizer needs many tokens for a word"""
    level: Level = setting("hard", only_with={"tasks": SET})  # noqa: RUF009
    """highest difficulty (the sizes of lists, segments and spans); training also includes all lower levels"""
    placements: tuple[Placement, ...] = setting(("target",), only_with={"tasks": SET})
    """where meta-tokens go; several placements are used in turn. target: at the places that the task points at, as in
    the paper; every: after every list or span; none: nowhere, an ordinary word points instead; background: at random
    positions, and an ordinary word points"""
    curriculum_steps: int = setting(0, only_with={"tasks": SET})
    """number of initial steps with a curriculum: the maximum length and the level grow in five phases, starting at 32
    positions, or more if the tokenizer needs many tokens for a word, and level easy; 0 = no curriculum"""
    loss_on: Literal["answer", "all"] = setting("answer", only_with={"tasks": SET})
    """tokens to train on: only the answers, or all content tokens"""
    meta_share: float = setting(0.1, only_with={"placements": SCATTERED_PLACEMENTS})
    """for placement background: share of a text's positions that are meta-tokens"""
    question: Question = setting("index", only_with={"tasks": ("list_recall",)})  # noqa: RUF009
    """what list recall asks for. index: item j of a list, as in the paper; after: the item that follows a given item;
    misnamed (a control): item j of the list that the pointer marks, while the question names another list"""
    questions: int = setting(1, only_with={"tasks": ("list_recall",)})
    """questions per training text of list recall; other tasks and all evaluation texts have one"""
    semantic_lists: bool = setting(False, only_with={"tasks": ("list_recall",)})
    """name the lists of list recall after categories (fruit, tool ...) and fill them with members, as in the paper's
    example; otherwise names and items are drawn regardless of their meaning"""
    visible: Literal["all", "marked"] = setting("all", only_with={"tasks": SET})
    """what the model reads of a text, in training and evaluation. marked (the oracle, a positive control): only what
    the marks enclose and the question, at their positions in the whole text"""
    shuffle_answers: bool = setting(False, only_with={"tasks": SET})
    """give every training text the answer of another text: a control whose accuracy must stay at chance"""

    def __post_init__(self):
        check_types(self)
        for name in ("tasks", "placements"):
            check(self, name, len(set(getattr(self, name))) == len(getattr(self, name)), "name each once")
        check(self, "placements", self.placements, "name one at least")
        check(self, "train_length", 32 <= self.train_length <= 2**20, "lie in 32 .. 1048576")
        check(self, "meta_share", 0 < self.meta_share < 0.9, "lie strictly between 0 and 0.9")
        check(self, "questions", 1 <= self.questions <= 16, "lie in 1 .. 16")
        check(self, "curriculum_steps", self.curriculum_steps >= 0, "be at least 0")
        by_meaning = self.semantic_lists and self.question == "after"
        check(self, "semantic_lists", not by_meaning, "be False with question=after, whose lists share an item")
        part = self.visible == "marked" and self.loss_on == "all"
        check(self, "visible", not part, "be all with loss_on=all, which also predicts what the oracle leaves out")
