"""Speed of decoding on a CPU, beside Hugging Face's generate and nanoGPT's, where they are.

python bench_decode.py                                     # 12 layers of 768, random weights, greedy
python bench_decode.py --nanogpt=../nanoGPT --batch 1 --dtype fp32 --new 256

Every contestant has the same shape and its own random weights, a prompt of 32 tokens, --new to write; they take turns.
nanoGPT's generate has no cache and would take minutes: it writes 3 tokens after a longer prompt, with as many
before them as the others have on average. Weights are cast before the clock starts, for all but nanoGPT, whose own way
is autocast.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import alternate, spread
from cli import run_cli
from config import GPTConfig, UserError
from generate import MarkerPlan, generate_batch, prepare
from model import GPT
from rng import stable_key
from runlog import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = 32


def prompt_of(n: int, seed: int) -> list[int]:
    return torch.randint(0, 50256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def ours(second_attention: str, cfg: GPTConfig, batch: int, dtype: torch.dtype, alike: bool) -> Callable:
    """n -> writes n content tokens after each prompt. "meta" has 102 markers in each 1024 positions, at other places in
    each text unless `alike`; else there are none."""
    M = 102 if second_attention == "meta" else 0
    model = GPT(cfg).eval()
    for block in model.h if M else ():
        torch.nn.init.normal_(block.second_attn.c_proj.weight, std=0.02)
    config = SimpleNamespace(model=model.cfg, target_rule="ignore", seed=0)
    run = SimpleNamespace(model=model, tokenizer=SimpleNamespace(meta=50257, eot=50256), config=config, folder="none")
    seeds = [0 if alike else number for number in range(batch)]
    plans = [MarkerPlan("uniform" if M else "none", 1024 - M, M, stable_key("bench", seed)) for seed in seeds]
    prompts = []
    for number, plan in enumerate(plans):
        ids: list[int] = []
        for token in prompt_of(PROMPT, number):
            while len(ids) in plan:
                ids.append(50257)
            ids.append(token)
        prompts.append(ids)

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        weights = prepare(run, batch)

    def write(n: int) -> None:
        written = [token for _, token in generate_batch(run, prompts, plans, n, temperature=0, weights=weights)]
        assert sum(token != 50257 for token in written) == n * batch

    return write


def hugging_face(cfg: GPTConfig, batch: int, dtype: torch.dtype) -> Callable:
    """GPT2LMHeadModel.generate: its cache, greedy, all weights in dtype."""
    import transformers

    shape = transformers.GPT2Config(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd)
    model = transformers.GPT2LMHeadModel(shape).eval().to(dtype)
    tokens = torch.tensor([prompt_of(PROMPT, number) for number in range(batch)])
    seen = torch.ones_like(tokens)

    def write(n: int) -> None:
        out = model.generate(
            tokens, attention_mask=seen, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=50256
        )
        assert out.size(1) == PROMPT + n

    return write


def nanogpt(folder: Path, cfg: GPTConfig, batch: int, dtype: torch.dtype, new: int) -> Callable:
    """The generate of a nanoGPT checkout, under autocast as its sample.py has it, after a longer prompt."""
    file = folder / "model.py"
    if not file.is_file():
        raise UserError(f"--nanogpt={folder} has no model.py: give the folder of a nanoGPT checkout.")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")}
    model = module.GPT(module.GPTConfig(**shape)).eval()
    tokens = torch.tensor([prompt_of(PROMPT + new // 2 - 1, number) for number in range(batch)])

    def write(n: int) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model.generate(tokens, n, top_k=1)

    return write


def bench_decode(batch: int, name: str, repeats: int, checkout: Path | None, layers: int = 12, new: int = 64) -> None:
    """Prints content tokens/s and the time to the first token of everyone, and ratios to ours without markers."""
    dtype = DTYPES[name]
    shape = {"n_layer": layers, "vocab_size": 50304, "content_vocab_size": 50257}
    plain, meta = (GPTConfig(**shape, second_attention=second) for second in ("none", "meta"))
    writers = {"plain": ours("none", plain, batch, dtype, False), "meta": ours("meta", meta, batch, dtype, False)}
    if batch > 1:
        writers["meta, alike"] = ours("meta", meta, batch, dtype, True)
    if importlib.util.find_spec("transformers"):
        writers["Hugging Face"] = hugging_face(plain, batch, dtype)
    tokens = dict.fromkeys(writers, new)
    if checkout is not None:
        writers["nanoGPT"], tokens["nanoGPT"] = nanogpt(checkout, plain, batch, dtype, new), 3
    first = alternate({who: lambda w=write: w(1) for who, write in writers.items()}, repeats + 2)
    whole = alternate({who: lambda w=write, n=tokens[who]: w(n) for who, write in writers.items()}, repeats)
    rates = {who: [batch * tokens[who] / seconds for seconds in whole[who]] for who in writers}
    middle = {who: statistics.median(rates[who]) for who in writers}
    print(f"batch {batch}, {name}:")
    for who in writers:
        low, _, high = statistics.quantiles(rates[who], n=4)
        best, ratio = max(rates[who]), middle["plain"] / middle[who]
        print(
            f"    {who:13} {middle[who]:7.1f} content tokens/s (quartiles {low:.1f} .. {high:.1f}, best {best:.1f}), "
            f"plain is {ratio:5.2f}x (best {max(rates['plain']) / best:.2f}x); first token {spread(first[who]).strip()}"
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3, help="measured turns, after two of warm-up")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--new", type=int, default=64, help="content tokens to write; 256 takes four times as long")
    args = parser.parse_args(argv)
    facts = environment()
    print(", ".join(f"{key} {facts[key]}" for key in ("processor", "cpu_capability", "threads", "torch", "commit")))
    for name in args.dtype:
        for batch in args.batch:
            bench_decode(batch, name, args.repeats, args.nanogpt, args.layers, args.new)


if __name__ == "__main__":
    run_cli(main)
