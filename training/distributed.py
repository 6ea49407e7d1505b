"""Processes and devices: who we are under torchrun, what the hardware can do, and the few collectives.

One process needs no launcher; `torchrun --nproc_per_node=8 train.py ...` starts eight."""

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
    """rank of world processes, local_rank on this machine, and the device of this process."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    store: torch.distributed.Store | None = None  # where the processes met; None if there is only one

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def hear(self, name: str, word: str) -> list[str]:
        """What every process says, in the order of ranks. A name is good for one time.

        Not a collective: those give up after 30 minutes, and a GPU spins meanwhile. This waits on the socket of the
        store as long as it takes, for a process that hashes terabytes, say; if one dies, torchrun ends the others."""
        if self.world == 1:
            return [word]
        self.store.set(f"{name} {self.rank}", word)
        names = [f"{name} {rank}" for rank in range(self.world)]
        self.store.wait(names, timedelta(days=7))
        return [self.store.get(name).decode() for name in names]

    def agree(self, name: str, step: Callable[[], T]) -> T:
        """Returns step(), which every process calls. If it is refused in any of them, all end with that sentence.

        A name is good for one time, as in hear."""
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
        if self.world > 1:
            torch.distributed.barrier()


def ranks() -> tuple[int, int, int]:
    """rank, local_rank, world as torchrun says them; without it we are the only process."""
    names = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    rank, local_rank, world = (int(os.environ.get(name, alone)) for name, alone in names)
    return rank, local_rank, world


@contextlib.contextmanager
def processes(device: str):
    """The Dist of this process, for as long as the block lasts. device: auto | cuda | mps | cpu."""
    rank, local_rank, world = ranks()
    chosen = pick_device(device, local_rank)
    store = None
    if world > 1:
        backend, timeout = "nccl" if chosen.type == "cuda" else "gloo", timedelta(minutes=30)
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timeout))
        store = fresh_store(store, rank, world, timeout)
        of_group = torch.distributed.PrefixStore("collectives", store)  # so that no name of ours is one of theirs
        torch.distributed.init_process_group(backend, store=of_group, rank=rank, world_size=world, timeout=timeout)
    try:
        yield Dist(rank, local_rank, world, chosen, store)
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


def fresh_store(store, rank: int, world: int, timeout: timedelta) -> torch.distributed.Store:
    """A part of the store that no earlier start of these processes has written to; all processes get the same.

    torchrun's store outlives its restarts (--max_restarts), and torch 2.13 finds the addresses of dead processes in it:
    most restarts hang in init_process_group or fail (pytorch issues 135712, 167288). So rank 0 draws a name and
    gives it to those who ask for it with a word of their own, until all have heard it: neither an old question nor an
    old answer is taken for a new one. A count of restarts would not do: every node has its own."""
    mine = uuid.uuid4().hex
    store.set_timeout(timeout)
    if rank > 0:
        store.set(f"question of {rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.set(f"{rank} heard {name}", "")
        return torch.distributed.PrefixStore(name, store)
    deaf, end = set(range(1, world)), time.monotonic() + timeout.total_seconds()
    while deaf:
        for other in deaf:
            if store.check([f"question of {other}"]):
                store.set(f"answer to {store.get(f'question of {other}').decode()}", mine)
        deaf = {other for other in deaf if not store.check([f"{other} heard {mine}"])}
        if deaf and time.monotonic() > end:
            raise UserError(f"processes {sorted(deaf)} of {world} did not come within {timeout}: see to their nodes.")
        time.sleep(0.01)
    return torch.distributed.PrefixStore(mine, store)


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """auto takes CUDA, then MPS, then the CPU. Raises UserError for a device that is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UserError(f"device={device} is not available to this torch ({torch.__version__}): take --device=cpu.")
    if device != "cuda":
        return torch.device(device)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
            f"start torchrun with --nproc_per_node={torch.cuda.device_count()}."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of autocast (float32 = none) and the reason for it. auto takes bfloat16 where the hardware has it."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "this GPU computes it" if native else "this GPU does not compute bfloat16"
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        why = "this CPU has AVX512-BF16 or AMX" if native else "this CPU has neither AVX512-BF16 nor AMX"
    else:
        native, why = False, f"bfloat16 is not used on {device.type}"
    if dtype == "auto":
        return (torch.bfloat16 if native else torch.float32), why
    return getattr(torch, dtype), "as asked" if dtype == "float32" or native else f"as asked, though {why}"


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        import importlib.util

        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if device.type == "mps":
        return "it is not used on mps"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler is found ({', '.join(compilers)})"


def accumulation(cfg: TrainConfig, world: int) -> int:
    """Micro-batches a step in each process. Raises UserError if batch_size cannot be divided so."""
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
        f"{cfg.micro_batch_size}: nearest possible is {offers}."
    )
