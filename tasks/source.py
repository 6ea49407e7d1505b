"""Texts of tasks as a source of batches, with the interface of data.loader.Windows: a window is one text, padded."""

import dataclasses
import math

import numpy as np
import torch

from nanometa.config import TrainConfig
from nanometa.config.tasks import LEVELS
from nanometa.data.layout import Batch, batch_of, connected_positions, draw_of, layout_of, targets_of
from nanometa.data.tokenizer import Tokenizer
from nanometa.tasks.example import Example, Maker

SHORTEST, PHASES = 32, 5
VALIDATION = 256  # texts of each task
MULTIPLE = 32  # widths of a batch and of its indices are such multiples: a compiled model sees few shapes


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

    numbers (B,), split: key the draw of second_attention=random. loss_on: what is scored, the answers or all."""
    layouts, targets = [], []
    for example in examples:
        layout = layout_of(example.ids, tokenizer.meta, width=T, pad=tokenizer.eot)
        counted = np.pad(example.answers, (0, T - len(example.answers))) if loss_on == "answer" else None
        layouts.append(layout)
        targets.append(targets_of(layout, cfg.target_rule, counted))
    meta_index = connected_positions(layouts, tokenizer.meta, numbers, draw_of(cfg, split), MULTIPLE)
    return batch_of(layouts, targets, meta_index, multiple=MULTIPLE)


class TaskWindows:
    """One split of the tasks of cfg.task, all of them with each of its placements, in turn. Text i of a split is a
    function of (split, i, the settings), and in training of the seed, too: nothing is stored.

    train: every text is new, with a length and a level drawn from those that the curriculum has reached. val: 256 texts
    of each task, over its placements, of the full length and level, with one question, scored on the answer."""

    def __init__(self, cfg: TrainConfig, split: str, tokenizer: Tokenizer):
        self.cfg, self.split, self.tokenizer, self.T = cfg, split, tokenizer, cfg.task.train_length
        train = split == "train"
        settings = cfg.task if train else dataclasses.replace(cfg.task, questions=1)
        pairs = [(task, placement) for placement in cfg.task.placements for task in cfg.task.tasks]
        self.makers = [Maker(*pair, settings, tokenizer) for pair in pairs]
        self.n_windows = None if train else VALIDATION * len(cfg.task.tasks)  # None: endless
        self.loss_on = cfg.task.loss_on if train else "answer"
        # what cannot be written is refused now, and not in the middle of a run
        phases = {self.reached(phase * cfg.task.curriculum_steps // PHASES) for phase in range(PHASES + 1)}
        for maker in self.makers:
            if train:
                for longest, levels in phases:
                    maker.example("train/0", 0, SHORTEST, longest, levels)
            else:
                maker.example(split, 0, math.ceil(0.9 * self.T), self.T, (cfg.task.level,))

    def reached(self, step: int) -> tuple[int, tuple[str, ...]]:
        """Longest length and levels of the training texts of a step: of five phases, the length grows geometrically."""
        task = self.cfg.task
        levels = LEVELS[: LEVELS.index(task.level) + 1]
        share = 1.0 if step >= task.curriculum_steps else (1 + step * PHASES // task.curriculum_steps) / PHASES
        longest = round(SHORTEST * (self.T / SHORTEST) ** share)
        return longest, levels[: math.ceil(share * len(levels))]

    def width(self, window: int) -> int:
        """Positions that a training text and its pads take: no more than the longest of its step needs."""
        longest, _ = self.reached(window // self.cfg.batch_size)
        return min(self.T, -(-longest // MULTIPLE) * MULTIPLE)

    def example(self, window: int) -> Example:
        """Text number `window` of the split."""
        maker, index = self.makers[window % len(self.makers)], window // len(self.makers)
        if self.split != "train":
            return maker.example(self.split, index, math.ceil(0.9 * self.T), self.T, (self.cfg.task.level,))
        longest, levels = self.reached(window // self.cfg.batch_size)
        return maker.example(f"train/{self.cfg.seed}", index, SHORTEST, longest, levels)

    def counted(self, n: int) -> dict[str, int]:
        """What the first n texts of training hold, of whole steps; positions are counted with their pads."""
        C, B = self.cfg.task.curriculum_steps, self.cfg.batch_size
        starts = [min(n, math.ceil(phase * C / PHASES) * B) for phase in range(PHASES)]  # first text of each phase
        ends = [*starts[1:], n]
        return {"texts": n, "positions": sum((b - a) * self.width(a) for a, b in zip(starts, ends, strict=True))}

    def batch(self, windows: np.ndarray) -> Batch:
        """Builds the Batch of the given texts (B,), on the CPU."""
        T = self.T if self.split != "train" else max(self.width(int(window)) for window in windows)
        examples = [self.example(int(window)) for window in windows]
        return collate(examples, windows, T, self.cfg, self.tokenizer, f"tasks {self.split}", self.loss_on)


class Answers:
    """Counts of right answers by task; those of batches and processes add up.

    `sums` (tasks, 4) float64: texts, those answered exactly, ids of answers (their line's end apart), those right."""

    def __init__(self, tasks: tuple[str, ...], device: torch.device):
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.tasks, self.sums = tasks, torch.zeros(len(tasks), 4, dtype=torch.float64, device=device)

    def add(self, windows: np.ndarray, targets: torch.Tensor, right: torch.Tensor) -> None:
        """windows (B,) as TaskWindows numbers them; targets (B, S), negative where nothing is scored, and right (B, S)
        bool: is the model's most likely id there, after the true ones before it, the target?"""
        counts = torch.cat([torch.ones_like(targets[:, :1]), count_right(targets, right)], dim=1)  # (B, 4)
        task = torch.from_numpy(windows % len(self.tasks)).to(counts.device)
        self.sums.index_add_(0, task.to(self.sums.device), counts.to(self.sums))

    def figures(self) -> dict[str, float]:
        """exact_TASK: share of texts whose whole answer is right; tokens_TASK: share of their answers' ids."""
        rows = zip(self.tasks, self.sums.tolist(), strict=True)
        return {name: value for task, (n, exact, ids, right) in rows if n
                for name, value in ((f"exact_{task}", exact / n), (f"tokens_{task}", right / ids))}  # fmt: skip


def count_right(targets: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """targets (B, S), right (B, S) of texts with one question -> (B, 3): is the whole answer right, ids of the answer,
    those right.

    An answer is exact as greedy decoding writes it if and only if each of its ids, its line's end included, is the most
    likely one after the true ids before it: the first wrong one would be written, and before it all are true."""
    scored = targets >= 0
    exact = (right | ~scored).all(dim=1)
    # without the line's end, which every answer has: the last that is scored
    order = torch.arange(targets.size(1), device=targets.device)
    ids = scored & (order != torch.where(scored, order, -1).amax(dim=1, keepdim=True))
    return torch.stack([exact, ids.sum(dim=1), (ids & right).sum(dim=1)], dim=1)
