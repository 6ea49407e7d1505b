"""Compares the speed of one meta-attention layer with attention over all rows under the paper's masks, and that of
causal attention in plain products with PyTorch's kernel."""

import functools

import torch
import torch.nn.functional as F

from nanometa.benches.timing import DTYPES, alternate, quartiles
from nanometa.benches.training import DenseMeta
from nanometa.meta_attention import MetaAttention, blockwise_attention
from nanometa.training.distributed import autocast, pick_device

WIDTH, HEADS = 768, 12
LENGTHS = {1024: 4, 4096: 1}  # positions per window -> windows


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Measures the forward and backward pass of both layers, after checking that they compute the same result."""
    device, rows = pick_device("auto"), []
    for (T, B), dtype in ((shape, dtype) for shape in LENGTHS.items() for dtype in args.dtypes):
        torch.manual_seed(0)
        layer = MetaAttention(WIDTH, HEADS, bias=False, dropout=0.0).to(device)
        norm = torch.nn.LayerNorm(WIDTH).to(device)
        dense = DenseMeta(WIDTH, HEADS, bias=False, dropout=0.0).to(device)
        dense.load_state_dict(layer.state_dict())
        x = torch.randn(B, T, WIDTH, device=device, requires_grad=True)
        index = torch.stack([torch.randperm(T, device=device)[: T // 10].sort().values for _ in range(B)])
        torch.testing.assert_close(layer(x, index, norm), dense(x, index, norm), rtol=1e-4, atol=1e-5)

        def run(module, x=x, index=index, norm=norm, dtype=dtype):
            with autocast(device, DTYPES[dtype]):
                out = module(x, index, norm)
            out.float().sum().backward()

        times = alternate({"gathered": lambda m=layer: run(m), "dense": lambda m=dense: run(m)}, 3 * args.repeats)
        rows += rows_of(times, what="meta-attention", T=T, markers=T // 10, windows=B, dtype=dtype)
    return rows + (causal(args.repeats) if device.type == "cpu" and "bf16" in args.dtypes else [])


def causal(repeats: int) -> list[dict]:
    """Measures the forward and backward pass of causal attention in bf16 on a CPU, as kernel and in plain products."""
    rows = []
    kernel = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    for T, B in ((256, 16), (512, 8), (1024, 4)):
        torch.manual_seed(0)
        inputs = [torch.randn(B, HEADS, T, WIDTH // HEADS, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        grad = torch.randn_like(inputs[0])

        def run(attend, inputs=inputs, grad=grad):
            torch.autograd.grad(attend(*inputs), inputs, grad)

        ways = {"kernel": lambda run=run: run(kernel), "plain products": lambda run=run: run(blockwise_attention)}
        rows += rows_of(alternate(ways, 3 * repeats), what="causal", T=T, windows=B, dtype="bf16")
    return rows


def rows_of(times: dict[str, list[float]], **facts) -> list[dict]:
    """Returns one row per contestant of `alternate`: the facts, and the median and the quartiles in milliseconds."""
    rows = []
    for who, seconds in times.items():
        low, middle, high = (1e3 * value for value in quartiles(seconds))
        rows.append(facts | {"who": who, "ms": middle, "quartiles": f"{low:.1f} .. {high:.1f}"})
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns sentences that compare the two ways of each pair of rows."""
    return [
        f"{one['what']}, T = {one['T']}, {one['dtype']}: the time of {other['who']} divided by that of {one['who']} is "
        f"{other['ms'] / one['ms']:.2f}"
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
