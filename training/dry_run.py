"""Prints an estimate of the parameters, tokens, FLOPs, memory, hours and cost of a training run: --dry_run.

python train.py config/meta_gpt2.py --dry_run
python train.py config/meta_gpt2.py --dry_run --accelerator=A100 --n_accelerators=4 --price=1.5 --micro_batch_size=8
python train.py config/finetune_tasks.py --dry_run --init_from=out/meta_gpt2
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from nanometa.common.errors import UserError, printable
from nanometa.config import GPTConfig, TrainConfig
from nanometa.config.checks import nearest_multiples, similar_name
from nanometa.config.tasks import PLACEMENTS
from nanometa.data.nats import is_stored
from nanometa.data.tokenizer import SPEC_FILE, Tokenizer
from nanometa.tasks.curriculum import MULTIPLE, Curriculum
from nanometa.tasks.source import TaskWindows
from nanometa.training.adapters import check_start
from nanometa.training.base_run import base_of, check_length, with_base
from nanometa.training.checkpoint import Checkpoint, open_run
from nanometa.training.dataset import check_arm, with_vocabulary
from nanometa.training.distributed import pick_dtype
from nanometa.training.estimate import (
    MEMORY,
    PEAK,
    adapted_skeleton,
    data_of,
    flops_by_part,
    flops_per_window,
    memory,
    parameters,
    peak_flops,
    scoring_flops,
    trained_parameters,
)
from nanometa.training.idle import refuse_idle
from nanometa.training.pretrained import KEYWORDS, check_name
from nanometa.training.weighted_loss import lengths_of


class Load(NamedTuple):
    """What a run reads: windows of a dataset, or texts of tasks."""

    noun: str
    model: GPTConfig  # the model with the longest window or text that the run reads
    M: int  # markers in it
    widths: list[tuple[int, int]]  # numbers of windows or texts of the run, and their positions, padding included
    origin: str  # where the sizes come from, in words
    note: str  # what the estimate assumes about them


def describe_estimate(cfg: TrainConfig, accumulation: int) -> str:
    """Returns the text that --dry_run prints.

    accumulation: micro-batches per step in each of the cfg.n_accelerators processes. Raises UserError if the
    accelerator is unknown, or the settings do not fit the dataset, its recipe or the run that init_from names."""
    peak = peak_flops(cfg.accelerator)
    if peak is None:
        close = similar_name(cfg.accelerator.upper(), PEAK)
        raise UserError(
            f"the peak FLOP/s of accelerator={cfg.accelerator!r} are not known: give one of {', '.join(PEAK)}"
            f"{f' (did you mean {close!r}?)' if close else ''}."
        )
    cfg, load = _load_of(cfg)
    check_start(cfg, load.M, has_weights=cfg.init_from != "scratch" or bool(cfg.branch_from))
    device = cfg.device if cfg.device != "auto" else "cuda"
    if cfg.dtype == "auto" and device == "cuda":
        dtype = torch.bfloat16  # every accelerator in the table computes it
    else:
        dtype = pick_dtype(cfg.dtype, torch.device(device))[0]
    arm = cfg.arm_name(load.M)
    flops, table = _flops(cfg, load)
    return (
        f"{cfg.run_name or 'a run'} (the {arm} arm) on {cfg.n_accelerators} x {cfg.accelerator}: an estimate; nothing "
        f"is trained\n\n{load.origin}\n"
        + _parameters(cfg, load)
        + _tokens(cfg, load, accumulation)
        + table
        + _memory(cfg, load, accumulation, device, dtype)
        + _hours(cfg, flops, peak, device, dtype)
    )


def _section(title: str, rows: dict[str, str], notes: str = "") -> str:
    """Returns a titled table of two columns, and the notes below it."""
    return f"\n{title}\n" + "\n".join(f"  {name:<32}{value}" for name, value in rows.items()) + "\n" + notes


def _parameters(cfg: TrainConfig, load: Load) -> str:
    model = adapted_skeleton(cfg, load.M)
    counts = parameters(model)
    total, table = sum(counts.values()), counts.get("position table", 0)
    sums = {"total": total} | ({"total without position table": total - table} if table else {})
    if cfg.train_only != "all":
        sums |= {f"trained (train_only={cfg.train_only})": trained_parameters(model)}
    return _section("parameters", {name: f"{count / 1e6:9.3f} M" for name, count in {**counts, **sums}.items()})


def _tokens(cfg: TrainConfig, load: Load, accumulation: int) -> str:
    T, M = load.model.block_size, load.M
    windows = cfg.max_steps * cfg.batch_size
    positions = sum(number * width for number, width in load.widths)
    split = (
        f"{cfg.batch_size} {load.noun}s = {cfg.n_accelerators} processes x {accumulation} micro-batches x "
        f"{cfg.micro_batch_size} {load.noun}s"
    )
    if cfg.task.tasks:
        rows = {
            "a text": f"at most {T:,} positions",
            "a step": f"at most {cfg.batch_size * T:,} positions",
            "": split,
            f"{cfg.max_steps:,} steps": f"{windows:,} texts in {positions:.3e} positions, padding included",
        }
        if cfg.stop_at is not None:
            rows[f"with stop_at={cfg.stop_at:g}"] = "the run may end earlier, and the estimate is for all steps"
    else:
        rows = {
            f"a {load.noun}": f"{T - M:,} content tokens in {T:,} positions",
            "a step": f"{cfg.batch_size * (T - M):,} content tokens in {cfg.batch_size * T:,} positions",
            "": split,
            f"{cfg.max_steps:,} steps": f"{windows * (T - M):.3e} content tokens in {positions:.3e} positions",
        }
    return _section("tokens", rows)


def _flops(cfg: TrainConfig, load: Load) -> tuple[float, str]:
    """Returns the FLOPs of the run, recomputed ones included, and their section."""
    T, M = load.model.block_size, load.M
    flops = flops_by_part(load.model, M, cfg.train_only)
    window = sum(flops.values())
    of_run = sum(
        number * flops_per_window(dataclasses.replace(load.model, block_size=width), min(M, width), cfg.train_only)
        for number, width in load.widths
    )
    rows = {name: f"{f / T:.3e}  per position  {100 * f / window:5.1f} %" for name, f in flops.items()}
    per_content = "" if cfg.task.tasks else f", {window / (T - M):.3e} per content token"
    rows |= {"total": f"{window / T:.3e}  per position{per_content}"}
    if M and not cfg.task.tasks:
        rows |= {"markers": f"{100 * M / T:.1f} % of the positions, so also of the projections and the MLP"}
    rows |= {"a step": f"{window * cfg.batch_size:.3e}", "the run": f"{of_run:.3e}"}
    added = 0.0
    if cfg.weights.rule:
        scoring = _scoring(cfg, load)
        rows |= {"weights of the loss": f"{scoring * cfg.batch_size:.3e}  a step, in addition (forward passes)"}
        added += scoring * of_run / window
    if cfg.activation_checkpointing:
        # a second forward pass of the blocks; takes time too
        forward = flops_by_part(load.model, M, backward=False)
        again = of_run * (sum(forward.values()) - forward["head"]) / window
        rows |= {"recomputed, in addition": f"{again:.3e}"}
        added += again
    note = "  (only matrix products are counted, and attention over all keys, as in PaLM)\n"
    return of_run + added, _section("FLOPs, forward and backward", rows, note + load.note)


def _scoring(cfg: TrainConfig, load: Load) -> float:
    """Returns the FLOPs of computing the weights of the loss for a window."""
    T, w, lengths, scorer = load.model.block_size, cfg.weights, None, None
    content = T if cfg.task.tasks else T - load.M
    if w.rule.compares and not is_stored(cfg.scorer):
        lengths = lengths_of(content, T, w.short_length, w.short_stride)
        scorer = None if cfg.scorer == "self" else open_run(cfg.scorer).config.model
    return scoring_flops(load.model, load.M, lengths, scorer)


def _memory(cfg: TrainConfig, load: Load, accumulation: int, device: str, dtype: torch.dtype) -> str:
    bytes_of = memory(dataclasses.replace(cfg, model=load.model), load.M, dtype, device, accumulation)
    peak = max(bytes_of["phases"].values())
    rows = {name: f"{n_bytes / 1e9:9.3f} GB" for name, n_bytes in bytes_of["parts"].items()}
    phases = {f"in use, {name}": f"{n_bytes / 1e9:9.3f} GB" for name, n_bytes in bytes_of["phases"].items()}
    rows |= phases | {"peak": f"{peak / 1e9:9.3f} GB"}
    room = MEMORY.get(cfg.accelerator.upper().split()[0]) if device == "cuda" else None
    if room and peak > room:
        rows |= {"IT DOES NOT FIT": f"one {cfg.accelerator} has {room / 1e9:.0f} GB: lower --micro_batch_size"}
    note = (
        "  (tensors in eager mode; torch.compile usually needs less for activations; the CUDA context, NCCL and the\n"
        "  allocator's rounding need additional memory; 1 GB = 1e9 bytes)\n"
    )
    title = f"memory of one process on {device}, {_name(dtype)}, micro-batches of {cfg.micro_batch_size}"
    return _section(title, rows, note)


def _hours(cfg: TrainConfig, flops: float, peak: float, device: str, dtype: torch.dtype) -> str:
    """Returns the time and the cost of a run of so many FLOPs, and the assumptions. peak: FLOP/s of an accelerator."""
    if dtype != torch.bfloat16 or device != "cuda":
        return (
            f"\nhours and cost: not estimated, because peak FLOP/s are known only for GPUs in bfloat16, not for "
            f"{_name(dtype)} on {device}"
        )
    n = cfg.n_accelerators
    hours = flops / (n * peak * cfg.mfu) / 3600
    time = f"{hours:,.2f} hours" if hours >= 0.1 else f"{hours * 60:.2g} minutes"
    return (
        f"\nassumptions: {peak:.3e} dense bfloat16 FLOP/s per {cfg.accelerator}, MFU {cfg.mfu:g}, {cfg.price:g} USD "
        f"per {cfg.accelerator} and hour; the time for evaluation and saving is left out\n"
        f"hours and cost: {time} on {n} x {cfg.accelerator}, {hours * n * cfg.price:,.2f} USD"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load_of(cfg: TrainConfig) -> tuple[TrainConfig, Load]:
    """Returns the settings with those of the base run and of the vocabulary, and what the run reads.

    Raises UserError if the settings do not fit the base run, the dataset or its recipe."""
    base = None
    if cfg.init_from not in KEYWORDS:
        check_name(cfg.init_from)
        if base := base_of(cfg, None):
            cfg = with_base(cfg, base)
    if cfg.task.tasks:
        return _load_of_tasks(cfg, base)
    data = data_of(cfg.dataset)
    check_arm(cfg, data.chunk_content, data.chunk_markers)
    chunk, drawn = data.chunk_content + data.chunk_markers, cfg.markers.places_markers
    if cfg.model.block_size % chunk and not (drawn and cfg.model.block_size > chunk):
        raise UserError(
            f"block_size={cfg.model.block_size} is not a multiple of {chunk}, the positions of a chunk of "
            f"{cfg.dataset}: set --block_size={nearest_multiples(cfg.model.block_size, chunk)}."
        )
    if not base:
        refuse_idle(cfg, data.chunk_markers)
    cfg = with_vocabulary(cfg, data.n_vocab, data.n_content)
    T = cfg.model.block_size
    origin = (
        f"dataset, {printable(data.origin)}\n  chunks of {data.chunk_content} content tokens + {data.chunk_markers} "
        f"markers; {_vocabulary(cfg)}"
    )
    widths = [(cfg.max_steps * cfg.batch_size, T)]
    note = "  (every window counts with all its room for markers)\n" if drawn else ""
    return cfg, Load("window", cfg.model, T - T // chunk * data.chunk_content, widths, origin, note)


def _load_of_tasks(cfg: TrainConfig, base: Checkpoint | None) -> tuple[TrainConfig, Load]:
    """Does the same for a run on tasks. base: the checkpoint that gives the model; None for a new model."""
    if base:
        tokenizer, model = base.tokenizer(), printable(str(base.folder))
    else:
        check_length(cfg)
        refuse_idle(cfg, 0)
        data = data_of(cfg.dataset)
        cfg = with_vocabulary(cfg, data.n_vocab, data.n_content)
        tokenizer = Tokenizer.load(Path(cfg.dataset)) if (Path(cfg.dataset) / SPEC_FILE).is_file() else None
        model = f"a new one, with the vocabulary of the dataset {printable(data.origin)}"
    curriculum = TaskWindows(cfg, "train", tokenizer).curriculum if tokenizer else Curriculum(cfg)
    T = cfg.task.train_length
    # the texts of one batch are padded to the same number of markers; about every tenth position follows a list
    share = max(_marker_share(name, cfg.task.meta_share) for name in cfg.task.placements)
    M = min(T, -(-round(share * T) // MULTIPLE) * MULTIPLE)
    note = (
        f"  (every text counts with its padded width, with up to {M} places for meta-tokens, and as if all its tokens\n"
        f"  were scored)\n"
    )
    origin = f"tasks {', '.join(cfg.task.tasks)}\n  model: {model}; {_vocabulary(cfg)}"
    widths = curriculum.widths(cfg.max_steps * cfg.batch_size)
    return cfg, Load("text", dataclasses.replace(cfg.model, block_size=T), M, widths, origin, note)


def _marker_share(placement: str, meta_share: float) -> float:
    """Returns the approximate share of a text's positions that are meta-tokens."""
    markers = PLACEMENTS[placement]
    return meta_share if markers.scattered else 0.1 if markers.after_lists else 0.01 if markers.has_meta else 0.0


def _vocabulary(cfg: TrainConfig) -> str:
    model = cfg.model
    return f"an embedding of {model.vocab_size:,} rows, of which {model.content_vocab_size:,} ids can be predicted"
