"""Prepares the weighted loss of a run: its scorer, its short contexts, and what each batch needs besides its texts."""

import numpy as np
import torch
import torch.nn as nn

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key, uniform_bits
from nanometa.config import TrainConfig
from nanometa.data.layout import Batch, to_device
from nanometa.data.loader import Windows
from nanometa.data.nats import StoredNats, is_stored
from nanometa.data.tokenizer import Tokenizer
from nanometa.layers.loss import Objective
from nanometa.layers.weighting import ShortLengths, WeightedObjective, figures_of
from nanometa.model import GPT
from nanometa.tasks.source import TaskWindows
from nanometa.training.checkpoint import Run, load_run
from nanometa.training.distributed import Dist


def lengths_of(
    content: int, positions: int, length: int | None, stride: int | None, given: str = "short_length"
) -> ShortLengths:
    """Returns the short contexts of windows with so many content tokens and positions; None = the default of each.

    Raises UserError if they do not fit the window."""
    length = max(1, content // 4) if length is None else length
    if length >= content:
        raise UserError(
            f"{given}={length} is no short context, because a window has {content} content tokens: use fewer."
        )
    if stride is None:
        stride = max(1, round((1 - length / content) * length))
    if stride > length:
        raise UserError(
            f"short_stride={stride} is above short_length={length}, so that some targets would have no short context: "
            f"use at most {length}."
        )
    return ShortLengths(length, stride, content, positions)


def check_scorer(run: Run, tokenizer: Tokenizer, length: int) -> None:
    """Raises UserError unless a run can score content tokens of this tokenizer, in texts of `length` tokens."""
    if run.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{run.folder} was trained with another tokenizer (fingerprint {run.tokenizer.fingerprint[:12]}..) than "
            f"the dataset's ({tokenizer.fingerprint[:12]}..), so it cannot score the same tokens: give a run with the "
            f"dataset's tokenizer."
        )
    cfg, stored = run.config, run.state["data"]["chunk_markers"]
    if cfg.has_markers(stored) or cfg.markers.restricts or cfg.model.second.connects == "random":
        raise UserError(
            f"{run.folder} was trained as the arm {cfg.arm_name(stored)}, and a scorer reads the content tokens alone: "
            f"give a run without markers."
        )
    if cfg.model.position == "learned" and length > cfg.model.block_size:
        raise UserError(
            f"short contexts of {length} tokens do not fit the {cfg.model.block_size} learned positions of "
            f"{run.folder}: use a smaller short_length, or a scorer with more positions."
        )


