"""Measures speed as ratios within one run: alternating, after a warm-up, medians of many repeats.

python bench.py            # meta against plain training steps, and the meta layer against a dense mask
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from cli import run_cli
from config import GPTConfig
from dist import autocast
from loss import Objective
from meta_attention import MetaAttention
from model import GPT
from runlog import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def alternate(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):  # two of warm-up
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def spread(times: list[float]) -> str:
    quarters = statistics.quantiles(times, n=4)
    return f"{statistics.median(times) * 1e3:8.1f} ms (quartiles {quarters[0] * 1e3:.1f} .. {quarters[2] * 1e3:.1f})"


def training_step(cfg: GPTConfig, C: int, windows: int, dtype: torch.dtype) -> Callable:
    """A whole update of a model on random windows of C content tokens and block_size - C markers."""
    T, meta = cfg.block_size, cfg.content_vocab_size
    torch.manual_seed(0)
    tokens = torch.randint(0, meta, (windows, T))
    index = torch.stack([torch.randperm(T)[: T - C].sort().values for _ in range(windows)])
    tokens.scatter_(1, index, meta)
    targets = torch.where(tokens.roll(-1, 1) == meta, -100, tokens.roll(-1, 1))
    positions = torch.arange(T).expand(windows, T)
    model = GPT(cfg)
    objective = Objective(model)
    optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=1e-4, fused=True)

    def step():
        with autocast(torch.device("cpu"), dtype):
            nats = objective(tokens, targets, positions, index)
        (nats / (windows * C)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_step(label: str, shape: GPTConfig, C: int, M: int, windows: int, repeats: int) -> None:
    for name, dtype in DTYPES.items():
        meta = dataclasses.replace(shape, block_size=C + M, second_attention="meta")
        none = dataclasses.replace(shape, block_size=C, second_attention="none")
        functions = {
            "meta": training_step(meta, C, windows, dtype),
            "none": training_step(none, C, windows, dtype),
        }
        times = alternate(functions, repeats)
        seconds = {arm: statistics.median(times[arm]) for arm in times}
        content = seconds["none"] / seconds["meta"]
        print(f"{label}, {name}, eager: meta {spread(times['meta'])}, none {spread(times['none'])}")
        print(f"    meta / none: {content:.3f} in content tokens/s, {content * (C + M) / C:.3f} in positions/s")


def bench_layer(T: int, M: int, C: int = 768, n_head: int = 12, B: int = 4, repeats: int = 9) -> None:
    """Forward and backward of MetaAttention against SDPA over all rows with the paper's masks materialised, both with
    LayerNorm and residual."""
    torch.manual_seed(0)
    layer, norm = MetaAttention(C, n_head, bias=False, dropout=0.0), torch.nn.LayerNorm(C)
    x = torch.randn(B, T, C, requires_grad=True)
    index = torch.stack([torch.randperm(T)[:M].sort().values for _ in range(B)])
    is_meta = torch.zeros(B, T, dtype=torch.bool).scatter_(1, index, True)
    pairs = is_meta[:, :, None] & is_meta[:, None, :] & torch.ones(T, T, dtype=torch.bool).tril()

    def dense(x):
        q, k, v = rearrange(layer.c_attn(norm(x)), "b t (three h d) -> three b h t d", three=3, h=n_head)
        # a row that is no meta position sees nothing: let it see itself, and drop it afterwards
        mask = (pairs | torch.eye(T, dtype=torch.bool))[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + torch.where(is_meta[..., None], layer.c_proj(rearrange(y, "b h t d -> b t (h d)")), 0)

    def gathered(x):
        return layer(x, index, norm)

    for name, dtype in DTYPES.items():

        def timed(function, dtype=dtype):
            with autocast(torch.device("cpu"), dtype):
                out = function(x)
            out.float().sum().backward()

        if dtype == torch.float32:
            torch.testing.assert_close(gathered(x), dense(x), rtol=1e-4, atol=1e-5)  # the same layer
        functions = {"gathered": lambda timed=timed: timed(gathered), "dense": lambda timed=timed: timed(dense)}
        times = alternate(functions, repeats)
        ratio = statistics.median(times["dense"]) / statistics.median(times["gathered"])
        print(f"meta layer, T = {T}, M = {M}, width {C}, B = {B}, {name}, forward + backward:")
        print(f"    gathered {spread(times['gathered'])}, dense mask {spread(times['dense'])}: {ratio:.1f}x")


def main(argv: list[str]) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    facts = environment()
    print(", ".join(f"{key} {facts[key]}" for key in ("processor", "cpu_capability", "threads", "torch", "commit")))
    bench_layer(T=1024, M=102)
    vocabulary = {"vocab_size": 4160, "content_vocab_size": 4096}
    tiny = GPTConfig(n_layer=4, n_head=3, n_embd=192, **vocabulary)
    bench_step("tiny step (4 layers, 192), 8 windows", tiny, C=461, M=51, windows=8, repeats=15)
    gpt2 = GPTConfig(vocab_size=50304, content_vocab_size=50257)
    bench_step("GPT-2 step (12 layers, 768), 1 window", gpt2, C=922, M=102, windows=1, repeats=5)


if __name__ == "__main__":
    run_cli(main)
