"""Writes text with a trained run.

python sample.py                                     # the newest run, from the start of a document
python sample.py --run=out/tiny_meta --prompt='def main' --count=3 --temperature=0.7
python sample.py --prompt='import<|meta|> os' --meta=none         # markers placed by hand
head -c 300 some.py | python sample.py --prompt_file=-
python sample.py --rope_scaling=yarn --rope_factor=4 --max_new_tokens=2000        # beyond the window of training
"""

import codecs
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.common.terminal import BOLD, DIM_MAGENTA, write
from nanometa.config import SampleConfig
from nanometa.config.command_line import load_config, run_cli
from nanometa.data.tokenizer import META
from nanometa.inference.cache import DecodingWeights
from nanometa.inference.generation import MarkerPlan, generate_batch, lay_out, prepare_weights
from nanometa.training.checkpoint import Run, load_run
from nanometa.training.context_extension import rescaled, scaling_of
from nanometa.training.distributed import autocast, pick_device, pick_dtype

BATCH = 8  # samples at once: the cache of each takes memory


def read_prompt(cfg: SampleConfig) -> str | None:
    """The prompt's text, None if none was asked for. Raises UserError if it is empty or unreadable."""
    if not cfg.prompt_file and cfg.prompt is None:
        return None
    name = {"": "--prompt", "-": "standard input"}.get(cfg.prompt_file, cfg.prompt_file)
    try:
        if cfg.prompt_file:
            raw = sys.stdin.buffer.read() if cfg.prompt_file == "-" else Path(cfg.prompt_file).read_bytes()
        else:
            raw = cfg.prompt.encode("utf-8", "surrogateescape")  # the bytes that the shell gave
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt in {name} is not UTF-8 at byte {error.start}: convert it first.") from None
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt in {name} is no Unicode at character {error.start}: leave that out.") from None
    except (OSError, ValueError) as error:  # a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the prompt file {name} cannot be read ({reason}): give a text file.") from None
    if not text.replace(META, ""):
        raise UserError(
            f"the prompt {'holds markers alone' if text else 'is empty'}: give some text, or leave the prompt out to "
            f"start a document."
        )
    return text


def start_samples(
    run: Run, cfg: SampleConfig, prompt_text: str | None, numbers: Sequence[int], weights: DecodingWeights | None = None
) -> list[tuple[list[int], Iterator[int]]]:
    """For each of the samples, decoded as one batch: the ids of its prompt, markers included, and those that will
    follow. weights: as for `generate`. Raises UserError before anything is shown."""
    seeds = [stable_key(cfg.seed, number) for number in numbers]
    plans = [MarkerPlan.of_run(run, cfg.meta, seed) for seed in seeds]
    content = run.tokenizer.encode_prompt(prompt_text or "")
    prompts = [lay_out(run, content, plan) for plan in plans]
    options = (cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, seeds, cfg.stop_at_endoftext, weights)
    coming = generate_batch(run, prompts, plans, *options)
    waiting: list[deque[int]] = [deque() for _ in numbers]

    def stream(mine: deque[int]) -> Iterator[int]:
        while True:
            while mine:
                yield mine.popleft()
            number, token = next(coming, (None, None))
            if number is None:
                return
            waiting[number].append(token)

    return list(zip(prompts, map(stream, waiting), strict=True))


def show_sample(run: Run, show_markers: bool, prompt: list[int], ids: Iterator[int]) -> None:
    """Streams one sample to standard output: prompt bold, markers dim."""
    tokenizer = run.tokenizer
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens

    def show(token: int, style: str = "") -> None:
        if token != tokenizer.meta:
            write(decoder.decode(tokenizer.decode_bytes(token)), style)
        elif show_markers:
            write(META, DIM_MAGENTA)

    for token in prompt[prompt.index(tokenizer.eot) + 1 :]:
        show(token, BOLD)
    for token in ids:
        show(token)
    write(decoder.decode(b"", final=True) + "\n")


def main(argv: list[str]) -> None:
    cfg = load_config(SampleConfig, argv)
    prompt_text = read_prompt(cfg)
    device = pick_device(cfg.device)
    run = rescaled(load_run(cfg.run, device), cfg.rescale)
    show_markers = cfg.show_markers == "yes" or (cfg.show_markers == "auto" and sys.stdout.isatty())
    with autocast(device, pick_dtype(cfg.dtype, device)[0]):
        weights = prepare_weights(run, min(cfg.count, BATCH))
        for first in range(0, cfg.count, BATCH):
            numbers = range(first, min(first + BATCH, cfg.count))
            samples = start_samples(run, cfg, prompt_text, numbers, weights)
            if first == 0:
                size = f"{run.model.num_params() / 1e6:.1f}M parameters"
                read = f", read with {scaling_of(run.config.model)}" if cfg.rescale.rope_scaling else ""
                about = f"{run.folder}, step {run.state['step']:,}, {size}, markers: {cfg.meta}{read}"
                print(f"# {about}", file=sys.stderr)
            for number, sample in zip(numbers, samples, strict=True):
                if cfg.count > 1:
                    write(f"--- sample {number + 1} of {cfg.count} ---\n", BOLD)
                show_sample(run, show_markers, *sample)


if __name__ == "__main__":
    run_cli(main)
