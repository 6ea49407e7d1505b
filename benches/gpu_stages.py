"""The stages of benches/gpu.py. Each one measures or tests one thing, and reports its results line by line."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from nanometa.benches import decoding
from nanometa.benches.timing import peak_memory, quartiles
from nanometa.benches.training import CONTENT, MARKERS, VOCABULARY, Step, training_step
from nanometa.config import TrainConfig
from nanometa.config.command_line import Parser, path_argument, run_cli
from nanometa.training import estimate
from nanometa.training.run_log import finite

ROOT = Path(__file__).resolve().parent.parent
# bits per byte of the quick start on a CPU (README.md), and how far a GPU's result may be from it
QUICKSTART, QUICKSTART_TOLERANCE = 1.24, 0.02
MICRO_BATCHES = 5  # per update, as config/meta_gpt2.py has them on 8 GPUs
# Kernels on a GPU add in an order that varies, so a resumed run repeats the losses only up to this relative difference.
RESUME_TOLERANCE = 2e-2


@dataclasses.dataclass
class Lab:
    """What a stage needs: where it writes, on which device it runs, and how large the models are."""

    stage: str
    output: Path
    device: torch.device
    tiny: bool
    nanogpt: Path | None

    def report(self, what: str, value, unit: str = "", at_least=None, at_most=None) -> None:
        """Writes one result. A goal is met if the value is at least `at_least`, or at most `at_most`.

        The goals are for a GPU at full size, so tiny models are not held to them."""
        bound = at_most if at_least is None else at_least
        goal = met = None
        if bound is not None and not self.tiny:
            goal = f"{'at most' if at_least is None else 'at least'} {bound:g}"
            met = value <= bound if at_least is None else value >= bound
        value = finite(value) if isinstance(value, float) else value
        line = {"stage": self.stage, "what": what, "value": value, "unit": unit, "goal": goal, "met": met}
        with open(self.output / "results.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def check(self, what: str, right: bool) -> None:
        """Writes the result of a test. Raises AssertionError if it failed, which ends the stage."""
        self.report(what, "yes" if right else "NO")
        assert right, what

    @property
    def work(self) -> Path:
        """The folder of the stage's runs. It is emptied when the stage starts."""
        return self.output / "work" / self.stage

    def shape(self) -> tuple[int, int, int, int, int]:
        """Returns layers, heads, width, positions per window and windows per step."""
        return (2, 2, 64, 64, 2) if self.tiny else (12, 12, 768, 1024, 12)

    def run(self, *command: str, launcher: tuple[str, ...] = (sys.executable,), folder: Path | None = None) -> float:
        """Runs a program of the repository in the folder `work` or another one. Returns the seconds that it took.

        Raises CalledProcessError if it fails."""
        started = time.perf_counter()
        subprocess.run([*launcher, str(ROOT / command[0]), *command[1:]], cwd=folder or self.work, check=True)
        return time.perf_counter() - started

    def dataset(self, name: str) -> str:
        """Returns the path of a dataset of Python's standard library, and prepares it if it is missing.

        name: stdlib_uniform, the dataset of the quick start, or stdlib_gpt2, with GPT-2's tokenizer and windows of 1024
        positions."""
        for folder in (ROOT / "data" / name, self.output / "data" / name):
            if (folder / "manifest.json").exists():
                return str(folder)
        recipes = {"stdlib_uniform": ["stdlib.py"], "stdlib_gpt2": ["c4.py", "--source=stdlib", "--val_fraction=0.05"]}
        config, *settings = recipes[name]
        self.run("prepare.py", str(ROOT / "config" / config), *settings, f"--name={name}", folder=self.output)
        return str(self.output / "data" / name)

    def metrics(self, run: str) -> list[dict]:
        """Returns the metrics of a run in the folder `work`."""
        return [json.loads(line) for line in (self.work / f"out/{run}/metrics.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------- training speed


def turns(pipe, step: Step) -> None:
    """Compiles a training step in a process of its own, and then answers requests of the parent: a number of steps to
    time, "profile", or None to end. Several such processes compile at the same time, then they take turns."""
    started = time.perf_counter()
    one = training_step(step)
    losses = [one().item()]
    compiling = time.perf_counter() - started
    losses += [one().item() for _ in range(3)]
    pipe.send((compiling, losses, peak_memory()))
    while request := pipe.recv():
        if request == "profile":
            pipe.send(kernels_of(one, steps=2, gpu=step.device == "cuda"))
            continue
        started = time.perf_counter()
        for _ in range(request):
            loss = one()
        loss.item()  # waits for the GPU
        pipe.send((time.perf_counter() - started) / request)


def kernels_of(one: Callable[[], torch.Tensor], steps: int, gpu: bool) -> dict:
    """Profiles calls of one(). Returns the milliseconds of a call and those in which a kernel runs, the number of
    kernels, and the milliseconds of each kernel by name. On a CPU, operators take the place of kernels."""
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(steps):
            loss = one()
        loss.item()
    names: dict[str, float] = {}
    spans = []
    for event in profiler.events():
        if event.device_type.name == ("CUDA" if gpu else "CPU"):
            us = event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
            names[event.name] = names.get(event.name, 0) + us / steps / 1e3
            spans.append((event.time_range.start, event.time_range.end))
    whole = (max(end for _, end in spans) - min(start for start, _ in spans)) / steps / 1e3
    return {"ms": whole, "busy_ms": sum(names.values()), "kernels": len(spans) / steps, "names": names}


# Kinds of kernels by what their names contain, the first that fits; on a CPU, operators take their place.
KINDS = {
    "attention": "sdpa|flash|fmha|scaled_dot_product",
    "matrix products": "nvjet|gemm|cutlass|cublas|splitK|::mm|::addmm",
    "optimizer, clipping": "multi_tensor|foreach|adam|Optimizer",
    "copies": "Memcpy|Memset",
    "loss": "softmax",
    "norms, GELU and the rest": "",
}


def by_kind(names: dict[str, float]) -> dict[str, float]:
    """Returns the milliseconds of each kind of kernel, from those of each kernel by name."""
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, ms in names.items():
        kinds[next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))] += ms
    return kinds


