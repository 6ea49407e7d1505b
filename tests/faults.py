"""Kills real training processes, stops them, fills their disk and damages their files, and resumes them after each
fault.

    python -m tests.faults [--kills=N] [--seed=S] [--only=KIND] [--quick]

After each fault the run is resumed until it is finished. It has survived if it equals, bit for bit, an uninterrupted
run with as many processes: its last weights, optimizer and best weights, the windows of every step, and metrics.jsonl
without timings. No temporary file may be left. The exit status is 1 if any run was lost. The faults are in
fault_kinds.py and fault_data.py; faulty_train.py makes a process meet one, and fault_lab.py starts and compares the
runs.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests import fault_data, fault_kinds
from tests.conftest import cli, write_texts
from tests.fault_lab import Lab, Lost, Run, need

KINDS = fault_kinds.KINDS | fault_data.KINDS


def run_all(lab: Lab, kinds: dict, out) -> bool:
    """Runs all trials and returns whether no run was lost. Prints a line when a kind is finished, and a table at the
    end."""
    trials = {name: list(make(lab)) for name, make in kinds.items()}
    total, done, began, rows = sum(map(len, trials.values())), 0, time.monotonic(), []
    shown = began
    for name, tries in trials.items():
        if not tries:
            continue
        lost, kills, since = [], Run.kills, time.monotonic()
        for number, (what, trial) in enumerate(tries, 1):
            try:
                trial()
            except Lost as reason:
                lost.append(f"{what}: {reason}")
            done += 1
            spent = time.monotonic() - began
            if out.isatty() or number == len(tries) or time.monotonic() - shown > 30:
                shown, eta = time.monotonic(), spent / done * (total - done)
                line = f"{name}: {number}/{len(tries)}, {len(lost)} lost"
                line += f" ({done}/{total} in {spent:.0f} s, ETA {eta:.0f} s)"
                start, end = ("\r", "\x1b[K" + "\n" * (number == len(tries))) if out.isatty() else ("", "\n")
                print(start + line, end=end, file=out, flush=True)
        for sentence in lost:
            print(f"  LOST {sentence}", file=out, flush=True)
        rows.append((name, len(tries), len(tries) - len(lost), len(lost), Run.kills - kills, time.monotonic() - since))
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, 6))))
    width = max(len(row[0]) for row in rows)
    print(f"\n{'kind of fault':{width}}  tried  survived  lost  kills  seconds", file=out)
    for name, tried, survived, lost, kills, seconds in rows:
        print(f"{name:{width}}  {tried:5}  {survived:8}  {lost:4}  {kills:5}  {seconds:7.0f}", file=out)
    return rows[-1][3] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="SIGKILLs at random moments (default 120)", default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="kinds whose name contains this", default="")
    parser.add_argument("--quick", action="store_true", help="a few of every kind")
    parser.add_argument("--workdir", type=Path, help="a folder with data/u of tests/conftest.py (default: made anew)")
    args = parser.parse_args()
    kinds = {name: make for name, make in KINDS.items() if args.only in name}
    if not kinds:
        parser.error(f"no kind is named {args.only!r}; there are: {', '.join(KINDS)}")
    torch.set_num_threads(1)
    memory = "/dev/shm"  # a kill loses nothing that the kernel has buffered, so a real fsync would only take time
    with tempfile.TemporaryDirectory(prefix="faults", dir=memory if os.path.isdir(memory) else None) as folder:
        os.chdir(folder)
        if args.workdir:
            shutil.copytree(args.workdir / "data/u", "data/u")
        else:
            write_texts(Path("texts"))
            made = cli("prepare.py", "--source=files", "--files", "texts/*.txt", "--name=u", "--bpe_vocab_size=300",
                       "--chunk_content=28", "--chunk_markers=4", "--val_fraction=0.03", cwd=Path("."))  # fmt: skip
            need(made.returncode == 0, made.stderr.decode())
        lab = Lab(random.Random(args.seed), args.quick, 3 if args.quick else args.kills)
        sys.exit(not run_all(lab, kinds, sys.stdout))


if __name__ == "__main__":
    main()
