"""Measures the time of functions that take turns, and the peak memory of functions in fresh processes."""

import contextlib
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nanometa.common.memory import keep_freed_memory

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


class Contestant:
    """A function in a process of its own. Calling the contestant calls the function and waits for it.

    Contestants do not share the settings of a process, such as the memory allocator's, nor its peak memory."""

    def __init__(self, make: Callable, *args, keep_freed: bool = True):
        """Starts the process, which calls make(*args) to get the function. make must be at the top level of a module.

        keep_freed: whether the process keeps freed memory (common/memory.py), as all commands of nanoMeta do."""
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, make, args, keep_freed), daemon=True)
        self.process.start()
        end.close()  # so that the parent notices if the child ends

    def __call__(self, *args) -> None:
        """Calls the function with these arguments. Raises RuntimeError if it fails."""
        self._ask(args)

    def peak(self) -> int:
        """Returns the peak memory of the process in bytes."""
        return self._ask(None)

    def _ask(self, request):
        try:
            self.pipe.send(request)
            right, answer = self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("the process of a contestant ended, perhaps for lack of memory") from None
        if not right:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _serve(pipe, make: Callable, args: tuple, keep_freed: bool) -> None:
    """Answers the requests of a Contestant: arguments to call the function with, or None for the peak memory."""
    if keep_freed:
        keep_freed_memory()
    function = failure = None
    try:
        function = make(*args)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    with contextlib.suppress(EOFError):  # the parent has closed its end
        while True:
            request = pipe.recv()
            answer = None
            try:
                if request is None:
                    answer = peak_memory()
                elif function:
                    function(*request)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            pipe.send((failure is None, failure or answer))


def contest(
    contestants: dict[str, Contestant], repeats: int, arguments: dict[str, tuple] | None = None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Returns the seconds of each call and the peak memory in bytes, by contestant. They take turns, and then end.

    arguments: what each contestant is called with; nothing by default."""
    try:
        times = alternate(
            {who: partial(call, *(arguments or {}).get(who, ())) for who, call in contestants.items()}, repeats
        )
        return times, {who: contestant.peak() for who, contestant in contestants.items()}
    finally:
        for contestant in contestants.values():
            contestant.close()


def matmul_peak(dtype: torch.dtype, device: torch.device, n: int = 4096) -> float:
    """Returns the FLOP/s of the fastest of five (n, n) matrix products, as an estimate of this machine's peak."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / min(alternate({"": lambda: torch.mm(a, b, out=out)}, 5)[""])


def memory_bandwidth(bytes_read: int = 2**29) -> float:
    """Returns the bytes per second of the fastest of five passes over a tensor that no cache holds."""
    numbers = torch.ones(bytes_read // 4)
    return bytes_read / min(alternate({"": numbers.sum}, 5)[""])
