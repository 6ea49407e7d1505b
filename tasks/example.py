"""Builds the examples of a task: texts with questions and answers, with markers placed, as token ids.

A text is a list of pieces: a word with the space before it, a punctuation mark, or a line end. Every tokenizer used
here splits text at the borders of pieces. The concatenated ids of the pieces are therefore the ids of the text, and a
marker between two pieces splits no token (tests/test_tasks.py).

The placement of the markers decides what they can be used for:

    target      A meta-token stands at each place that the task points at. This is the paper's placement: it shows where
                the answer is before the question is asked.
    none        The ordinary word "mark" stands at the same places. This measures the effect of pointing alone.
    every       A meta-token follows every list, span or group, and "mark" stands at the places that the task points at.
                In list recall nothing points, because the question names the list.
    background  "mark" stands at the places that the task points at, and meta-tokens stand at random places throughout
                the text, as in pretraining.

With one or two meta-tokens in a text, meta-attention is a softmax over one or two keys. Results with `target` therefore
say nothing about meta-tokens as a memory; results with `every` and `background` do.

With visible=marked (the oracle) only a part of each text is read: see tasks/oracle.py.
"""

import functools
import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws, stable_key
from nanometa.common.terminal import BOLD, write
from nanometa.config import TaskConfig
from nanometa.config.command_line import Parser, in_home, run_cli
from nanometa.config.tasks import LEVELS, PLACEMENTS, QUESTIONS
from nanometa.data.inject import marker_places
from nanometa.data.tokenizer import META, Tokenizer, open_tokenizer, write_tokens
from nanometa.tasks import categories, words
from nanometa.tasks.oracle import marked_places

# Placeholder pieces, which the placement turns into a marker, a word or nothing.
POINT = "<point>"  # a place that the task points at
STOP = "<stop>"  # the end of a list, span or group
SPLITS = {"train": range(0, 50), "val": range(50, 75), "test": range(75, 100)}  # percentiles of the hash of a text
ATTEMPTS = 3000  # a text of the test split takes 4 attempts on average
TASK_MODULE = {
    "draft": "writes one text before its markers are placed",
    "CHANCE": "the share of answers that guessing gets right",
    "QUESTION_NAMES_PLACE": "whether the question itself names the place that it asks about",
    "ANSWER_IN_TEXT": "whether the span that the question asks about contains the answer word for word",
    "SIZES": "the least and the largest size of the problem, for every level",
}


@dataclass
class Draft:
    """A text before its markers are placed."""

    body: list[str] = field(default_factory=list)
    """pieces of the text before the questions"""
    questions: list[tuple[list[str], list[str]]] = field(default_factory=list)
    """pieces of each question, and pieces of its answer"""
    shortcuts: dict[str, str] = field(default_factory=dict)
    """answers to the first question by simple heuristics; eval.py prints their accuracy as floors beside each result"""
    aided: dict[str, str] = field(default_factory=dict)
    """answers by programs that are told a part of the answer, such as its first word. They are no floors: they show
    which part of the task is left once that part is known"""
    percentile: int | None = None
    """the number in 0 .. 99 that decides the split of the text; None = a hash of the whole text"""


class Example(NamedTuple):
    """A finished text of a task."""

    ids: np.ndarray
    """(length,) int64, markers included; starts and ends with <|endoftext|>"""
    answers: np.ndarray
    """(length,) bool: whether an id belongs to an answer; the line end after an answer does"""
    draft: Draft
    """the text before its markers were placed"""
    positions: np.ndarray | None = None
    """(length,) int64: position of each id in the whole text, if only a part of the text is read; None = 0, 1, 2 ..."""


@functools.cache
def load_task(name: str) -> ModuleType:
    """Imports the module of a task. Raises TypeError if the module does not define everything in TASK_MODULE."""
    module = importlib.import_module(f"nanometa.tasks.{name}")
    for part, purpose in TASK_MODULE.items():
        if not hasattr(module, part):
            raise TypeError(f"tasks/{name}.py does not define {part} ({purpose}), which every task needs: add it.")
    if set(module.SIZES) != set(LEVELS):
        raise TypeError(
            f"SIZES in tasks/{name}.py has the levels {list(module.SIZES)}, but config/tasks.py has {list(LEVELS)}: "
            f"give a size for each of these levels."
        )
    return module


