"""Compares the speed of one meta-attention layer with attention over all rows under the paper's masks."""

import torch

from nanometa.benches.timing import DTYPES, alternate, quartiles
from nanometa.benches.training import DenseMeta
from nanometa.meta_attention import MetaAttention
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
        for who, seconds in times.items():
            low, middle, high = quartiles(seconds)
            row = {"T": T, "markers": T // 10, "windows": B, "dtype": dtype, "who": who, "ms": middle * 1e3}
            rows.append(row | {"quartiles": f"{low * 1e3:.1f} .. {high * 1e3:.1f}"})
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns sentences that compare the two layers at each length and dtype."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [
        f"T = {ours['T']}, {ours['dtype']}: dense / gathered {dense['ms'] / ours['ms']:.1f}" for ours, dense in pairs
    ]
