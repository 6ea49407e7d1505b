"""Measures the speed of decoding, and compares it with the generate functions of Hugging Face and nanoGPT.

All implementations have 12 layers of width 768 with their own random weights, and decode greedily: 256 tokens after a
prompt of 32. They take turns. nanoGPT's generate has no cache and would take minutes, so it writes only 3 tokens. Its
prompt has 159 tokens, because on average as many tokens precede each token that the others write. Weights are cast
before the clock starts, except for nanoGPT, which uses autocast.
"""

import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from nanometa.benches.timing import DTYPES, Contestant, alternate, contest, memory_bandwidth, quartiles, say
from nanometa.benches.training import Step, nanogpt_model
from nanometa.common.keyed_random import stable_key
from nanometa.config import GPTConfig, TrainConfig
from nanometa.data.tokenizer import META
from nanometa.inference.generation import MarkerPlan, generate_batch, lay_out, prepare_weights
from nanometa.model import GPT
from nanometa.training.distributed import autocast

PROMPT, NEW, QUICK_NEW = 32, 256, 64
WEIGHTS = 12 * 12 * 768**2 + 50304 * 768  # numbers that are read for every token: the blocks' matrices and the head
CPU = torch.device("cpu")


def prompt_of(n: int, seed: int) -> list[int]:
    """Returns n random token ids without <|endoftext|>."""
    return torch.randint(0, 50256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def ours(
    second_attention: str, cfg: GPTConfig, batch: int, dtype: torch.dtype, alike: bool, device: torch.device
) -> Callable:
    """Returns a function write(n) that writes n content tokens after each prompt with nanoMeta's cached decoding.

    With second_attention="meta" there are 102 markers in every 1024 positions, at the same places in all texts if
    `alike`; otherwise there are no markers."""
    M = 102 if second_attention == "meta" else 0
    model = GPT(cfg).eval().to(device)
    for block in model.h if M else ():
        torch.nn.init.normal_(block.second_attn.c_proj.weight, std=0.02)
    tokenizer = SimpleNamespace(meta=50257, eot=50256, n_content=50257, markers={META: 50257})
    data = {"chunk_content": 1024 - M, "chunk_markers": M}
    run = SimpleNamespace(
        model=model, tokenizer=tokenizer, config=TrainConfig(model=model.cfg), state={"data": data}, folder="none"
    )
    seeds = [0 if alike else number for number in range(batch)]
    plans = [MarkerPlan("uniform" if M else "none", 1024 - M, M, stable_key("bench", seed)) for seed in seeds]
    # lay_out begins with <|endoftext|>, so the prompts are as long as those of the others
    prompts = [lay_out(run, prompt_of(PROMPT - 1, number), plan) for number, plan in enumerate(plans)]

    with autocast(device, dtype):
        weights = prepare_weights(run, batch)

    def write(n: int) -> None:
        written = [token for _, token in generate_batch(run, prompts, plans, n, temperature=0, weights=weights)]
        assert sum(token != 50257 for token in written) == n * batch

    return write


def hugging_face(cfg: GPTConfig, batch: int, dtype: torch.dtype, device: torch.device) -> Callable:
    """Returns write(n) for GPT2LMHeadModel.generate, which uses its own cache, with all weights in dtype."""
    import transformers

    shape = transformers.GPT2Config(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd)
    model = transformers.GPT2LMHeadModel(shape).eval().to(device, dtype)
    tokens = torch.tensor([prompt_of(PROMPT, number) for number in range(batch)], device=device)
    seen = torch.ones_like(tokens)

    def write(n: int) -> None:
        out = model.generate(
            tokens, attention_mask=seen, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=50256
        )
        assert out.size(1) == PROMPT + n

    return write


def nanogpt(folder: str, cfg: GPTConfig, batch: int, dtype: torch.dtype, new: int, device: torch.device) -> Callable:
    """Returns write(n) for the generate function of a nanoGPT checkout, with a longer prompt.

    It runs under autocast, as in nanoGPT's sample.py."""
    shape = (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size, batch)
    model = (
        nanogpt_model(Step("nanogpt", "", False, shape, vocabulary=(cfg.vocab_size, 0), nanogpt=folder))
        .eval()
        .to(device)
    )
    prompts = [prompt_of(PROMPT + new // 2 - 1, number) for number in range(batch)]
    tokens = torch.tensor(prompts, device=device)

    def write(n: int) -> None:
        with autocast(device, dtype):
            model.generate(tokens, n, top_k=1)

    return write


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Measures content tokens per second and the time to the first token, on the CPU.

    The column "share of the bandwidth" compares the speed of batch 1 with the limit that reading all weights once per
    token sets."""
    rows, bandwidth = [], memory_bandwidth()
    print(f"reading memory: {bandwidth / 1e9:.1f} GB/s")
    for dtype, batch in itertools.product(args.dtypes, args.batches):
        found = compare(batch, dtype, args.repeats, args.nanogpt, new=QUICK_NEW if args.quick else NEW)
        for row in found:
            if batch == 1 and row["who"] != "nanogpt":
                row["share of the bandwidth"] = row["content tokens/s"] * WEIGHTS * DTYPES[dtype].itemsize / bandwidth
        rows += found
    return rows


def compare(
    batch: int,
    name: str,
    repeats: int,
    checkout: Path | None,
    new: int = NEW,
    layers: int = 12,
    device: torch.device = CPU,
) -> list[dict]:
    """Returns one row per implementation for a batch size and a dtype (fp32 or bf16).

    new: content tokens to write; layers: layers of the models."""
    dtype = DTYPES[name]
    shape = {"n_layer": layers, "vocab_size": 50304, "content_vocab_size": 50257}
    plain, meta = (GPTConfig(**shape, second_attention=second) for second in ("none", "meta"))
    makers = {"none": (ours, "none", plain, batch, dtype, False, device)}
    makers["meta"] = (ours, "meta", meta, batch, dtype, False, device)
    if batch > 1:
        makers["meta, one plan"] = (ours, "meta", meta, batch, dtype, True, device)
    if importlib.util.find_spec("transformers"):
        makers["hf"] = (hugging_face, plain, batch, dtype, device)
    tokens = dict.fromkeys(makers, new)
    if checkout is not None:
        makers["nanogpt"], tokens["nanogpt"] = (nanogpt, str(checkout), plain, batch, dtype, new, device), 3
    writers = {who: Contestant(*maker, keep_freed=who not in ("hf", "nanogpt")) for who, maker in makers.items()}
    first = alternate({who: partial(write, 1) for who, write in writers.items()}, repeats)
    whole, _ = contest(writers, repeats, {who: (tokens[who],) for who in writers})
    rows = []
    for who in writers:
        low, middle, high = (batch * tokens[who] / seconds for seconds in quartiles(whole[who])[::-1])
        row = {"batch": batch, "dtype": name, "who": who, "content tokens/s": middle}
        row |= {"quartiles": f"{low:.1f} .. {high:.1f}", "first token ms": quartiles(first[who])[1] * 1e3}
        rows.append(row)
        say(row)
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns sentences that compare the speeds within each batch size and dtype."""
    groups: dict[tuple, dict] = {}
    for row in rows:
        groups.setdefault((row["batch"], row["dtype"]), {})[row["who"]] = row["content tokens/s"]
    return [
        f"batch {batch}, {dtype}: meta / none {group['meta'] / group['none']:.3f}"
        + "".join(f", none / {who} {group['none'] / group[who]:.2f}" for who in ("hf", "nanogpt") if who in group)
        for (batch, dtype), group in groups.items()
    ]