class Maker:
    """The writer of one task's texts, for one placement and one tokenizer.

    The `draft` function of a task uses the maker's words (`items`, `names`) and its `cost` of pieces in positions."""

    def __init__(self, task: str, placement: str, cfg: TaskConfig, tokenizer: Tokenizer):
        """cfg: gives the form of the question, the number of questions and the share of background markers.

        Raises UserError if this task has no question of that form under this placement."""
        self.name, self.placement, self.cfg, self.tokenizer = task, placement, cfg, tokenizer
        self.markers = PLACEMENTS[placement]
        self.task = load_task(task)
        # False if only the question tells which list it is about
        self.has_pointer = self.markers.points_at_named or not self.task.QUESTION_NAMES_PLACE
        self.semantic = cfg.semantic_lists and task == "list_recall"
        self.items, self.names = words.pools(tokenizer)
        self.categories = categories.pools(tokenizer) if self.semantic else {}
        if cfg.question == "misnamed" and not (self.has_pointer and self.task.QUESTION_NAMES_PLACE):
            raise UserError(
                f"question=misnamed needs a task that both points at a list and names one, and {task} with placement "
                f"{placement} does not: use --tasks list_recall --placements target none."
            )
        if cfg.visible == "marked" and not self.has_pointer:
            raise UserError(
                f"visible=marked reads what the marks enclose, and nothing points in texts of {task} with placement "
                f"{placement}: leave out this placement or set --visible=all."
            )
        pointer = {"meta": META, "word": f" {words.DELIMITER}"}[self.markers.pointer]
        self._placeholders = {
            POINT: [pointer] if self.has_pointer else [],
            STOP: [META] if self.markers.after_lists else [],
        }
        self._ids: dict[str, list[int]] = {META: [tokenizer.meta]}

    def ids(self, pieces: list[str]) -> list[int]:
        """Returns the ids of pieces, with POINT and STOP replaced as the placement demands."""
        out: list[int] = []
        for piece in pieces:
            if piece not in self._ids:
                replaced = self._placeholders.get(piece)
                self._ids[piece] = self.tokenizer.encode(piece).tolist() if replaced is None else self.ids(replaced)
            out += self._ids[piece]
        return out

    def cost(self, *pieces: str) -> int:
        """Returns how many positions the pieces take. Scattered meta-tokens are added later and not counted."""
        return len(self.ids(list(pieces)))

    def longer_names(self, draws: Draws) -> Iterator[str]:
        """Yields all names of two words in random order, for texts that need more names than there are single words."""
        first, last = (categories.ADJECTIVES, list(self.categories)) if self.semantic else (self.names, self.names)
        seen: set[str] = set()
        while len(seen) < len(first) * len(last):
            name = f"{draws.choice(first)} {draws.choice(last)}"
            if name not in seen:
                seen.add(name)
                yield name

    def example(self, split: str, index: int, low: int, high: int, levels: tuple[str, ...]) -> Example:
        """Returns text number `index` of a split ("train/SEED", "val" or "test").

        Its length is drawn from low .. high positions, and its level from `levels`. The text depends only on the
        arguments, the settings and the tokenizer. No text occurs in two of train, val and test: the hash of a text's
        pieces, or the percentile that its draft gives, decides its split, and texts are drawn until one belongs to the
        split asked for.
        Raises UserError if no text of this length and level is found."""
        cfg, kind = self.cfg, split.partition("/")[0]
        key = (self.name, split, index, low, high, levels, self.placement, cfg.question, cfg.questions)
        if self.semantic:
            key += ("semantic lists",)
        for attempt in range(ATTEMPTS):
            draws = Draws(stable_key(*key, attempt))
            room, level = draws.between(low, high) - 2, draws.choice(levels)
            if self.markers.scattered:
                room -= round(cfg.meta_share * room)
            draft = self.task.draft(self, draws, room, level)
            if draft is None or self._percentile(draft) not in SPLITS[kind]:
                continue
            if cfg.shuffle_answers and kind == "train":
                other = self.task.draft(self, draws, room, level)
                if other is None or len(other.questions) != len(draft.questions):
                    continue
                pairs = zip(draft.questions, other.questions, strict=True)
                draft.questions = [(question, answer) for (question, _), (_, answer) in pairs]
            example, places = self._lay_out(draft, draws)
            if low <= len(example.ids) <= high:
                return self._visible_part(example, places) if cfg.visible == "marked" else example
        raise UserError(
            f"{self.name} with placement {self.placement} and questions={cfg.questions} has no text of level "
            f"{' or '.join(levels)} with {low} to {high} positions, as {ATTEMPTS} attempts show: use another length or "
            f"another level."
        )

    @staticmethod
    def _percentile(draft: Draft) -> int:
        """Returns the number in 0 .. 99 that decides the split of a text."""
        if draft.percentile is None:
            return stable_key(draft.body, draft.questions) % 100
        return draft.percentile

    def _lay_out(self, draft: Draft, draws: Draws) -> tuple[Example, np.ndarray]:
        """Returns the example of a draft, and the place (length without scattered meta-tokens,) of each id in it."""
        ids, answers = [self.tokenizer.eot, *self.ids(draft.body)], []
        for question, answer in draft.questions:
            ids += self.ids(question)
            answers += range(len(ids), len(ids) + self.cost(*answer))
            ids += self.ids(answer)
        ids = np.array([*ids, self.tokenizer.eot])
        is_answer, moved_to = np.zeros(len(ids), dtype=bool), np.arange(len(ids))
        is_answer[answers] = True
        if self.markers.scattered:
            # scatter meta-tokens anywhere between the first <|endoftext|> and the last answer
            prompt = ids[1 : len(ids) - 1 - self.cost(*draft.questions[-1][1])]
            share = self.cfg.meta_share
            M = round(share / (1 - share) * len(prompt))
            key = stable_key("background", draws.below(2**62))
            places = marker_places("uniform", 0, 1, len(prompt), M, key)[0] if M else np.zeros(len(prompt), dtype=bool)
            # the new position of each id, shifted by the number of markers before it
            moved_to = np.concatenate([[0], 1 + np.flatnonzero(~places), np.arange(1 + len(prompt), len(ids)) + M])
            scattered = np.full(len(ids) + M, self.tokenizer.meta)
            scattered[moved_to] = ids
            is_answer, ids = np.isin(np.arange(len(scattered)), moved_to[is_answer]), scattered
        return Example(ids, is_answer, draft), moved_to

    def _visible_part(self, example: Example, places: np.ndarray) -> Example:
        """Returns the part of a text that visible=marked leaves. places: as returned by _lay_out."""
        body = example.draft.body
        points = [i for i, piece in enumerate(body) if piece == POINT]
        # with one mark, as in parity, it delimits everything before it
        first = 1 + self.cost(*body[: points[0]]) if len(points) > 1 else 0
        span = range(first, 1 + self.cost(*body[: points[-1] + 1]))
        kept = marked_places(places, span, question=1 + self.cost(*body))
        return Example(example.ids[kept], example.answers[kept], example.draft, kept)


