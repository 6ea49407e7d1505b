"""Starts runs for faults.py, by forking this process, which has imported torch, or under torchrun; compares the
runs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
import einops._torch_specific  # noqa: F401
import safetensors.numpy
import torch._dynamo  # noqa: F401  these would be imported in every fork

from nanometa.config import TrainConfig
from nanometa.config.command_line import load_config
from nanometa.data.verify import CACHE
from nanometa.training.run_log import environment
from tests import faulty_train
from tests.conftest import ROOT, TINY, free_port, override

STEPS, SAVE_INTERVAL, KEEP = 9, 3, 2
ARGS = override(
    TINY, "--dataset=data/u", "--block_size=32", "--dropout=0.1", f"--max_steps={STEPS}", "--eval_interval=4",
    f"--save_interval={SAVE_INTERVAL}", f"--keep={KEEP}", "--init_from=auto",
)  # fmt: skip


class Lost(Exception):
    """Raised with the reason when a run differs from the uninterrupted one or cannot finish."""


def need(condition, why) -> None:
    if not condition:
        raise Lost(str(why))


def forked(program: Callable[[], None], out: Path, error: Path) -> int:
    """Calls program() in a fork of this process, whose output goes to two files, and returns the id of the fork.

    The fork ends with the exit status of the program."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would ignore
        for stream, path in ((1, out), (2, error)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
        program()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass
class Attempt:
    """The end of one start of a run: a status per process (negative if a signal killed it), stdout and stderr."""

    statuses: list[int]
    out: str
    error: str

    def __str__(self) -> str:
        return f"ended with {self.statuses}: {' | '.join(self.error.splitlines()[-2:])}"


class Run:
    """A run in its own folder, which may be started many times, with one trace of all its starts."""

    kills = 0  # number of starts, of all runs, that ended by SIGKILL

    def __init__(self, name: str, world: int):
        self.name, self.world, self.attempts, self.started = name, world, 0, 0
        self.was_damaged = False  # whether a test damaged its files
        self.folder, self.trace = Path("out") / name, Path("out") / f"{name}.trace"
        self.folder.parent.mkdir(exist_ok=True)
        self.argv = [*override(ARGS, f"--micro_batch_size={4 // world}"), f"--run_name={name}"]

    def copy(self, name: str) -> "Run":
        other = Run(name, self.world)
        other.attempts = self.attempts
        other.was_damaged = self.was_damaged
        shutil.copytree(self.folder, other.folder)
        shutil.copy(self.trace, other.trace)
        return other

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.trace.unlink(missing_ok=True)

    def lines(self) -> list[dict]:
        return faulty_train.lines(self.trace)

    def newest(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    # ------------------------------------------------------------------------- starting

    def start(
        self, fault: dict | None = None, kill_after: float | None = None, patience: float = 60,
        changes: dict[int, str] | None = None,
    ) -> Attempt:  # fmt: skip
        """Starts the run by forking and waits until it ends. changes: a setting that a rank has instead of the run's.

        All processes are killed after kill_after or patience seconds. If one fails, the others get SIGTERM, as under
        torchrun.
        """
        sys.stdout.flush()
        port = free_port()
        argvs = [override(self.argv, *filter(None, [(changes or {}).get(rank)])) for rank in range(self.world)]
        rank_of = {self.fork(argvs[rank], rank, port, fault or {}): rank for rank in range(self.world)}
        statuses = [0] * self.world
        end, failed_at = time.monotonic() + (patience if kill_after is None else kill_after), None
        while rank_of:
            for pid in [*rank_of]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[rank_of.pop(pid)] = status = os.waitstatus_to_exitcode(status)
                    if status and failed_at is None:
                        failed_at = time.monotonic()
                        for other in rank_of:
                            os.kill(other, signal.SIGTERM)
            if time.monotonic() > min(end, (failed_at or end) + 2):
                for pid in rank_of:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return self._ended(statuses, [f"out{rank}" for rank in range(self.world)])

    def _ended(self, statuses: list[int], outs: list[str]) -> Attempt:
        self.started, self.attempts = self.attempts, self.attempts + 1
        Run.kills += -signal.SIGKILL in statuses
        return Attempt(
            statuses, "".join(Path(name).read_text() for name in outs),
            "".join(Path(name.replace("out", "err")).read_text() for name in outs),
        )  # fmt: skip

    def fork(self, argv: list[str], rank: int = 0, port: str = "", fault: dict | None = None) -> int:
        """Starts a process of the run and returns its id. port: that at which all processes of the run meet."""

        def train() -> None:
            if self.world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            faulty_train.main(argv, fault or {}, self.trace, self.attempts)

        return forked(train, Path(f"out{rank}"), Path(f"err{rank}"))

    def torchrun(self, fault: dict | None = None, patience: float = 60, restarts: int = 0) -> Attempt:
        """Starts the run under torchrun with this number of restarts; the Attempt has only torchrun's status.

        Processes that outlive torchrun keep running. Everything is killed `patience` seconds after all processes have
        started.
        """
        env = {**os.environ, "FAULT": json.dumps(fault or {}), "TRACE": str(self.trace), "ATTEMPT": str(self.attempts)}
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        launcher += (f"--nproc_per_node={self.world}", f"--max_restarts={restarts}")
        with open("out0", "w") as out, open("err0", "w") as error:
            process = subprocess.Popen(
                [*launcher, str(ROOT / "tests/faulty_train.py"), *self.argv], env=env, stdout=out, stderr=error
            )
            end = None
            while process.poll() is None:
                time.sleep(0.1)
                if end is None and len(self.pids()) == self.world:
                    end = time.monotonic() + patience
                if end is not None and time.monotonic() > end:
                    process.kill()
                    self.kill_orphans()
        ended = self._ended([process.wait()], ["out0"])
        # each restart counts as another start
        self.attempts = max([self.attempts, *(line["attempt"] + 1 for line in self.lines())])
        return ended

    def has_struck(self) -> bool:
        """Returns whether the fault of the last start happened."""
        return any("strikes" in line and line["attempt"] == self.started for line in self.lines())

    def pids(self) -> list[int]:
        """Returns the ids of the processes of the last start."""
        return [line["pid"] for line in self.lines() if "pid" in line and line["attempt"] == self.attempts]

    def kill_orphans(self) -> None:
        """Kills processes of the run that outlived their launcher, and waits until they have ended."""
        for pid in [line["pid"] for line in self.lines() if "pid" in line]:
            command = Path(f"/proc/{pid}/cmdline")
            while command.exists() and f"--run_name={self.name}".encode() in command.read_bytes():
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)

    # ------------------------------------------------------------------------- the outcome

    def finish(self, reference: "Run", start=None) -> None:
        """Resumes until the run is finished. Raises Lost if that fails or if the result differs from that of
        `reference`."""
        for _ in range(3):
            attempt = (start or self.start)()
            need(not any(attempt.statuses), f"the resumed run {attempt}")
            if "done in" in attempt.out:
                return self.compare(reference)
        raise Lost("the run does not finish")

    def compare(self, reference: "Run") -> None:
        self.compare_windows(reference)
        aside = [*self.folder.glob("damaged_*")]
        need(self.was_damaged or not aside, f"a kill left {aside} under a final name")
        need(self.metrics() == reference.metrics(), "metrics.jsonl differs")
        names = {path.name for path in self.folder.iterdir() if not path.name.startswith(("damaged_", "abandoned_"))}
        older = {name for name in names if name.startswith("step_") and name != f"step_{STEPS:08d}"}
        expected = {path.name for path in reference.folder.iterdir()} - {path.name for path in reference.newest()[:-1]}
        need(names - older == expected and len(older) == 1, f"the folder holds {sorted(names)}")
        need((self.folder / "latest").read_text() == f"step_{STEPS:08d}\n", "latest names another checkpoint")
        ours, theirs = self.tensors(), reference.tensors()
        need(ours.keys() == theirs.keys(), "the names of the tensors differ")
        for name, tensor in theirs.items():
            need(ours[name].tobytes() == tensor.tobytes(), f"{name} differs")

    def metrics(self) -> list[dict]:
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if k != "mfu" and not k.endswith("_s")} for line in lines]

    def tensors(self) -> dict:
        files = [*self.newest()[-1].glob("*.safetensors"), *self.folder.glob("best_*/*.safetensors")]
        loaded = {f"{path.parent.name}/{path.name}": safetensors.numpy.load_file(path) for path in files}
        return {f"{file}:{name}": tensor for file, tensors in loaded.items() for name, tensor in tensors.items()}

    def check_kept(self) -> None:
        """Raises Lost if fewer checkpoints are there than the KEEP newest of those that were saved completely."""
        steps = [line["step"] for line in self.lines() if "windows" in line]
        saves = max(0, max(steps, default=0) - 1) // SAVE_INTERVAL  # a step's windows are loaded during the step before
        need(len(self.newest()) >= min(KEEP, saves), f"{saves} saves left {[path.name for path in self.newest()]}")

    def compare_windows(self, reference: "Run") -> None:
        """Raises Lost unless each start continues at a step that was reached and every step sees the same windows."""
        expected = reference.windows()[0]
        seen, reached = {}, {}
        for attempt in self.windows():
            for rank in range(self.world):
                steps = sorted(step for step, of in attempt if of == rank)
                if not steps:
                    continue
                need(steps == [*range(steps[0], steps[-1] + 1)], f"a start trained the steps {steps}")
                need(steps[0] <= reached.get(rank, -1) + 1, f"steps before {steps[0]} are missing")
                reached[rank] = steps[-1]
            for key, batches in attempt.items():
                need(batches == expected[key][: len(batches)], f"step {key[0]} saw other windows")
            seen |= attempt
        need(seen == expected, "not all windows were seen")

    def windows(self) -> list[dict]:
        """Returns for each start a dictionary from (step, rank) to the micro-batches."""
        starts = [{} for _ in range(self.attempts)]
        for line in self.lines():
            if "windows" in line:
                batches = starts[line["attempt"]].setdefault((line["step"], line["rank"]), [])
                batches.append((line["windows"], line["tokens"]))
        return starts