def training_speed(lab: Lab) -> None:
    """Measures compiled training steps of the plain arm, the meta arm and nanoGPT, which take turns."""
    shape = lab.shape()
    vocabulary = (320, 300) if lab.tiny else (VOCABULARY, CONTENT)
    arms = {"none": 0, "meta": round(MARKERS * shape[3])} | ({"nanogpt": 0} if lab.nanogpt else {})
    steps = {
        arm: Step(
            arm, "bf16", True, shape, markers, vocabulary, str(lab.nanogpt), lab.device.type,
            micro_batches=MICRO_BATCHES,
        )
        for arm, markers in arms.items()
    }  # fmt: skip
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for arm, step in steps.items():
        pipes[arm], end = spawn.Pipe()
        spawn.Process(target=turns, args=(end, step), daemon=True).start()
        end.close()  # so that the parent notices if the child ends
    first, peaks = {}, {}
    for arm, pipe in pipes.items():
        seconds, first[arm], peaks[arm] = pipe.recv()
        lab.report(f"{arm}: first step, with compilation", seconds, "s")
        lab.report(f"{arm}: peak memory", peaks[arm] / 1e9, "GB")
    for arm, losses in first.items():
        # wrong gradients can leave a loss that falls a little (weight decay by itself lowers it)
        lab.check(f"{arm}: the loss falls within four steps", losses[-1] < losses[0] - (0.01 if lab.tiny else 0.1))
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(3 if lab.tiny else 7):
        for arm, pipe in pipes.items():
            pipe.send(1 if lab.tiny else 4)
            times[arm].append(pipe.recv())
    profiles = {}
    for arm, pipe in pipes.items():
        pipe.send("profile")
        profiles[arm] = pipe.recv()
        pipe.send(None)
    speed = {}
    peak = estimate.peak_flops(torch.cuda.get_device_name()) if lab.device.type == "cuda" else None
    for arm, step in steps.items():
        low, speed[arm], high = (step.positions / seconds for seconds in quartiles(times[arm])[::-1])
        lab.report(f"{arm}: training", speed[arm], f"positions/s (quartiles {low:,.0f} .. {high:,.0f})")
        if peak:
            config = steps["none" if arm == "nanogpt" else arm].config()
            mfu = speed[arm] * estimate.flops_per_window(config, step.markers) / shape[3] / peak
            lab.report(f"{arm}: share of the peak FLOP/s (MFU)", mfu, at_least=0.45 if arm == "meta" else None)
    if "nanogpt" in speed:
        lab.report("none / nanogpt, positions/s", speed["none"] / speed["nanogpt"], at_least=1)
    lab.report("meta / none, positions/s", speed["meta"] / speed["none"], at_least=0.95)
    for arm in ("none", "meta") if lab.device.type == "cuda" else ():
        cfg = TrainConfig(model=steps[arm].config(), micro_batch_size=shape[4], n_accelerators=1)
        phases = estimate.memory(cfg, steps[arm].markers, torch.bfloat16, "cuda", MICRO_BATCHES)["phases"]
        lab.report(f"{arm}: peak memory / what --dry_run predicts for eager mode", peaks[arm] / max(phases.values()))
    for arm, profile in profiles.items():
        lab.report(f"{arm}: kernels per step, with copies", profile["kernels"])
        lab.report(
            f"{arm}: share of the time in which no kernel runs", max(0.0, 1 - profile["busy_ms"] / profile["ms"])
        )
        for kind, ms in by_kind(profile["names"]).items():
            lab.report(f"time in {arm}: {kind}", ms, "ms a step")
    for name, ms in sorted(profiles["meta"]["names"].items(), key=lambda item: -item[1])[:20]:
        lab.report(f"kernel: {name[:100]}", ms, f"ms a step of the meta arm ({ms / profiles['meta']['busy_ms']:.1%})")


