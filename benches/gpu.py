"""Measures and tests nanoMeta on a machine with a CUDA GPU, within minutes.

    make gpu                                              # every stage, 300 seconds in all
    python -m nanometa.benches.gpu --nanogpt=../nanoGPT --deadline=600
    python -m nanometa.benches.gpu --tiny --device=cpu --output=out/gpu_stand_in      # each stage at a tiny size

Each stage runs in its own process and has its own time limit. A stage that fails or runs out of time does not stop the
next one. Every result is printed and written to results.jsonl in the folder --output as soon as it is known. If the
script is interrupted, a second call with the same --output repeats the stages that have not passed, and no others.
At the end the folder has a table (table.md) and a picture (gpu.png) too.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanometa.benches.gpu_stages import STAGES
from nanometa.common.errors import UserError
from nanometa.common.files import read_json_lines, write_atomically
from nanometa.config.command_line import Parser, path_argument, run_cli
from nanometa.reports import gpu_picture
from nanometa.training.distributed import pick_device
from nanometa.training.run_log import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "results.jsonl"
CPU_SLOWER = 5  # how much longer a stage may take on a CPU, at its tiny size
SHORTEST = 10  # seconds: with less time left, no stage is started


def facts_of(args) -> dict:
    """Returns the facts that the results depend on. A second call continues a first one only if these are equal."""
    here = environment()
    gpu = args.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{here['processor']} (CPU)",
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "torch": here["torch"],
        "triton": _version("triton"),
        "python": here["python"],
        "commit": args.commit or here["commit"],
        "uncommitted_changes": here["uncommitted_changes"],
        "nanogpt": args.nanogpt is not None,
        "tiny": args.tiny,
    }


def _driver() -> str | None:
    """Returns the version of the NVIDIA driver, or None if nvidia-smi is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        return None


def _version(package: str) -> str | None:
    return importlib.import_module(package).__version__ if importlib.util.find_spec(package) else None


def read_lines(path: Path) -> list[dict]:
    """Returns the complete lines of a JSON-lines file. A kill can leave half a line at the end, which is dropped."""
    return read_json_lines(path, lambda line: None, "benches/gpu.py", growing=True) if path.exists() else []


def stage_command(name: str, args) -> list[str]:
    """Returns the command that runs one stage."""
    command = [sys.executable, "-m", "nanometa.benches.gpu_stages", name, f"--output={args.output.resolve()}"]
    command += [f"--device={args.device.type}"] + ["--tiny"] * args.tiny
    return command + ([f"--nanogpt={args.nanogpt.resolve()}"] if args.nanogpt else [])


