"""Generates text with a trained run.

python sample.py                                     # the newest run starts a document
python sample.py --run=out/tiny_meta --prompt='def main' --count=3 --temperature=0.7
python sample.py --prompt='import<|meta|> os' --meta=none         # markers placed by hand
head -c 300 some.py | python sample.py --prompt_file=-            # the prompt comes from standard input
python sample.py --rope_scaling=yarn --rope_factor=4 --max_new_tokens=2000        # longer than the trained window
"""

import codecs
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.common.terminal import BOLD, DIM_MAGENTA, write, write_line
from nanometa.config import SampleConfig
from nanometa.config.command_line import load_config, run_cli
from nanometa.data.tokenizer import MARKERS
from nanometa.inference.decoder import DecodingWeights
from nanometa.inference.generation import Held, MarkerPlan, generate_batch, lay_out, prepare_weights
from nanometa.training.checkpoint import Run, load_run
from nanometa.training.context_extension import rescaled, scaling_of
from nanometa.training.distributed import autocast, pick_device, pick_dtype

BATCH = 8  # samples that are generated at once; each needs memory for its KV cache


def read_prompt(cfg: SampleConfig) -> str | None:
    """Returns the text of the prompt, or None if the settings give none.

    Raises UserError if the prompt is empty or unreadable."""
    if not cfg.prompt_file and cfg.prompt is None:
        return None
    name = {"": "--prompt", "-": "standard input"}.get(cfg.prompt_file, cfg.prompt_file)
    try:
        if cfg.prompt_file:
            raw = sys.stdin.buffer.read() if cfg.prompt_file == "-" else Path(cfg.prompt_file).read_bytes()
        else:
            raw = cfg.prompt.encode("utf-8", "surrogateescape")  # the original bytes of the command line
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt in {name} is not UTF-8 at byte {error.start}: convert it to UTF-8.") from None
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt in {name} is not valid Unicode at character {error.start}: remove that character."
        ) from None
    except (OSError, ValueError) as error:  # a zero byte in the path is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the prompt file {name} cannot be read ({reason}): give a readable text file.") from None
    if not re.sub("|".join(map(re.escape, MARKERS)), "", text):
        raise UserError(
            f"the prompt {'contains only markers' if text else 'is empty'}, so there is nothing to continue: give some "
            f"text, or leave the prompt out to start a document."
        )
    return text


def start_samples(
    run: Run,
    cfg: SampleConfig,
    prompt_text: str | None,
    numbers: Sequence[int],
    weights: DecodingWeights | None = None,
    held: list[Held] | None = None,
) -> list[tuple[list[int], Iterator[int]]]:
    """Starts generating the samples of these numbers as one batch.

    Returns for each sample the ids of its prompt, markers included, and an iterator over the ids that follow.
    weights: as in `generate`. held: receives what a cache that forgets holds at the end of each sample.
    Raises UserError for a prompt that cannot be continued, before anything is printed."""
    held = [] if held is None else held
    seeds = [stable_key(cfg.seed, number) for number in numbers]
    plans = [MarkerPlan.of_run(run, cfg.meta, seed, cfg.compression_ratio) for seed in seeds]
    content = run.tokenizer.encode_prompt(prompt_text or "")
    prompts = [lay_out(run, content, plan) for plan in plans]
    options = (cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, seeds, cfg.stop_at_endoftext, weights)
    generated = generate_batch(run, prompts, plans, *options, on_end=held.append)
    queues: list[deque[int]] = [deque() for _ in numbers]  # ids that were generated and not yet shown, by sample

    def stream(queue: deque[int]) -> Iterator[int]:
        while True:
            while queue:
                yield queue.popleft()
            number, token = next(generated, (None, None))
            if number is None:
                return
            queues[number].append(token)

    return list(zip(prompts, map(stream, queues), strict=True))


def show_sample(run: Run, show_markers: bool, prompt: list[int], ids: Iterator[int]) -> None:
    """Prints one sample while it is generated, with the prompt in bold and markers dimmed."""
    tokenizer = run.tokenizer
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # one character may span several tokens

    def show(token: int, style: str = "") -> None:
        if token < tokenizer.n_content:
            write(decoder.decode(tokenizer.decode_bytes(token)), style)
        elif show_markers:
            write(tokenizer.decode([token]), DIM_MAGENTA)

    for token in prompt[prompt.index(tokenizer.eot) + 1 :]:
        show(token, BOLD)
    for token in ids:
        show(token)
    write(decoder.decode(b"", final=True) + "\n")


def describe_cache(run: Run, held: Held) -> str:
    """Returns a sentence about what the cache held at the end of a sample, and what it had forgotten."""
    kept, n_content = set(held.places), run.tokenizer.n_content
    gone = [token for place, token in enumerate(held.ids) if place not in kept and token < n_content]
    marks = sum(held.ids[place] >= n_content for place in held.places)
    return (
        f"# the cache held {len(kept)} of {len(held.ids)} positions, {marks} of them markers "
        f"({len(kept) * held.position_bytes / 1e3:,.0f} of {len(held.ids) * held.position_bytes / 1e3:,.0f} kB); "
        f"forgotten: {len(gone)} tokens, {int(run.tokenizer.token_bytes[gone].sum())} bytes of text"
    )


def main(argv: list[str]) -> None:
    """Runs the command: prints cfg.count samples, and one line about the run on standard error."""
    cfg = load_config(SampleConfig, argv)
    prompt_text = read_prompt(cfg)
    device = pick_device(cfg.device)
    run = rescaled(load_run(cfg.run, device), cfg.rescale)
    plan = MarkerPlan.of_run(run, cfg.meta, ratio=cfg.compression_ratio)
    cfg.refuse_unused(plan.injection, plan.scheme)
    show_markers = cfg.show_markers == "yes" or (cfg.show_markers == "auto" and sys.stdout.isatty())
    with autocast(device, pick_dtype(cfg.dtype, device)[0]):
        weights = prepare_weights(run, min(cfg.count, BATCH))
        for first in range(0, cfg.count, BATCH):
            numbers = range(first, min(first + BATCH, cfg.count))
            held: list[Held] = []
            samples = start_samples(run, cfg, prompt_text, numbers, weights, held)
            if first == 0:
                size = f"{run.model.num_params() / 1e6:.1f}M parameters"
                scaling = f", read with {scaling_of(run.config.model)}" if cfg.rescale.rope_scaling else ""
                about = f"{run.folder}, step {run.state['step']:,}, {size}, markers: {cfg.meta}{scaling}"
                write_line(f"# {about}", file=sys.stderr)
            for number, sample in zip(numbers, samples, strict=True):
                if cfg.count > 1:
                    write(f"--- sample {number + 1} of {cfg.count} ---\n", BOLD)
                show_sample(run, show_markers, *sample)
            for one in sorted(held) if run.config.markers.hides.after else ():
                write_line(describe_cache(run, one), file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
