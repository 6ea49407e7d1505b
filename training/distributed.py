"""Starts the processes of a run, chooses its device and dtype, and lets the processes communicate.

A single process needs no launcher; `torchrun --nproc_per_node=8 train.py ...` starts eight. A single process that
torchrun starts takes the path of several: it joins a group of one and wraps the model in DDP. One GPU can therefore
test what eight will do."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed

from nanometa.common.errors import ReportedError, UserError, in_words, report
from nanometa.common.terminal import shortened
from nanometa.config import TrainConfig
from nanometa.training.launch import joins_group, ranks, under_torchrun

T = TypeVar("T")
SHOWN = 8  # differing facts that a message lists
PATIENCE = timedelta(seconds=20)  # with the process that reports an error


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
        """Whether this process belongs to a process group, of any size, and so exchanges tensors through it."""
        return self.store is not None

    def on(self, device: str) -> "Dist":
        """Returns this process with its device, after it has joined its process group, if it belongs to one.

        device: auto | cuda | mps | cpu. Raises UserError, in all processes, if the device is not available in one."""
        chosen = self.agree("hardware", lambda: pick_device(device, self.local_rank))
        self.compare("devices", {"device": chosen.type})
        if self.store is not None:
            backend, timeout = "nccl" if chosen.type == "cuda" else "gloo", timedelta(minutes=30)
            # the prefix keeps torch's keys apart from those of `hear`
            store = torch.distributed.PrefixStore("collectives", self.store)
            torch.distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout
            )
        return dataclasses.replace(self, device=chosen)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over all processes, in place, and returns it."""
        if self.has_group:
            torch.distributed.all_reduce(tensor)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces a tensor by its largest values over all processes, in place, and returns it."""
        if self.has_group:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        """Waits until all processes arrive here."""
        if self.has_group:
            torch.distributed.barrier()

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

        If it fails in any process, for a reason that in_words knows, all processes raise a UserError with the sentence
        of the lowest rank that failed. A name can be used only once, as in `hear`."""
        if self.store is None:
            return step()
        result, sentence = None, ""
        try:
            result = step()
        except Exception as error:
            if (words := in_words(error)) is None:
                raise
            sentence = f"rank {self.rank} on {socket.gethostname()}: {words}" if self.rank else str(words)
        for refusal in filter(None, self.hear(name, sentence)):
            raise self.reported(UserError(refusal), self.is_main)
        return result

    def compare(self, name: str, facts: dict[str, object]) -> None:
        """Raises UserError, in all processes, unless all of them have the same facts.

        The message names the first rank that differs from rank 0, and the facts in which it differs, with both values.
        A name can be used only once, as in `hear`."""
        words = self.hear(name, json.dumps({fact: str(value) for fact, value in facts.items()}))
        first, *others = map(json.loads, words)
        for rank, other in enumerate(others, start=1):
            if names := [fact for fact in {**first, **other} if first.get(fact) != other.get(fact)]:
                wanted, found = (
                    " and ".join(f"{fact}={shortened(have.get(fact, 'none'))}" for fact in names[:SHOWN])
                    for have in (first, other)
                )
                more = f", and {len(names) - SHOWN} more differ" if names[SHOWN:] else ""
                sentence = (
                    f"rank {rank} has {found}, but rank 0 has {wanted}{more}: start all processes of a run with the "
                    f"same command, code, data and checkpoints."
                )
                raise self.reported(UserError(sentence), self.is_main)

    def reported(self, error: UserError, mine: bool, by_all: bool = True) -> UserError:
        """Reports an error that several processes raise once, and returns the ReportedError that they raise.

        mine: whether this process reports it. by_all: whether all processes raise it now. No process ends before the
        error is reported, because torchrun then kills the others, nor before all have heard of it, because the store
        can end with its process. A process that is alone reports nothing and gets the error back."""
        if self.store is None:
            return error
        others = [f"heard by {rank}" for rank in range(self.world) if rank != self.rank] if by_all else []
        with contextlib.suppress(RuntimeError):  # another process has ended too soon
            if mine:
                report(error)
                self.store.set("reported", "")
                self.store.wait(others, PATIENCE)
            else:
                self.store.wait(["reported"], PATIENCE)
                self.store.set(f"heard by {self.rank}", "")
        return ReportedError(str(error))

    def first_reported(self, error: Exception) -> Exception:
        """Returns what this process raises in place of an error that ends it: a ReportedError, if one was reported.

        The first process that fails for a reason that in_words knows reports it. The others fail for the same reason,
        or because they have lost a process that failed."""
        words = in_words(error)
        if self.store is None or isinstance(error, ReportedError):
            return error
        with contextlib.suppress(RuntimeError):
            if words is not None:
                return self.reported(words, mine=self.store.add("failed", 1) == 1, by_all=False)
            if self.store.check(["failed"]):
                return self.reported(UserError("another process of the run has failed."), mine=False, by_all=False)
        return error


