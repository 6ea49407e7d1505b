"""Writes text with a trained run.

python sample.py                                     # the newest run, from the start of a document
python sample.py --run=out/tiny_meta --prompt='def main' --count=3 --temperature=0.7
python sample.py --prompt='import<|meta|> os' --meta=none         # markers placed by hand
head -c 300 some.py | python sample.py --prompt_file=-
"""

import codecs
import sys
from pathlib import Path

from rich.console import Console

from checkpoint import Run, load_run
from config import SampleConfig, UserError, load_config, run_cli
from data.tokenizer import META
from dist import autocast, pick_device, pick_dtype
from generate import MarkerPlan, generate, lay_out
from rng import stable_key


def read_prompt(cfg: SampleConfig) -> str | None:
    """The prompt's text, None if none was asked for. Raises UserError if it is empty or unreadable."""
    if cfg.prompt_file:
        name = "standard input" if cfg.prompt_file == "-" else cfg.prompt_file
        try:
            raw = sys.stdin.buffer.read() if cfg.prompt_file == "-" else Path(cfg.prompt_file).read_bytes()
            text = raw.decode("utf-8")
        except OSError as error:
            raise UserError(f"the prompt file {name} cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt in {name} is not UTF-8 at byte {error.start}: convert it first.") from None
    else:
        text = cfg.prompt
    if text is not None and not text.replace(META, ""):
        raise UserError("the prompt is empty: give some text, or leave the prompt out to start a document.")
    return text


def write_sample(console: Console, run: Run, cfg: SampleConfig, prompt_text: str | None, number: int) -> None:
    """Streams one sample to the console: prompt bold, markers dim."""
    tokenizer, seed = run.tokenizer, stable_key(cfg.seed, number)
    plan = MarkerPlan.of_run(run, cfg.meta, seed)
    prompt = lay_out(run, tokenizer.encode_prompt(prompt_text or ""), plan)
    ids = generate(
        run,
        prompt,
        plan,
        cfg.max_new_tokens,
        cfg.temperature,
        cfg.top_k,
        cfg.top_p,
        seed,
        cfg.stop_at_endoftext,
    )
    show_markers = cfg.show_markers == "yes" or (cfg.show_markers == "auto" and console.is_terminal)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens

    def show(token: int, style: str | None) -> None:
        if token == tokenizer.meta:
            if show_markers:
                console.print(META, end="", style="dim magenta", markup=False, highlight=False)
        else:
            text = decoder.decode(tokenizer.decode_bytes(token))
            console.print(text, end="", style=style, markup=False, highlight=False)

    for token in prompt[prompt.index(tokenizer.eot) + 1 :]:
        show(token, "bold")
    for token in ids:
        show(token, None)
    console.print()


def main(argv: list[str]) -> None:
    cfg = load_config(SampleConfig, argv)
    prompt = read_prompt(cfg)
    device = pick_device(cfg.device)
    run = load_run(cfg.run, device)
    where = f"{run.folder}, step {run.state['step']:,}, {run.model.num_params() / 1e6:.1f}M parameters"
    Console(stderr=True).print(f"# {where}, markers: {cfg.meta}", style="dim", highlight=False, soft_wrap=True)
    console = Console(soft_wrap=True)
    with autocast(device, pick_dtype(cfg.dtype, device)[0]):
        for number in range(cfg.count):
            if cfg.count > 1:
                console.rule(f"sample {number + 1} of {cfg.count}", style="dim")
            write_sample(console, run, cfg, prompt, number)


if __name__ == "__main__":
    run_cli(main)