# ----------------------------------------------------------------------------- the quick start


def short_run(lab: Lab, name: str, *settings: str) -> list[str]:
    """Returns the command of a short run of tiny_meta with a schedule of 60 steps."""
    command = [str(ROOT / "train.py"), str(ROOT / "config/tiny_meta.py"), f"--run_name={name}", "--wandb=disabled"]
    command += [f"--dataset={lab.dataset('stdlib_uniform')}", f"--device={lab.device.type}", "--lr_decay_steps=60"]
    command += ["--log_interval=1", "--eval_interval=30", "--eval_windows=8", "--save_interval=15", *settings]
    if lab.tiny:
        command += ["--n_layer=2", "--n_head=2", "--n_embd=32", "--batch_size=2", "--micro_batch_size=2"]
    return command


def logged_losses(lab: Lab, run: str) -> list[float]:
    return [line["loss"] for line in lab.metrics(run) if line["kind"] == "train"]


def quickstart(lab: Lab) -> None:
    """Trains the quick start's model, and compares a stopped and resumed run with two that were not stopped."""
    command = ["train.py", str(ROOT / "config/tiny_meta.py"), "--run_name=quickstart", "--wandb=disabled"]
    command += [f"--dataset={lab.dataset('stdlib_uniform')}", f"--device={lab.device.type}"]
    if lab.tiny:
        command += ["--max_steps=12", "--lr_decay_steps=12", "--warmup_steps=2"]
        command += ["--n_layer=2", "--n_head=2", "--n_embd=32"]
    seconds = lab.run(*command)
    lab.report("training of the quick start, with start and evaluations", seconds, "s")
    final = lab.metrics("quickstart")[-1]
    bound = QUICKSTART + QUICKSTART_TOLERANCE
    lab.report("validation text", final["bits_per_byte"], f"bits per byte (CPU: {QUICKSTART})", at_most=bound)
    logged = [line for line in lab.metrics("quickstart") if line["kind"] == "train"]
    lab.report("speed", statistics.median(line["positions_per_s"] for line in logged), "positions/s")

    def together(*commands: list[str]) -> None:
        processes = [subprocess.Popen([sys.executable, *command], cwd=lab.work) for command in commands]
        assert not any([process.wait() for process in processes]), "a short run failed"

    stop = "--max_steps=30"
    whole = "--max_steps=60"
    together(short_run(lab, "one", whole), short_run(lab, "two", whole), short_run(lab, "stopped", stop))
    together(short_run(lab, "stopped", whole, "--init_from=resume"))
    one, two, stopped = (logged_losses(lab, name) for name in ("one", "two", "stopped"))
    assert len(one) == len(two) == len(stopped) == 60, "a step is missing"

    def difference(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / x for x, y in zip(a, b, strict=True))

    lab.report("equal runs: largest relative difference of their losses", difference(one, two))
    resumed = "stopped and resumed run: largest relative difference of its losses from an uninterrupted run"
    lab.report(resumed, difference(one, stopped), at_most=RESUME_TOLERANCE)


# ----------------------------------------------------------------------------- decoding


def decoding_speed(lab: Lab) -> None:
    """Measures decoding at several batch sizes, in turns with Hugging Face's GPT-2."""
    for batch in (1, 2) if lab.tiny else (1, 8, 64):
        options = {"new": 4, "layers": 2} if lab.tiny else {"new": 48}
        rows = decoding.compare(batch, "bf16", 2, None, device=lab.device, **options)
        speed = {row["who"]: row["content tokens/s"] for row in rows}
        for who, value in speed.items():
            lab.report(f"batch {batch}, {who}", value, "content tokens/s")
        lab.report(f"batch {batch}, meta / none", speed["meta"] / speed["none"])
        if "hf" in speed:
            lab.report(f"batch {batch}, none / Hugging Face", speed["none"] / speed["hf"], at_least=1.2)