@contextlib.contextmanager
def processes():
    """Meets the other processes of a run, yields the Dist of this one, whose method `on` gives it a device, and leaves.

    An error that several processes raise in the block is reported once."""
    rank, local_rank, world = ranks()
    dist = Dist(rank, local_rank, world, torch.device("cpu"), meet(rank, world) if joins_group(world) else None)
    try:
        yield dist
    except Exception as error:
        if (other := dist.first_reported(error)) is error:
            raise
        raise other from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def meet(rank: int, world: int) -> torch.distributed.Store:
    """Returns the store that all processes of the run share. Raises UserError if they do not meet within 10 minutes."""
    place, timeout = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", timedelta(minutes=10)
    if not under_torchrun():  # torchrun's processes start together, others when somebody starts them
        print(f"rank {rank} of {world} is waiting for the other processes at {place}", flush=True)
    try:
        wait_for_name(os.environ["MASTER_ADDR"])
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timeout))
        store = fresh_store(store, rank, world, timeout)
        check_places(store, rank, world)
        return store
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # further lines are a C++ stack
        raise UserError(
            f"rank {rank} of {world} cannot meet the other processes at MASTER_ADDR:MASTER_PORT = {place} "
            f"({shortened(reason)}): check this address and the nodes."
        ) from error


def wait_for_name(host: str, patience: float = 60) -> None:
    """Waits until the name of a host is known, which can take a while when the host has just started.

    Raises OSError if it is still unknown after `patience` seconds; torch would try until it times out."""
    end = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(1)


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


def check_places(store, rank: int, world: int) -> None:
    """Raises UserError if another process has the same rank, or if rank 0 and another one differ in the number of
    processes. torchrun sees to both, but other launchers may not."""
    if store.add(f"processes of rank {rank}", 1) > 1:
        raise UserError(f"two processes have RANK={rank}: give every process a rank of its own.")
    store.set(f"world of {rank}", str(world))
    for other in range(1, world) if rank == 0 else (0,):
        if (theirs := store.get(f"world of {other}").decode()) != str(world):
            raise UserError(
                f"rank {rank} has WORLD_SIZE={world}, but rank {other} has WORLD_SIZE={theirs}: set the same number."
            )


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
    """Returns the reason why torch.compile does not work on this machine, or None if it does.

    Compiles a small function to find out, because a compiler that is installed can be broken."""
    if device.type == "mps":
        return "torch.compile is not used on mps"
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        return "triton is not installed"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return f"no C++ compiler was found ({', '.join(compilers)})"
    # a new constant makes a function that no cache knows; the caches outlive the compiler
    constant = uuid.uuid4().int % 10**6
    try:
        torch.compile(lambda x: x * constant + 1)(torch.ones(16, device=device))
    except Exception as error:
        reason = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]  # what follows is for developers of PyTorch
        return f"the compiler fails: {shortened(' '.join(reason.split()))}"
    return None


def why_eager(cfg: TrainConfig, dist: Dist) -> str | None:
    """Returns the reason why the model is not compiled, the same in all processes, or None if it is.

    Raises UserError if compile=True was given explicitly and does not work in one of the processes."""
    if not cfg.compile:
        return "as requested"
    reason = next(filter(None, dist.hear("compiler", why_not_compile(dist.device) or "")), None)
    if reason and "compile" in cfg.typed:
        raise UserError(f"compile=True does not work, because {reason}: repair that, or leave compile out.")
    return f"not compiled, because {reason}" if reason else None


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
