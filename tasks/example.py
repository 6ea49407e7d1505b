"""One example of a task: a text with questions and answers, its markers placed, as ids of a given length.

A text is a list of pieces. Each piece is whole pre-tokens of every tokenizer used here (a word with the space before
it, a mark of punctuation, a line's end), so the ids of the pieces, joined, are the ids of the text, and a marker
between two of them splits no token (tests/test_tasks.py).

Where the markers go is a switch, since it decides what a marker can be good for:

    target      a meta-token at each place that the task points at (the paper's: it shows the answer's place before the
                question is asked)
    none        an ordinary word, "mark", at the same places: what pointing alone does
    every       a meta-token after every list, span or group, and "mark" at the places that the task points at; in list
                recall nothing points, since its question names the list
    background  "mark" at the places that the task points at, and meta-tokens at random places all over the text, as in
                pretraining

With one or two meta-tokens in a text, meta-attention is a softmax over one or two keys: `target` says nothing of
meta-tokens as a memory, `every` and `background` do.
"""

import argparse
import functools
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws, stable_key
from nanometa.common.terminal import BOLD, write
from nanometa.config import TaskConfig
from nanometa.config.command_line import run_cli
from nanometa.config.tasks import LEVELS, PLACEMENTS, QUESTIONS
from nanometa.data.inject import marker_places
from nanometa.data.tokenizer import META, Tokenizer, write_tokens
from nanometa.tasks import words

POINT, STOP = "<point>", "<stop>"  # pieces that become markers, or nothing: where the task points; a list's end
SPLITS = {"train": range(0, 50), "val": range(50, 75), "test": range(75, 100)}  # of 100 classes of texts
ATTEMPTS = 3000  # a text of the test split is found in 4 on average
TASK_MODULE = {
    "draft": "writes one text before its markers are placed",
    "CHANCE": "share of answers that guessing gets right",
    "QUESTION_NAMES_PLACE": "whether the question itself names the place that it asks about",
    "ANSWER_IN_TEXT": "whether the answer stands, word for word, in the span that the question asks about",
    "SIZES": "level -> how much the task asks for, for every level",
}


@dataclass
class Draft:
    """A text before its markers are placed."""

    body: list[str] = field(default_factory=list)  # pieces
    questions: list[tuple[list[str], list[str]]] = field(default_factory=list)  # pieces of each, and of its answer
    # what a model that takes a shortcut answers to the first question: the floors that eval.py prints beside a result
    shortcuts: dict[str, str] = field(default_factory=dict)


class Example(NamedTuple):
    ids: np.ndarray  # (length,) int64, markers included, from one <|endoftext|> to another
    answers: np.ndarray  # (length,) bool: the ids of the answers, each with the line's end that ends it
    draft: Draft


@functools.cache
def load_task(name: str) -> ModuleType:
    """Imports the module of a task. Raises TypeError if the module lacks a part that the rest of the code reads."""
    module = importlib.import_module(f"nanometa.tasks.{name}")
    for part, purpose in TASK_MODULE.items():
        if not hasattr(module, part):
            raise TypeError(f"tasks/{name}.py does not define {part} ({purpose}).")
    if set(module.SIZES) != set(LEVELS):
        raise TypeError(f"SIZES of tasks/{name}.py has the levels {list(module.SIZES)}, and must have {list(LEVELS)}.")
    return module