class Lab:
    """Uninterrupted runs of one and of two processes, the moments of both, and a name for each trial."""

    def __init__(self, rng: random.Random, quick: bool, kills: int):
        self.rng, self.quick, self.kills, self.count = rng, quick, kills, 0
        self.references, self.moments_of, self.seconds = {}, {}, {}
        # done here once instead of in every fork
        load_config(TrainConfig, ARGS)
        environment()
        for world in (1, 2):
            run = self.references[world] = self.run(world, f"whole{world}")
            began = time.monotonic()
            attempt = run.start({"trace": True})
            self.seconds[world] = time.monotonic() - began
            need(not any(attempt.statuses), f"the uninterrupted run {attempt}")
            for rank in range(world):
                moments = [line for line in run.lines() if "moment" in line and line["rank"] == rank]
                self.moments_of[world, rank] = moments
        self.moments = {world: self.moments_of[world, 0] for world in (1, 2)}

    def run(self, world: int = 1, name: str = "") -> Run:
        """Returns a new run. It deletes the cache of verified files, so that all runs have the same moments."""
        Path("data/u", CACHE).unlink(missing_ok=True)
        self.count += 1
        return Run(name or f"trial{self.count}", world)

    def some(self, items: list, full: int | None, quick: int) -> list:
        """Draws `full` of the items, or `quick` of them in a quick run. None means all."""
        number = quick if self.quick else full
        return items if number is None or number >= len(items) else self.rng.sample(items, number)

    def at(self, *phases: str, calls: tuple = (), world: int = 1, rank: int = 0) -> list[int]:
        """Returns the moments of a rank in these phases and calls; without `calls`, those of all calls."""
        found = self.moments_of[world, rank]
        return [m["moment"] for m in found if m["phase"] in phases and (not calls or m["call"] in calls)]
