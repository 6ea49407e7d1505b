"""Builds batches of task texts for training and validation, and counts right answers.

TaskWindows has the interface of data.loader.Windows: each of its windows is one padded text.
"""

import contextlib
import dataclasses
import math

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.config import TaskConfig, TrainConfig
from nanometa.data.layout import Batch, batch_of, connected_positions, draw_of, targets_of
from nanometa.data.markers import MarkerScheme, placing_of
from nanometa.data.tokenizer import Tokenizer
from nanometa.tasks.curriculum import MULTIPLE, SHORTEST, Curriculum
from nanometa.tasks.example import Example, Maker

VALIDATION = 256  # number of validation texts of each task
TRIED = 8  # texts of the first, shortest phase that each maker writes before the run starts
REPLACEMENTS = 100  # texts that may take the place of one that a maker does not find
BEYOND = 2**40  # distance of their numbers, beyond the number of any text of a run


def collate(
    examples: list[Example],
    numbers: np.ndarray,
    T: int,
    cfg: TrainConfig,
    tokenizer: Tokenizer,
    split: str,
    loss_on: str = "answer",
) -> Batch:
    """Builds the Batch (B, T) of texts of at most T positions, padded with <|endoftext|>, for a run with settings cfg.

    numbers (B,) and split are the key of the positions that second_attention=random draws.
    loss_on: "answer" scores only the answers, any other value every token."""
    layouts, targets = [], []
    scheme = MarkerScheme(placing_of(cfg, split), tokenizer, content=T, markers=0)  # a text is a window of its own
    for example in examples:
        layout = scheme.lay_out(example.ids, width=T, pad=tokenizer.eot)
        if example.positions is not None:  # only a part of the text is read; nothing reads the pads
            layout.positions[: len(example.positions)] = example.positions
        counted = np.pad(example.answers, (0, T - len(example.answers))) if loss_on == "answer" else None
        layouts.append(layout)
        targets.append(targets_of(layout, cfg.target_rule, counted))
    meta_index = connected_positions(layouts, tokenizer.meta, numbers, draw_of(cfg, split), MULTIPLE)
    return batch_of(layouts, targets, meta_index, multiple=MULTIPLE, hides=cfg.markers.hides)


def pairs_of(task: TaskConfig) -> list[tuple[str, str]]:
    """Returns the pairs of a task and a placement in the order in which the texts of TaskWindows take turns."""
    return [(name, placement) for placement in task.placements for name in task.tasks]