class TokenWeights:
    """The weights of a run's targets. With weighting=uniform, all of it leaves the usual training as it is."""

    def __init__(self, cfg: TrainConfig, data: Windows | TaskWindows):
        """Opens the scorer. Raises UserError if it, or the short contexts, do not fit the run."""
        self.cfg, self.w, self.column, self.run, self.lengths = cfg, cfg.weights, None, None, None
        self.key = stable_key(cfg.seed, "weights")
        self.sums: torch.Tensor | None = None  # of this step's measures, without the largest weight
        self.most: torch.Tensor | None = None  # the largest weight among them
        self.last: tuple | None = None  # the sums of all processes, the largest weight, and the number of targets
        if self.w.rule is None or not self.w.rule.compares:
            return
        content, positions = (data.T, data.T) if cfg.task.tasks else (data.content_per_window, data.T)
        length, stride = self.w.short_length, self.w.short_stride
        if cfg.scorer != "self":
            if cfg.task.tasks:
                raise UserError(
                    f"scorer={cfg.scorer} scores stored text, and the texts of the tasks are new ones: use "
                    f"--scorer=self."
                )
            if is_stored(cfg.scorer):
                self.column = StoredNats(cfg.scorer, verify=cfg.verify == "full")
                length, stride = self._stored(data, length, stride)
            else:
                self.run = load_run(cfg.scorer)
        self.lengths = lengths_of(content, positions, length, stride)
        if self.run:
            check_scorer(self.run, data.tokenizer, self.lengths.length)
            self.run.model.requires_grad_(False)

    def _stored(self, data: Windows, length: int | None, stride: int | None) -> tuple[int, int]:
        """Returns the short contexts of the stored nats, after checking that these belong to the run's windows."""
        about, scorer = self.column.about, self.cfg.scorer
        wanted = {
            "tokenizer": data.tokenizer.fingerprint,
            "content_sha256": data.manifest["splits"]["train"]["content_sha256"],
            "content": data.content_per_window,
        }
        for name, value in wanted.items():
            if getattr(about, name) != value:
                raise UserError(
                    f"the nats in {scorer} belong to other windows ({name} {getattr(about, name)}, and the run's is "
                    f"{value}): compute them with python eval.py nats for this dataset and this number of content "
                    f"tokens."
                )
        for name, given in (("short_length", length), ("short_stride", stride)):
            if given not in (None, getattr(about, name)):
                raise UserError(
                    f"{name}={given} differs from the {getattr(about, name)} that the nats in {scorer} were computed "
                    f"with: leave {name} out."
                )
        return about.short_length, about.short_stride

    @property
    def facts(self) -> dict:
        """What identifies the scorer, for the record of a checkpoint; {} if the model scores itself."""
        if self.column:
            return {"scorer": {"nats": self.column.about.sha256, "weights": self.column.about.weights_sha256}}
        return {"scorer": {"weights": self.run.weights_sha256}} if self.run else {}

    def objective(self, model: GPT, device: torch.device) -> nn.Module:
        """Returns the module that computes the loss of a model. The scorer is moved to the model's device."""
        if self.w.rule is None:
            return Objective(model)
        scorer = self.run.model.to(device) if self.run else None
        return WeightedObjective(model, self.w, self.lengths, scorer)

    def beside(self, batch: Batch, windows: np.ndarray, step: int, device: torch.device) -> dict:
        """Returns what the objective needs besides a batch of windows (B,) at a step, on its device."""
        if self.w.rule is None:
            return {}
        places = np.arange(batch.tokens.size(1))
        bits = np.stack([uniform_bits(stable_key(self.key, int(window)), places) for window in windows])
        ties = torch.from_numpy((bits >> np.uint64(1)).astype(np.int64))
        column = torch.from_numpy(self.column.read(windows)) if self.column else None
        return {
            "ties": to_device(ties, device),
            "column": None if column is None else to_device(column, device),
            "weighted": step >= self.w.weight_after,
        }

    def add(self, result) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes what the objective returned for a micro-batch. Returns the nats to train on, and those without weights,
        which have no gradient."""
        if self.w.rule is None:
            return result, result.detach()
        weighted, found = result
        self.sums = found[:-1] if self.sums is None else self.sums + found[:-1]
        self.most = found[-1] if self.most is None else torch.maximum(self.most, found[-1])
        return weighted, found[0]

    def finish(self, dist: Dist, model: GPT, scored: torch.Tensor) -> None:
        """Adds up the measures of a step over all processes, once its gradients are complete, and normalizes these if
        weight_norm=batch. scored: the number of targets in the global batch."""
        if self.w.rule is None:
            return
        self.last = dist.sum(self.sums), dist.max(self.most), scored
        self.sums = self.most = None
        total = self.last[0][2]
        if self.w.weight_norm == "batch":
            factor = torch.where(total > 0, scored / total, 1).float()  # 0 before weight_after
            for p in model.parameters():
                if p.grad is not None:
                    p.grad *= factor

    def figures(self) -> dict[str, float]:
        """Returns what the log says about the weights of the last step; {} if it had none."""
        if self.last is None or not (sums := self.last[0].tolist())[2]:
            return {}
        return figures_of(sums, self.last[1].item(), self.last[2].item())._asdict()

    def describe(self) -> list[str]:
        """Returns a line about the weights for the log, or none for the usual loss."""
        if self.w.rule is None:
            return []
        line = f"weights of the loss: {self.w.label}" + (
            f", from step {self.w.weight_after:,} on" if self.w.weight_after else ""
        )
        if self.lengths:
            by = "the model itself" if self.cfg.scorer == "self" else self.cfg.scorer
            least = self.lengths.length - self.lengths.stride + 1
            line += f"; scored by {by} with short contexts of {least} to {self.lengths.length} content tokens"
        return [line]
