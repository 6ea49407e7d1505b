"""Measures the time of functions that take turns, and the peak memory of functions in fresh processes."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 2  # calls that are not measured


def alternate(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each call by function.

    The functions take turns, so that a busy machine slows all of them alike."""
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
    """Returns the lower quartile, the median and the upper quartile. With fewer than three measurements, the
    minimum and the maximum replace the quartiles."""
    if len(times) < 3:
        return min(times), statistics.median(times), max(times)
    return tuple(statistics.quantiles(times, n=4))


def spread(times: list[float]) -> str:
    """Returns the median and the quartiles as text, in milliseconds."""
    low, middle, high = quartiles(times)
    return f"{middle * 1e3:8.1f} ms (quartiles {low * 1e3:.1f} .. {high * 1e3:.1f})"


def say(row: dict) -> None:
    """Prints one line about a row as soon as it is measured. The table follows when all rows are done."""
    print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes: GPU memory if there is a GPU, else resident memory.

    Resident memory includes the interpreter."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the memory that the parent process held before the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measured(make: Callable, args: tuple, repeats: int) -> tuple[list[float], int]:
    """Measures make(*args) in this process; in_fresh_process calls it in a new process."""
    times = alternate({"": make(*args)}, repeats)[""]
    return times, peak_memory()


def in_fresh_process(make: Callable, *args, repeats: int = 3) -> tuple[list[float], int]:
    """Measures the function that make(*args) returns in a fresh process.

    make must be defined at the top level of a module. Returns the seconds of each call and the peak memory in bytes."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_measured, make, args, repeats).result()


def matmul_peak(dtype: torch.dtype, device: torch.device, n: int = 4096) -> float:
    """Returns the FLOP/s of the fastest of five (n, n) matrix products, as an estimate of this machine's peak."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / min(alternate({"": lambda: torch.mm(a, b, out=out)}, 5)[""])