class TaskWindows:
    """The texts of one split, which take turns over all tasks and placements of cfg.task.

    Text i is a function of (split, i, settings), in training also of the seed. Nothing is stored.
    train: an endless series of new texts. Length and level are drawn from those that the curriculum has reached.
    val: 256 texts of each task, spread over the placements, of the full length and level. Each has one question, and
    only its answer is scored."""

    def __init__(self, cfg: TrainConfig, split: str, tokenizer: Tokenizer):
        self.cfg, self.split, self.tokenizer, self.T = cfg, split, tokenizer, cfg.task.train_length
        train = split == "train"
        settings = cfg.task if train else dataclasses.replace(cfg.task, questions=1)
        pairs = pairs_of(cfg.task)
        if cfg.task.visible == "marked" and draw_of(cfg, split):
            raise UserError(
                "visible=marked has no meaning with second_attention=random, because most of the positions that it "
                "draws would be left out: use another arm or set --visible=all."
            )
        self.makers = [Maker(*pair, settings, tokenizer) for pair in pairs]
        self.n_windows = None if train else VALIDATION * len(cfg.task.tasks)  # None: endless
        self.loss_on = cfg.task.loss_on if train else "answer"
        self.written: dict[int, Example] = {}  # the validation texts that were read before, by number
        if not train and cfg.eval_windows is not None and cfg.eval_windows < len(pairs):
            raise UserError(
                f"eval_windows={cfg.eval_windows} is too few to validate each of {len(cfg.task.tasks)} tasks with each "
                f"of {len(cfg.task.placements)} placements: set --eval_windows={len(pairs)} or more, or None for all "
                f"texts."
            )
        if train:
            self.curriculum = self._fitting_curriculum()
        else:  # so that impossible settings are refused here and not in the middle of a run
            for maker in self.makers:
                maker.example(split, 0, math.ceil(0.9 * self.T), self.T, (cfg.task.level,))

    def _fitting_curriculum(self) -> Curriculum:
        """Returns the curriculum with the lowest start, in steps of 8 positions, for which every maker has texts.

        Words of several tokens, as with a small vocabulary, need a higher start. Writes texts of every phase, so that
        impossible settings are refused here and not in the middle of a run: raises UserError."""

        def write(n: int, longest: int, levels: tuple[str, ...]) -> None:
            for maker in self.makers:
                for index in range(n):
                    maker.example("train/0", index, SHORTEST, longest, levels)

        write(1, *Curriculum(self.cfg).phases()[-1])  # a text of the full length and level does not depend on the start
        for start in range(SHORTEST, self.T + 1, 8):
            curriculum = Curriculum(self.cfg, start)
            try:
                for phase, reached in enumerate(curriculum.phases()):
                    write(1 if phase else TRIED, *reached)
                return curriculum
            except UserError as error:
                refusal = error
        raise refusal

    def reached(self, step: int) -> tuple[int, tuple[str, ...]]:
        """Returns the longest length and the levels of training texts at a step."""
        return self.curriculum.reached(step)

    def example(self, window: int) -> Example:
        """Returns text number `window` of the split. Those of validation are written once, because each evaluation
        reads them again."""
        if window in self.written:
            return self.written[window]
        maker, index = self.makers[window % len(self.makers)], window // len(self.makers)
        if self.split != "train":
            low, level = math.ceil(0.9 * self.T), self.cfg.task.level
            self.written[window] = found(maker, self.split, index, low, self.T, (level,))
            return self.written[window]
        longest, levels = self.reached(window // self.cfg.batch_size)
        return found(maker, f"train/{self.cfg.seed}", index, SHORTEST, longest, levels)

    def counted(self, n: int) -> dict[str, int]:
        """Returns the numbers of texts and positions, padding included, in the first n training texts.

        n must be a whole number of steps."""
        return {"texts": n, "positions": sum(texts * width for texts, width in self.curriculum.widths(n))}

    def sample(self, n: int) -> np.ndarray:
        """Returns n texts, the first ones. Their tasks and placements take turns, which texts at equal distances would
        not show: every 32nd of them can be of one task."""
        return np.arange(n)

    def batch(self, windows: np.ndarray) -> Batch:
        """Builds the Batch of the texts with the given numbers (B,), on the CPU."""
        T = self.T
        if self.split == "train":
            T = max(self.curriculum.width(int(window) // self.cfg.batch_size) for window in windows)
        examples = [self.example(int(window)) for window in windows]
        return collate(examples, windows, T, self.cfg, self.tokenizer, f"tasks {self.split}", self.loss_on)


def found(maker: Maker, split: str, index: int, low: int, high: int, levels: tuple[str, ...]) -> Example:
    """Returns maker.example of these arguments or, where that finds no text, the text of a fixed other number.

    If an attempt succeeds with probability p, the 3000 attempts of a text fail with probability (1 - p)^3000. The texts
    that are written before the start show that p is not tiny, but not that the millionth text is found: for p = 1/1000,
    each text fails with probability 0.05, and all eight that are tried are found with probability 0.67. With 100
    replacements even p = 1/10,000 leaves a probability of 1e-13. Raises UserError if none is found."""
    for number in range(index, index + REPLACEMENTS * BEYOND, BEYOND):
        with contextlib.suppress(UserError):
            return maker.example(split, number, low, high, levels)
    return maker.example(split, index + REPLACEMENTS * BEYOND, low, high, levels)


class Answers:
    """Running counts of right answers, by task and placement.

    The counts of several batches or processes can be added. `sums` (pairs, 4) float64 holds for each pair of pairs_of
    the number of texts, of exactly answered texts, of ids in answers (without the line end), and of right ids among
    these. The counts are whole numbers, so their sum does not depend on the order of the summands."""

    def __init__(self, task: TaskConfig, device: torch.device):
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.task, self.pairs = task, pairs_of(task)
        self.sums = torch.zeros(len(self.pairs), 4, dtype=torch.float64, device=device)

    def add(self, windows: np.ndarray, targets: torch.Tensor, right: torch.Tensor) -> None:
        """Adds a batch of texts.

        windows (B,): the numbers of the texts in TaskWindows.
        targets (B, S): negative where nothing is scored.
        right (B, S) bool: whether the target is the most likely id, given the true ids before it."""
        counts = torch.cat([torch.ones_like(targets[:, :1]), count_right(targets, right)], dim=1)  # (B, 4)
        pair = torch.from_numpy(windows % len(self.pairs))
        self.sums.index_add_(0, pair.to(self.sums.device), counts.to(self.sums))

    def figures(self) -> dict[str, float]:
        """Returns the figures of the tasks and placements that have texts.

        exact_TASK: share of texts whose whole answer is right. tokens_TASK: share of right ids in all answers.
        exact_TASK_PLACEMENT: exact_TASK of the texts with one placement; only if the run has several placements,
        which exact_TASK merges."""
        found = {}
        for task in self.task.tasks:
            mine = [row for row, (name, _) in enumerate(self.pairs) if name == task]
            n, exact, ids, right = self.sums[mine].sum(dim=0).tolist()
            if n:
                found |= {f"exact_{task}": exact / n, f"tokens_{task}": right / ids}
        if len(self.task.placements) > 1:
            for (task, placement), (n, exact, *_) in zip(self.pairs, self.sums.tolist(), strict=True):
                if n:
                    found[f"exact_{task}_{placement}"] = exact / n
        return found


def count_right(targets: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Counts right answers of texts with one question each, from targets (B, S) and right (B, S).

    Returns (B, 3): whether the whole answer is right, the number of ids in the answer, and the number of right ids. The
    line end is part of the whole answer, but not of the two numbers.
    Greedy decoding writes the exact answer if and only if each id of the answer, line end included, is the most likely
    one given the true ids before it. Up to the first wrong id, greedy decoding has written exactly the true ids."""
    scored = targets >= 0
    exact = (right | ~scored).all(dim=1)
    # leave out the line end, which is the last scored position of every answer
    order = torch.arange(targets.size(1), device=targets.device)
    ids = scored & (order != torch.where(scored, order, -1).amax(dim=1, keepdim=True))
    return torch.stack([exact, ids.sum(dim=1), (ids & right).sum(dim=1)], dim=1)
