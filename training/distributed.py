"""Starts the processes of a run, chooses its device and dtype, and lets the processes communicate.

A single process needs no launcher; `torchrun --nproc_per_node=8 train.py ...` starts eight. A single process that
torchrun starts takes the path of several: it joins a group of one and wraps the model in DDP. One GPU can therefore
test what eight will do."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Dist:
    """This process among all processes of a run: its rank, its rank on this machine, and its device."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    store: torch.distributed.Store | None = None  # shared by all processes; None without torchrun

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0, which writes files and log lines."""
        return self.rank == 0

    @property
    def has_group(self) -> bool:
        """Whether this process has joined a process group, of any size, and so exchanges tensors through it."""
        return self.store is not None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over all processes, in place, and returns it."""
        if self.has_group:
            torch.distributed.all_reduce(tensor)
        return tensor

    def hear(self, name: str, word: str) -> list[str]:
        """Returns one word from every process, in the order of their ranks. A name can be used only once.

        This is not a collective, because collectives give up after 30 minutes and keep the GPU busy while they wait. It
        waits on the store's socket for up to 7 days, since a process may hash terabytes. If a process dies, torchrun
        ends the others."""
        if self.store is None:
            return [word]
        self.store.set(f"{name} {self.rank}", word)
        names = [f"{name} {rank}" for rank in range(self.world)]
        self.store.wait(names, timedelta(days=7))
        return [self.store.get(name).decode() for name in names]

    def agree(self, name: str, step: Callable[[], T]) -> T:
        """Calls step() in every process and returns its result.

        If it raises UserError or OSError in any process, all processes raise an error with that message. A name can be
        used only once, as in `hear`."""
        result, error = None, None
        try:
            result = step()
        except (UserError, OSError) as refusal:
            error = refusal
        refusals = self.hear(name, "" if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for sentence in filter(None, refusals):
            raise UserError(sentence)
        return result

    def barrier(self) -> None:
        """Waits until all processes arrive here."""
        if self.has_group:
            torch.distributed.barrier()


def ranks() -> tuple[int, int, int]:
    """Returns (rank, local_rank, world) as torchrun sets them; without torchrun there is one process: (0, 0, 1)."""
    names = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    rank, local_rank, world = (int(os.environ.get(name, alone)) for name, alone in names)
    return rank, local_rank, world


@contextlib.contextmanager
def processes(device: str):
    """Joins the processes of a run, yields the Dist of this one, and leaves them. device: auto | cuda | mps | cpu."""
    rank, local_rank, world = ranks()
    chosen = pick_device(device, local_rank)
    store = None
    if world > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        backend, timeout = "nccl" if chosen.type == "cuda" else "gloo", timedelta(minutes=30)
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timeout))
        store = fresh_store(store, rank, world, timeout)
        of_group = torch.distributed.PrefixStore("collectives", store)  # keeps torch's keys apart from those of `hear`
        torch.distributed.init_process_group(backend, store=of_group, rank=rank, world_size=world, timeout=timeout)
    try:
        yield Dist(rank, local_rank, world, chosen, store)
    finally:
        if store is not None:
            torch.distributed.destroy_process_group()


def fresh_store(store, rank: int, world: int, timeout: timedelta) -> torch.distributed.Store:
    """Returns a part of the store that no earlier start of these processes has written to, the same in all processes.

    torchrun's store outlives the restarts of --max_restarts, and torch 2.13 then finds the addresses of dead processes
    in it: most restarts hang in init_process_group or fail (pytorch issues 135712, 167288). So rank 0 draws a random
    name for the new part. The other ranks ask for it with a random word of their own, and rank 0 answers until all have
    confirmed the name; entries of an earlier start are therefore never taken for new ones. The count of restarts could
    not serve as the name, because every node has its own count. Raises UserError if a process does not connect in
    time."""
    mine = uuid.uuid4().hex
    store.set_timeout(timeout)
    if rank > 0:
        store.set(f"question of {rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.set(f"{rank} heard {name}", "")
        return torch.distributed.PrefixStore(name, store)
    waiting_for, end = set(range(1, world)), time.monotonic() + timeout.total_seconds()
    while waiting_for:
        for other in waiting_for:
            if store.check([f"question of {other}"]):
                store.set(f"answer to {store.get(f'question of {other}').decode()}", mine)
        waiting_for = {other for other in waiting_for if not store.check([f"{other} heard {mine}"])}
        if waiting_for and time.monotonic() > end:
            raise UserError(
                f"processes {sorted(waiting_for)} of {world} did not connect within {timeout} (h:mm:ss): check the "
                f"nodes that they run on."
            )
        time.sleep(0.01)
    return torch.distributed.PrefixStore(mine, store)


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """Returns the device to use: auto prefers CUDA, then MPS, then the CPU. Raises UserError if it is not available."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UserError(f"device={device} is not available to torch {torch.__version__} here: set --device=cpu.")
    if device != "cuda":
        return torch.device(device)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own, because there are only "
            f"{torch.cuda.device_count()}: start torchrun with --nproc_per_node={torch.cuda.device_count()}."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns the dtype of autocast, where float32 means no autocast, and the reason for it.

    auto chooses bfloat16 where the hardware computes it, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        why = (
            "this GPU computes bfloat16"
            if native
            else "this GPU does not compute bfloat16, and there is no float16 mode"
        )
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        why = "this CPU has AVX512-BF16 or AMX" if native else "this CPU has neither AVX512-BF16 nor AMX"
    else:
        native, why = False, f"bfloat16 is not used on {device.type}"
    if dtype == "auto":
        return (torch.bfloat16 if native else torch.float32), why
    return getattr(torch, dtype), "as requested" if dtype == "float32" or native else f"as requested, although {why}"


def autocast(device: torch.device, dtype: torch.dtype):
    """Returns the autocast context of pick_dtype's dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def why_not_compile(device: torch.device) -> str | None:
    """Returns the reason why torch.compile cannot work on this machine, or None if it can."""
    if device.type == "cuda":
        import importlib.util

        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if device.type == "mps":
        return "torch.compile is not used on mps"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler was found ({', '.join(compilers)})"


def accumulation(cfg: TrainConfig, world: int) -> int:
    """Returns the number of micro-batches per step in each process.

    Raises UserError if batch_size is not divisible by micro_batch_size x `world`; the message offers the nearest
    settings that are possible."""
    per_pass = cfg.micro_batch_size * world
    if cfg.batch_size % per_pass == 0:
        return cfg.batch_size // per_pass
    if cfg.batch_size % world:
        below = cfg.batch_size // per_pass * per_pass
        offers = f"--batch_size={below or per_pass}" + (f" or {below + per_pass}" if below else "")
    else:
        share = cfg.batch_size // world
        best = min((d for d in range(1, share + 1) if share % d == 0), key=lambda d: abs(d - cfg.micro_batch_size))
        offers = f"--micro_batch_size={best} or --batch_size={-(-cfg.batch_size // per_pass) * per_pass}"
    raise UserError(
        f"batch_size={cfg.batch_size} windows cannot be split over {world} processes in micro-batches of "
        f"{cfg.micro_batch_size}: set {offers}, the nearest that is possible."
    )