# ----------------------------------------------------------------------------- torchrun


def torchrun(lab: Lab) -> None:
    """Runs the command of the README under torchrun with one process, which joins a group and uses DDP. On a GPU the
    group communicates over NCCL. Then kills the process of a small run, which torchrun must restart."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    small = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=512", "--batch_size=4", "--micro_batch_size=2"]
    settings = [*small, "--compile=False"] if lab.tiny else ["--batch_size=24"]
    settings += ["--max_steps=60", "--lr_decay_steps=60", "--warmup_steps=10", "--log_interval=10"]
    settings += ["--eval_interval=60", "--eval_windows=24", "--save_interval=60", f"--device={lab.device.type}"]
    settings += ["--wandb=disabled", f"--dataset={lab.dataset('stdlib_uniform' if lab.tiny else 'stdlib_gpt2')}"]
    lab.run("train.py", str(ROOT / "config/meta_gpt2.py"), "--run_name=meta_gpt2", *settings, launcher=launcher)
    steps = [line for line in lab.metrics("meta_gpt2") if line["kind"] == "train"]
    lab.check("the loss of meta_gpt2 falls", steps[-1]["loss"] < steps[0]["loss"])
    later = steps[2:]  # the first steps compile and fill caches
    for name in ("positions_per_s", "content_tokens_per_s"):
        lab.report("meta_gpt2 under torchrun", statistics.median(step[name] for step in later), name.replace("_", " "))
    if all("mfu" in step for step in later):
        mfu = statistics.median(step["mfu"] for step in later)
        lab.report("meta_gpt2 under torchrun: share of the peak FLOP/s (MFU)", mfu, at_least=0.45)

    command = short_run(lab, "killed", "--max_steps=60", "--init_from=auto")
    process = subprocess.Popen([*launcher, "--max_restarts=1", *command], cwd=lab.work)
    metrics, killed = lab.work / "out/killed/metrics.jsonl", False
    while process.poll() is None:
        if not killed and metrics.exists() and metrics.read_text().count('"train"') >= 25:
            for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                if b"train.py" in Path(f"/proc/{worker}/cmdline").read_bytes():
                    os.kill(int(worker), signal.SIGKILL)
                    killed = True
        time.sleep(0.005)
    lab.check("a killed process was restarted, and the run came to its end", killed and process.returncode == 0)
    assert len(logged_losses(lab, "killed")) == 60, "a step is missing"
    log = (lab.work / "out/killed/train.log").read_text()
    lab.report("the restarted run continued from step", int(re.findall(r"at step (\d+)", log)[-1]))


# ----------------------------------------------------------------------------- tests


def tests(lab: Lab) -> None:
    """Runs the tests that need a GPU. Without a GPU, as in the stand-in, they are collected and skipped."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", f"-n{min(12, os.cpu_count() or 1)}"]
    process = subprocess.Popen([*command, "tests/test_cuda.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    counts = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    for line in process.stdout:  # line by line, so that the log has them even if the time limit ends the stage
        print(line, end="", flush=True)
        if found := re.match(r"\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (\S+)", line):
            verdict, name = found.groups()
            counts[verdict] += 1
            if verdict in ("FAILED", "ERROR"):
                lab.report(verdict.lower(), name)
    for verdict, count in counts.items():
        lab.report(f"tests {verdict.lower()}", count)
    assert process.wait() == 0, "pytest found a failure"


class Stage(NamedTuple):
    """A stage: what it does in words, its function, and its time limit in seconds."""

    about: str
    function: Callable[[Lab], None]
    cap: float


# In the order in which they run: the results that matter most come first.
STAGES = {
    "training": Stage("compiled training steps at 124M, beside nanoGPT; their kernels", training_speed, 180),
    "quickstart": Stage("the quick start; a stopped run resumed", quickstart, 150),
    "decoding": Stage("decoding at 124M, beside Hugging Face", decoding_speed, 120),
    "torchrun": Stage("config/meta_gpt2.py under torchrun; a killed process restarted", torchrun, 150),
    "tests": Stage("the tests that need a GPU", tests, 300),
}


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m nanometa.benches.gpu_stages",
        description="Runs one stage of benches/gpu.py, which is the command to use.",
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--output", type=path_argument, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--nanogpt", type=path_argument)
    args = parser.parse_args(argv)
    lab = Lab(args.stage, args.output, torch.device(args.device), args.tiny, args.nanogpt)
    shutil.rmtree(lab.work, ignore_errors=True)
    lab.work.mkdir(parents=True)
    STAGES[args.stage].function(lab)


if __name__ == "__main__":
    run_cli(main)
