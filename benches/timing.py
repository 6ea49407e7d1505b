"""How speed and memory are measured: alternating, after a warm-up, medians with quartiles; peaks in fresh processes."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 2  # calls


def alternate(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + WARM_UP):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of fewer than three, the least and the most."""
    if len(times) < 3:
        return min(times), statistics.median(times), max(times)
    return tuple(statistics.quantiles(times, n=4))


def spread(times: list[float]) -> str:
    low, middle, high = quartiles(times)
    return f"{middle * 1e3:8.1f} ms (quartiles {low * 1e3:.1f} .. {high * 1e3:.1f})"


def say(row: dict) -> None:
    """A row as it comes, in one line: the table follows only when all are there."""
    print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def peak_memory() -> int:
    """Bytes that this process has held at most: of the GPU if there is one, else resident, the interpreter included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measured(make: Callable, args: tuple, repeats: int) -> tuple[list[float], int]:
    times = alternate({"": make(*args)}, repeats)[""]
    return times, peak_memory()


def in_fresh_process(make: Callable, *args, repeats: int = 3) -> tuple[list[float], int]:
    """Seconds of each call of make(*args)(), and the process's peak memory. make is a function of a module."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_measured, make, args, repeats).result()


def matmul_peak(dtype: torch.dtype, device: torch.device, n: int = 4096) -> float:
    """FLOP/s of the best of some (n, n) products: what this machine can do at most."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / min(alternate({"": lambda: torch.mm(a, b, out=out)}, 5)[""])
