"""Evaluates a model on the validation split during training."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from nanometa.config import TrainConfig
from nanometa.config.checks import flat
from nanometa.data.loader import Windows
from nanometa.layers.loss import Tally
from nanometa.layers.scores import Scorer
from nanometa.model import GPT
from nanometa.tasks.source import Answers, TaskWindows
from nanometa.training.checkpoint import Checkpoint
from nanometa.training.distributed import Dist, autocast, pick_dtype
from nanometa.training.signals import StopFlag

PROGRESS_S = 10  # seconds between reports of progress


def measured_in(saved: Checkpoint, cfg: TrainConfig, facts: dict) -> dict:
    """Returns the evaluation that a checkpoint holds of its own weights, as train.py wrote it: its step, windows,
    figures and seconds.

    Returns {} if there is none, or if an evaluation under cfg would compute it otherwise or on other data. facts: those
    of the present dataset."""
    then, now = flat(saved.config), flat(cfg)
    same = all(then[name] == now[name] for name in ("device", "dtype", "compile"))
    return saved.state.get("evaluation") or {} if same and saved.state["data"]["shards"] == facts["shards"] else {}


@torch.no_grad()
def evaluate(
    model: GPT,
    data: Windows | TaskWindows,
    cfg: TrainConfig,
    dist: Dist,
    n_windows: int | None = None,
    stop: StopFlag | None = None,
    progress: Callable[[int], None] | None = None,
    compiled: nn.Module | None = None,
) -> dict | None:
    """Evaluates windows of the validation split. Returns the figures of loss.Tally, and those of tasks.source.Answers
    if the windows are texts of tasks.

    The windows are those that data.sample chooses, or all of them if n_windows is None.
    Processes evaluate disjoint windows and add up their sums, so the result does not depend on their number.
    stop: returns None early if it is raised in any process. progress: called every 10 s with the number of windows
    that are done. compiled: Scorer(model) under torch.compile; None evaluates the eager model."""
    n_windows = min(n_windows or data.n_windows, data.n_windows)
    windows = data.sample(n_windows)[dist.rank :: dist.world]
    tally = Tally(torch.from_numpy(data.tokenizer.token_bytes), dist.device)
    answers = Answers(cfg.task, dist.device)
    dtype = pick_dtype(cfg.dtype, dist.device)[0]
    scorer = Scorer(model) if compiled is None else compiled
    model.eval()
    report_at = time.perf_counter() + PROGRESS_S
    # Every process makes the same number of rounds, even if it has no window left in the last one: stopping is a
    # collective decision.
    for number, start in enumerate(range(0, -(-n_windows // dist.world), cfg.micro_batch_size)):
        if progress and time.perf_counter() >= report_at:
            progress(min(start * dist.world, n_windows))
            report_at = time.perf_counter() + PROGRESS_S
        if stop and number % 10 == 9 and dist.sum(torch.tensor(float(stop.raised), device=dist.device)) > 0:
            model.train()
            return None
        here = windows[start : start + cfg.micro_batch_size]
        n = len(here)
        if not n:
            continue
        if compiled is not None:
            # Another shape would be compiled anew, so the last window is repeated; its extra rows are dropped below.
            here = np.pad(here, (0, cfg.micro_batch_size - n), mode="edge")
        batch = data.batch(here).to(dist.device)
        with autocast(dist.device, dtype):
            scores = scorer(*batch)
        tally.add(scores.nats[:n], scores.targets[:n])
        if cfg.task.tasks:
            answers.add(here[:n], scores.targets[:n], scores.right[:n])
    model.train()
    dist.sum(tally.sums)
    if cfg.task.tasks:
        dist.sum(answers.sums)
    return tally.figures() | answers.figures()
