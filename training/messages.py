"""Composes the lines that a training run prints and writes to train.log."""

from nanometa.config import TrainConfig
from nanometa.config.checks import flat
from nanometa.config.tasks import cells_of
from nanometa.data.loader import Windows
from nanometa.model import GPT
from nanometa.tasks.source import TaskWindows
from nanometa.tasks.words import tokens_per_item

# These are not listed: the line starts with the first, and the tokenizer decides the others.
UNLISTED = ("run_name", "vocab_size", "content_vocab_size")


def count(n: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 process" or "2 processes"."""
    plural = noun + ("es" if noun.endswith(("s", "ch")) else "s")
    return f"{n:,} {noun if n == 1 else plural}"


def settings_line(cfg: TrainConfig) -> str:
    """Returns the settings that differ from the defaults. For a task run it omits the dataset, which provides no
    text."""
    defaults, unlisted = flat(TrainConfig()), UNLISTED + (("dataset",) if cfg.task.tasks else ())
    changed = (
        f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in flat(cfg).items()
        if name not in unlisted and value != defaults[name]
    )
    return f"settings that differ from the defaults (config.json lists all): {' '.join(changed) or 'none'}"


def warnings(cfg: TrainConfig, n_windows: int | None) -> list[str]:
    """Returns a line for each setting that is allowed but probably not meant.

    n_windows: number of training windows; None for tasks, whose texts do not repeat."""
    found, task = [], cfg.task
    end = cfg.max_steps if cfg.schedule == "constant" else min(cfg.max_steps, cfg.lr_decay_steps or cfg.max_steps)
    if end <= cfg.warmup_steps:
        name = "max_steps" if end == cfg.max_steps else "lr_decay_steps"
        found.append(
            f"{name}={end} is not above warmup_steps={cfg.warmup_steps}, so the warm-up takes the whole schedule and "
            f"the learning rate does not reach {cfg.learning_rate:g}; --warmup_steps={end // 10} would let it"
        )
    if n_windows is not None and cfg.batch_size > n_windows:
        found.append(
            f"batch_size={cfg.batch_size} is above the {count(n_windows, 'training window')} of the dataset, so each "
            f"step reads windows more than once"
        )
    if task.tasks and task.curriculum_steps >= cfg.max_steps:
        found.append(
            f"curriculum_steps={task.curriculum_steps} is not below max_steps={cfg.max_steps}, so the run ends before "
            f"the curriculum does"
        )
    if task.tasks and task.train_length > cfg.model.block_size:
        found.append(
            f"train_length={task.train_length} is above the model's window of block_size={cfg.model.block_size}, so "
            f"the run trains rotary positions beyond it"
        )
    return [f"warning: {line}" for line in found]


def model_line(model: GPT) -> str:
    """Returns the number of parameters, of those that are trained, and of those that weight decay applies to."""
    whole, rest = (f"{model.num_params(table) / 1e6:.2f}M" for table in (True, False))
    decayed, others = (sum(p.numel() for p in group["params"]) for group in model.param_groups(0.0))
    table = "" if whole == rest else f", {rest} without the table of learned positions"
    if model.frozen_head:
        return (
            f"model: {whole} parameters{table}; {decayed + others:,} of them are trained, by AdamW without weight decay"
        )
    return f"model: {whole} parameters{table}; weight decay applies to {decayed:,} of {decayed + others:,}"


def data_lines(
    cfg: TrainConfig,
    train: Windows | TaskWindows,
    val: Windows | TaskWindows,
    world: int,
    accumulation: int,
    source: str,
) -> list[str]:
    """Describes the data, one step and the whole run.

    source: where the tokenizer of the tasks comes from; world: processes; accumulation: micro-batches in each."""
    split = f"{count(world, 'process')} x {count(accumulation, 'micro-batch')} x {cfg.micro_batch_size}"
    if cfg.task.tasks:
        start, _ = train.reached(0)
        growth = f", growing from {start} by the curriculum" if cfg.task.curriculum_steps else ""
        return [
            f"data: new texts of at most {train.T} positions{growth}, with the tokenizer of {source} "
            f"({tokens_per_item(train.tokenizer):.3f} tokens per item); {val.n_windows:,} validation texts",
            f"each step: {count(cfg.batch_size, 'text')} ({split})",
            f"whole run: {'' if cfg.stop_at is None else 'at most '}{count(cfg.max_steps, 'step')} = "
            f"{count(cfg.max_steps * cfg.batch_size, 'text')}",
        ]
    content = cfg.batch_size * train.content_per_window
    return [
        f"data: {count(train.n_windows, 'training window')} and {count(val.n_windows, 'validation window')} of "
        f"{train.T} positions, {train.content_per_window} of them content tokens",
        f"each step: {count(cfg.batch_size, 'window')} ({split}) = {content:,} content tokens = "
        f"{cfg.batch_size * train.T:,} positions",
        f"whole run: {count(cfg.max_steps, 'step')} = {cfg.max_steps * content:,} content tokens = "
        f"{cfg.max_steps * cfg.batch_size / train.n_windows:.2f} epochs",
    ]


def step_line(step: int, last: int, loss: float, rate: float, norm: float, rates: dict, mfu: dict, eta: str) -> str:
    """Describes one training step. last: the step after which the run ends; rates: counts per second by name; mfu:
    {"mfu": share} where the peak is known."""
    speed = "  ".join(f"{value:,.0f} {name}/s".replace("_", " ") for name, value in rates.items())
    return (
        f"step {step:>7,}/{last:,}  loss {loss:.4f}  learning rate {rate:.2e}  gradient norm {norm:.2f}  {speed}  "
        f"{'MFU {mfu:.1%}  '.format(**mfu) if mfu else ''}time left {eta}"
    )


def bad_step_line(step: int, what: str, why: str, windows: list[int]) -> str:
    """Describes a bad step with its first 16 windows. step: the number of updates done, including this one.
    --show_batch counts the updates before a step, so its value is one less."""
    title = {"skipped": "update skipped", "spike": "spike, update taken"}[what]
    shown = " ".join(map(str, windows[:16])) + (" .." if len(windows) > 16 else "")
    return f"step {step:>7,}  {title}: {why}; windows {shown} (--show_batch={step - 1} prints their text)"


def progress_line(step: int, done: int, n_windows: int, elapsed: str) -> str:
    """Describes how far an evaluation has come."""
    return f"step {step:>7,}  validation: {done:,} of {n_windows:,} windows after {elapsed}"


def sample_line(step: int, text: str) -> str:
    """Returns the line with a text that the model has generated."""
    return f"step {step:>7,}  sample: {text}"


def evaluation_line(
    step: int, figures: dict, tasks: tuple[str, ...], packed: dict | None, scope: str, seconds: float, best: bool
) -> str:
    """Describes the result of an evaluation.

    packed: the dataset's bits per byte under gzip and xz, None for tasks; scope: what was evaluated, in words."""
    if tasks:
        exact = ", ".join(f"{task} {figures[f'exact_{task}']:.1%}" for task in tasks)
        if len(cells := cells_of(figures, tasks)) > len(tasks):
            lowest = min(cells, key=cells.get)
            exact += f" (lowest: {lowest} {cells[lowest]:.1%})"
        result = f"exact answers: {exact}; loss {figures['loss']:.4f} nats per token of the answer"
    else:
        result = (
            f"{figures['bits_per_byte']:.4f} bits per byte (gzip -9: {packed['gzip_9_bits_per_byte']:.3f}, "
            f"xz: {packed['xz_bits_per_byte']:.3f}), loss {figures['loss']:.4f} nats per token"
        )
    if figures["endoftext_loss"] is not None:
        result += f", loss at document ends {figures['endoftext_loss']:.2f} nats"
    return (
        f"step {step:>7,}  validation on {scope}: {result}; {figures['tokens']:,} tokens in {seconds:.1f} s"
        f"{'; the best so far' if best else ''}"
    )


def stop_at_line(step: int, stop_at: float, exact: float, end: int | None, last: int) -> str:
    """Describes the evaluation that reached --stop_at. exact: the lowest share of exact answers; end: as in
    ending.Ending; last: the step after which the run ends."""
    if end is None:
        then = f"the decay of the learning rate has begun already, so the run ends after step {last:,} as planned"
    elif end == step:
        then = "the run ends here"
    else:
        then = f"the learning rate decays from here, and the run ends after step {last:,}"
    return f"step {step:>7,}  every cell has at least {exact:.1%} exact answers (stop_at={stop_at:g}); {then}"
