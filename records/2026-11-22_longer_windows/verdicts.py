"""The record's two tables of verdicts, from its tasks.jsonl.

python records/2026-11-22_longer_windows/verdicts.py"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

COMMIT = "8fa93a5"  # the code that made this record; nothing of today's is imported
then = tempfile.TemporaryDirectory()
code = subprocess.run(["git", "archive", COMMIT], cwd=Path(__file__).parents[2], capture_output=True, check=True).stdout
subprocess.run(["tar", "-x", "-C", then.name], input=code, check=True)
sys.path.insert(0, then.name)

from stats import bits, paired_difference, wilson

ENOUGH = 0.10  # of exact answers may be lost where a length "holds"


def lost(first: dict, second: dict) -> tuple[float, float, float]:
    """Share of first minus share of second and its 95 % interval, of two groups of texts (Newcombe 1998, method 10)."""
    p, q = first["exact"], second["exact"]
    (p_low, p_high), (q_low, q_high) = (wilson(line["correct"], line["n"]) for line in (first, second))
    return p - q, p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def told(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:.1f} ({100 * low:.1f} .. {100 * high:.1f})"


cells: dict[tuple, dict] = {}
for row in Path(__file__).with_name("tasks.jsonl").read_text().splitlines():
    line = json.loads(row)
    key = (line["run"], line["placement"], line["length"])
    if key not in cells or line["n"] >= cells[key]["n"]:
        cells[key] = line

print("points lost from the length of fine-tuning to 2 and 4 times it")
for run, placement, length in cells:
    trained = cells[run, placement, length]["train_length"]
    if length in (2 * trained, 4 * trained) and (run, placement, trained) in cells:
        of = lost(cells[run, placement, trained], cells[run, placement, length])
        verdict = "holds" if of[2] < ENOUGH else "does not hold" if of[1] > ENOUGH else "undecided"
        print(f"{run:<20} {placement:<10} {trained:>4} -> {length:<4}  {told(*of):<24} {verdict}")

print("Meta minus the others, 8x, at twice the length of fine-tuning, the same texts")
for other in ("pause", "causal2"):
    for length in (128, 512, 1024):
        for placement in ("target", "background"):
            pair = [cells[f"{arm}_yarn8_{length}", placement, 2 * length] for arm in ("meta", other)]
            of = paired_difference(*(bits(line["outcomes"]) for line in pair))
            print(f"{other:<8} {placement:<10} {length:>4} -> {2 * length:<4}  {told(*of)}")