def show(task: str) -> None:
    """Runs the command line of a task's module, which prints examples of the task."""
    run_cli(partial(_show, task))


def _show(task: str, argv: list[str]) -> None:
    parser = Parser(prog=f"python -m nanometa.tasks.{task}", description=f"Prints texts of the task {task}.")
    add = parser.add_argument
    add("--show", type=int, default=1, metavar="N", help="number of texts for each length and placement (default: 1)")
    add("--length", type=int, nargs="+", default=[64, 128], help="maximum positions of a text (default: 64 128)")
    add("--placement", nargs="+", choices=PLACEMENTS, default=tuple(PLACEMENTS), help="marker placement (default: all)")
    add("--level", choices=LEVELS, default="medium", help="difficulty of the texts (default: medium)")
    add("--question", choices=QUESTIONS, help="form of list recall's question (default: index)")
    add("--questions", type=int, help="number of questions in a text of list recall (default: 1)")
    add("--semantic", action="store_true", help="list recall's lists are named after categories of words")
    add("--tokenizer", default="gpt2", help="gpt2, or the folder of a dataset or run (default: gpt2)")
    args = parser.parse_args(argv)
    for name, values, most in (("show", [args.show], 10**6), ("length", args.length, 2**20)):
        if wrong := [value for value in values if not 1 <= value <= most]:
            raise UserError(f"--{name}={wrong[0]} is out of range: it must lie in 1 .. {most}.")
    asked = {name: of for name in ("question", "questions") if (of := getattr(args, name)) is not None}
    if args.semantic:
        asked["semantic_lists"] = True
    if asked and task != "list_recall":
        name = next(iter(asked)).removesuffix("_lists")
        raise UserError(f"--{name} has no effect on {task}: it is only used by list_recall; leave it out.")
    tokenizer, cfg = open_tokenizer(in_home(args.tokenizer)), TaskConfig(**asked)
    makers = [Maker(task, placement, cfg, tokenizer) for placement in args.placement]

    def text(length: int, maker: Maker, index: int = 0) -> Example:
        return maker.example("test", index, math.ceil(0.9 * length), length, (args.level,))

    cells = list(itertools.product(args.length, makers))
    for cell in cells:
        text(*cell)  # raises UserError for an impossible cell before anything is printed
    write(f"tokens per item: {words.tokens_per_item(tokenizer):.3f} (tokenizer {tokenizer.name})\n", BOLD)
    for (length, maker), index in itertools.product(cells, range(args.show)):
        example = text(length, maker, index)
        markers = int((example.ids == tokenizer.meta).sum())
        size = f"{len(example.ids)} positions of at most {length}, {markers} of them markers"
        write(f"--- {maker.placement}, {size}, test text {index} ---\n", BOLD)
        write_tokens(example.ids.tolist(), tokenizer)
        write("\n")