class Maker:
    """What one task writes with: words that are tokens, its markers as they are placed, and the positions they take."""

    def __init__(self, task: str, placement: str, cfg: TaskConfig, tokenizer: Tokenizer):
        """cfg: its form of the question, number of questions and share of background markers. Raises UserError for a
        question that this task, so placed, cannot have."""
        self.name, self.placement, self.cfg, self.tokenizer = task, placement, cfg, tokenizer
        self.markers = PLACEMENTS[placement]
        self.task = load_task(task)
        # False where the question of a text is all that says which list it is about
        self.has_pointer = self.markers.points_at_named or not self.task.QUESTION_NAMES_PLACE
        self.items, self.names = words.pools(tokenizer)
        if cfg.question == "misnamed" and not (self.has_pointer and self.task.QUESTION_NAMES_PLACE):
            raise UserError(
                f"question=misnamed asks list recall for what is pointed at, not for what is named, and {task} with "
                f"placement {placement} has no such question: take --tasks list_recall --placements target none."
            )
        pointer = {"meta": META, "word": f" {words.DELIMITER}"}[self.markers.pointer]
        self._signs = {
            POINT: [pointer] if self.has_pointer else [],
            STOP: [META] if self.markers.after_lists else [],
        }
        self._ids: dict[str, list[int]] = {META: [tokenizer.meta]}

    def ids(self, pieces: list[str]) -> list[int]:
        out: list[int] = []
        for piece in pieces:
            if piece not in self._ids:
                signs = self._signs.get(piece)
                self._ids[piece] = self.tokenizer.encode(piece).tolist() if signs is None else self.ids(signs)
            out += self._ids[piece]
        return out

    def cost(self, *pieces: str) -> int:
        """Returns how many positions the pieces take, without scattered meta-tokens, which are added later."""
        return len(self.ids(list(pieces)))

    def longer_names(self, draws: Draws) -> Iterator[str]:
        """All names of two words, none twice, for texts that have used up those of one."""
        seen: set[str] = set()
        while len(seen) < len(self.names) ** 2:
            name = f"{draws.choice(self.names)} {draws.choice(self.names)}"
            if name not in seen:
                seen.add(name)
                yield name

    def example(self, split: str, index: int, low: int, high: int, levels: tuple[str, ...]) -> Example:
        """Text number `index` of a split ("train/SEED", "val" or "test"), with low .. high positions and a level, both
        drawn, the level from those that such a length can have.

        A function of its arguments, the settings and the tokenizer alone. No text is in two of train, val and test: the
        hash of its pieces says where it belongs, and others are drawn until one does.
        Raises UserError if there is none of this length."""
        cfg, kind = self.cfg, split.partition("/")[0]
        key = (self.name, split, index, low, high, levels, self.placement, cfg.question, cfg.questions)
        for attempt in range(ATTEMPTS):
            draws = Draws(stable_key(*key, attempt))
            room, level = draws.between(low, high) - 2, draws.choice(levels)
            if self.markers.scattered:
                room -= round(cfg.meta_share * room)
            draft = self.task.draft(self, draws, room, level)
            if draft is None or stable_key(draft.body, draft.questions) % 100 not in SPLITS[kind]:
                continue
            if cfg.shuffle_answers and kind == "train":
                other = self.task.draft(self, draws, room, level)
                if other is None or len(other.questions) != len(draft.questions):
                    continue
                pairs = zip(draft.questions, other.questions, strict=True)
                draft.questions = [(question, answer) for (question, _), (_, answer) in pairs]
            example = self._lay_out(draft, draws)
            if low <= len(example.ids) <= high:
                return example
        raise UserError(
            f"{self.name} with placement {self.placement} and questions={cfg.questions} has no text of level "
            f"{' or '.join(levels)} with {low} to {high} positions: take texts of another length, or another level."
        )

    def _lay_out(self, draft: Draft, draws: Draws) -> Example:
        ids, answers = [self.tokenizer.eot, *self.ids(draft.body)], []
        for question, answer in draft.questions:
            ids += self.ids(question)
            answers += range(len(ids), len(ids) + self.cost(*answer))
            ids += self.ids(answer)
        ids = np.array([*ids, self.tokenizer.eot])
        is_answer = np.zeros(len(ids), dtype=bool)
        is_answer[answers] = True
        if self.markers.scattered:
            # anywhere between the first <|endoftext|> and the last answer
            prompt = ids[1 : len(ids) - 1 - self.cost(*draft.questions[-1][1])]
            share = self.cfg.meta_share
            M = round(share / (1 - share) * len(prompt))
            key = stable_key("background", draws.below(2**62))
            places = marker_places("uniform", 0, 1, len(prompt), M, key)[0] if M else np.zeros(len(prompt), dtype=bool)
            # where each id goes: behind the markers that come before it
            to = np.concatenate([[0], 1 + np.flatnonzero(~places), np.arange(1 + len(prompt), len(ids)) + M])
            spread = np.full(len(ids) + M, self.tokenizer.meta)
            spread[to] = ids
            is_answer, ids = np.isin(np.arange(len(spread)), to[is_answer]), spread
        return Example(ids, is_answer, draft)


def show(task: str) -> None:
    """The command line of a task's module: prints examples for a person."""
    run_cli(partial(_show, task))


def _show(task: str, argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m nanometa.tasks.{task}", description=f"prints texts of {task}")
    parser.add_argument("--show", type=int, default=1, metavar="N", help="texts for each length and placement (1)")
    parser.add_argument("--length", type=int, nargs="+", default=[64, 128], help="positions of the longest (64 128)")
    parser.add_argument(
        "--placement", nargs="+", choices=PLACEMENTS, default=tuple(PLACEMENTS), help="of the markers (all)"
    )
    parser.add_argument("--level", choices=LEVELS, default="medium", help="(medium)")
    parser.add_argument("--question", choices=QUESTIONS, default="index", help="of list recall (index)")
    parser.add_argument("--questions", type=int, default=1, help="in a text of list recall (1)")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, or the folder of a dataset or run (gpt2)")
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.gpt2() if args.tokenizer == "gpt2" else Tokenizer.load(Path(args.tokenizer))
    write(f"tokens per item: {words.tokens_per_item(tokenizer):.3f} (tokenizer {tokenizer.name})\n", BOLD)
    cfg = TaskConfig(question=args.question, questions=args.questions)
    for length in args.length:
        for placement in args.placement:
            maker = Maker(task, placement, cfg, tokenizer)
            for index in range(args.show):
                example = maker.example("test", index, math.ceil(0.9 * length), length, (args.level,))
                markers = int((example.ids == tokenizer.meta).sum())
                size = f"{len(example.ids)} positions of at most {length}, {markers} of them markers"
                write(f"--- {placement}, {size}, test text {index} ---\n", BOLD)
                write_tokens(example.ids.tolist(), tokenizer)
                write("\n")
