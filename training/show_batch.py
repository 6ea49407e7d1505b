"""Prints what one step of training sees: python train.py config/tiny_meta.py --show_batch=1000"""

import numpy as np

from nanometa.common.errors import UserError, printable
from nanometa.common.terminal import BOLD, write
from nanometa.config import TrainConfig
from nanometa.data.loader import step_windows
from nanometa.data.tokenizer import write_tokens
from nanometa.training.base_run import base_of, with_base
from nanometa.training.dataset import open_windows
from nanometa.training.idle import refuse_idle


def show_batch(cfg: TrainConfig, world: int) -> None:
    """Prints every window of step cfg.show_batch with the process (of `world`) and the micro-batch that trains on it.

    A step's number counts the updates before it, as in a checkpoint's name: step_00001000 continues with step 1000.
    Raises UserError if the run has no such step."""
    step, last = cfg.show_batch, cfg.max_steps - 1
    if step > last:
        raise UserError(
            f"show_batch={step} is beyond the run, whose last step is {last} with max_steps={cfg.max_steps}: give "
            f"--show_batch={last} or less."
        )
    cfg = with_base(cfg, base := base_of(cfg, None))
    data = open_windows(cfg, "train", base)
    if not base:
        refuse_idle(cfg, 0 if cfg.task.tasks else data.manifest["chunk_markers"])
    shares = [step_windows(step, cfg, data.n_windows, rank, world) for rank in range(world)]
    first = step * cfg.batch_size  # number of the first sample; an epoch has n_windows samples
    n_windows = data.n_windows or cfg.max_steps * cfg.batch_size  # texts of tasks never repeat, so there is one epoch
    ends = (first // n_windows, (first + cfg.batch_size - 1) // n_windows)
    epochs = f"epoch {ends[0]}" if ends[0] == ends[1] else f"epochs {ends[0]} .. {ends[1]}"
    write(
        f"step {step} of {', '.join(cfg.task.tasks) or printable(cfg.dataset)}, {epochs} of {n_windows:,} windows, "
        f"samples {first} .. {first + cfg.batch_size - 1}, target_rule={cfg.target_rule}, seed {cfg.seed}\n"
        f"{world} processes x {len(shares[0])} micro-batches x {cfg.micro_batch_size} windows: "
        f"{' '.join(str(window) for share in shares for window in share.flat)}\n"
    )
    places = [(rank, micro, w) for rank, share in enumerate(shares) for micro, row in enumerate(share) for w in row]
    for sample, (rank, micro, window) in enumerate(places, start=first):
        batch = data.batch(np.array([window]))
        tokens = batch.tokens[0].numpy()
        markers, scored = int((tokens >= data.tokenizer.n_content).sum()), int((batch.targets >= 0).sum())
        if cfg.task.tasks:  # leave out the padding after the text's second <|endoftext|>
            tokens = tokens[: 1 + np.flatnonzero(tokens == data.tokenizer.eot)[1]]
        elif cfg.markers.places_markers:  # leave out the padding in place of markers that the text does not need
            tokens = tokens[: data.content_per_window + markers]
        write(
            f"--- window {window}: sample {sample}, epoch {sample // n_windows}, process {rank} of {world}, "
            f"micro-batch {micro} of {len(shares[0])}, {len(tokens) - markers} content tokens, {markers} markers, "
            f"{scored} scored targets ---\n",
            BOLD,
        )
        write_tokens(tokens.tolist(), data.tokenizer)
        write("\n")
        if cfg.model.second.connects == "random":
            write(f"the second attention connects positions {' '.join(map(str, batch.meta_index[0].tolist()))}\n", BOLD)