def run_stage(name: str, args, seconds: float) -> str:
    """Runs one stage in a process of its own. Returns the verdict: passed, failed, or timed out.

    Its results are printed as soon as they are known; its other output is appended to log.txt. seconds: its time
    limit."""
    command = stage_command(name, args)
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(args.output / "log.txt", "a") as log:
        print(f"\n[{name}]", file=log, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
        status, end, printed = None, time.monotonic() + seconds, 0
        try:
            while status is None and time.monotonic() < end:
                status = process.poll()
                lines = [line for line in read_lines(args.output / RESULTS)[1:] if line["stage"] == name]
                for line in lines[printed:]:
                    print("  " + shown(line), flush=True)
                printed = len(lines)
                time.sleep(0.2)
        finally:
            kill_tree(process.pid)
            process.wait()
    return "timed out" if status is None else "failed" if status else "passed"


def kill_tree(pid: int) -> None:
    """Kills a process and all its descendants. torchrun puts its processes into sessions of their own, so killing the
    process group would miss them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has just ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:  # grows while it is read
        found += children.get(one, [])
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def shown(line: dict) -> str:
    """Returns a result as one line of text."""
    value = line["value"]
    text = (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 10_000
        else f"{value:,.0f}"
        if isinstance(value, (int, float))
        else str(value)
    )
    goal = "" if line["goal"] is None else f"   goal {line['goal']}: {'met' if line['met'] else 'MISSED'}"
    return f"{line['what']}: {text} {line['unit']}".rstrip() + goal


def table(facts: dict, results: list[dict], verdicts: dict[str, dict]) -> str:
    """Returns all results as Markdown, one section per stage."""
    out = ["# nanoMeta on a GPU", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    out += ["| stage | verdict | seconds | goals met |", "| --- | --- | --- | --- |"]
    for name in STAGES:
        goals = [line["met"] for line in results if line["stage"] == name and line["goal"] is not None]
        verdict = verdicts.get(name, {"verdict": "not started", "seconds": 0.0})
        out.append(f"| {name} | {verdict['verdict']} | {verdict['seconds']:.0f} | {sum(goals)} of {len(goals)} |")
    for name, stage in STAGES.items():
        lines = [line for line in results if line["stage"] == name]
        if lines:
            out += ["", f"## {name}: {stage.about}", "", *(f"- {shown(line)}" for line in lines)]
    return "\n".join(out) + "\n"


def heading(facts: dict) -> str:
    """Returns the heading of the picture."""
    commit = f", commit {facts['commit'][:8]}" if facts["commit"] else ""
    return f"nanoMeta on {facts['device']}, driver {facts['driver']}, torch {facts['torch']}{commit}"


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m nanometa.benches.gpu", description=__doc__)
    stages = "; ".join(f"{name}: {stage.about}" for name, stage in STAGES.items())
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help=f"default: all. {stages}")
    parser.add_argument("--deadline", type=float, default=300, help="seconds for all stages together (default: 300)")
    parser.add_argument(
        "--nanogpt", type=path_argument, help="the folder of a nanoGPT checkout to compare the speed with"
    )
    parser.add_argument(
        "--output", type=path_argument, default=Path("out/gpu"), help="the folder of the results (default: out/gpu)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps, to test the script itself")
    parser.add_argument("--commit", default="", help="the commit of this code, for a copy without its .git folder")
    args = parser.parse_args(argv)
    if args.nanogpt and not (args.nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt={args.nanogpt} has no model.py: give the folder of a nanoGPT checkout.")
    if not args.deadline > 0:
        raise UserError(f"--deadline={args.deadline:g} leaves no time for any stage: give a number of seconds above 0.")
    if args.device == "cpu" and not args.tiny:
        raise UserError("--device=cpu would take hours at the full size, which is meant for a GPU: add --tiny.")
    args.device = pick_device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / RESULTS
    facts, lines = facts_of(args), read_lines(path)
    if lines and lines[0] != facts:
        changed = ", ".join(
            f"{name} {lines[0].get(name)} -> {value}" for name, value in facts.items() if lines[0].get(name) != value
        )
        raise UserError(f"{path} has results of another machine or version ({changed}): give another --output.")
    verdicts = {line["stage"]: line for line in lines if "verdict" in line}
    # The results of a stage that has not passed are dropped, because the stage starts again.
    kept = [
        line
        for line in lines[1:]
        if line["stage"] not in args.stages or verdicts.get(line["stage"], {}).get("verdict") == "passed"
    ]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in [facts, *kept]).encode())
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)

    end = time.monotonic() + args.deadline
    for name in args.stages:
        if any(line["stage"] == name for line in kept):
            print(f"\n{name}: passed in an earlier call", flush=True)
            continue
        left, started = end - time.monotonic(), time.monotonic()
        if left < SHORTEST:
            print(f"\n{name}: not started, because the deadline of {args.deadline:g} s is near", flush=True)
            continue
        limit = min(STAGES[name].cap * (CPU_SLOWER if args.device.type == "cpu" else 1), left)
        print(f"\n{name}: {STAGES[name].about} (at most {limit:.0f} s)", flush=True)
        verdict = {"stage": name, "verdict": run_stage(name, args, limit), "seconds": time.monotonic() - started}
        with open(path, "a") as file:
            file.write(json.dumps(verdict) + "\n")
        print(f"  {verdict['verdict']} after {verdict['seconds']:.0f} s", flush=True)

    lines = read_lines(path)[1:]
    results = [line for line in lines if "what" in line]
    verdicts = {line["stage"]: line for line in lines if "verdict" in line}
    write_atomically(args.output / "table.md", table(facts, results, verdicts).encode())
    gpu_picture.draw(heading(facts), results, args.output / "gpu.png")
    names = (RESULTS, "table.md", "gpu.png", "log.txt")
    written = [str(args.output / name) for name in names if (args.output / name).exists()]
    print(f"\nwrote {', '.join(written)}")
    wrong = [name for name in args.stages if verdicts.get(name, {}).get("verdict") != "passed"]
    if wrong:
        raise UserError(
            f"these stages have not passed: {', '.join(wrong)}. See {args.output / 'log.txt'}, then run the command "
            f"again."
        )


if __name__ == "__main__":
    run_cli(main)
