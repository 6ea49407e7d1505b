"""Stand-ins for train.py, eval.py and probe.py, which write what a study reads within milliseconds.

A folder with links to this file under the names of the commands takes the place of the repository. Training has steps
and checkpoints, and continues after a kill; its figures depend on its arguments alone."""

import hashlib
import json
import signal
import sys
import time
from pathlib import Path

STEPS, STEP_S = 5, 0.02
ENVIRONMENT = {
    "commit": "c", "uncommitted_changes": False, "processor": "p", "cpu_capability": "x", "threads": 1, "torch": "2",
}  # fmt: skip


def value(*parts) -> float:
    """Returns a number in [0, 1) that depends on the parts."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**32


def train(given: dict[str, str]) -> None:
    folder = Path(given["out_dir"]) / given["run_name"]
    checkpoints = sorted(folder.glob("step_*"))
    if given["init_from"] == "resume":
        assert checkpoints, "nothing to resume"
    else:
        assert not folder.exists(), f"{folder} exists"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"environment": ENVIRONMENT, "data": {"content_sha256": {"train": "t"}}}
    (folder / "config.json").write_text(json.dumps(environment))
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    for step in range(1 + len(checkpoints), STEPS + 1):
        time.sleep(STEP_S)
        (folder / f"step_{step}").mkdir()
        if stopped:
            return
    fixed = {name: v for name, v in given.items() if name not in ("init_from", "out_dir")}
    bits = 1.2 + value("bits", sorted(fixed.items()))
    lines = [
        {"kind": "stop_at", "step": 4},
        {"kind": "final", "step": STEPS, "loss": bits, "bits_per_byte": bits, "eval_s": time.time()},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluate(given: dict[str, str]) -> None:
    run = Path(given["run"])
    assert (run / "metrics.jsonl").exists(), f"{run} is not finished"
    with open(given["output"], "a") as file:
        for length in given["lengths"].split():
            time.sleep(STEP_S)
            for placement in given["placements"].split():
                exact = value("exact", run.name, length, placement)
                line = {"arm": "a", "task": "copying", "placement": placement, "length": int(length), "exact": exact}
                file.write(json.dumps({**line, "outcomes": "01"}) + "\n")
            file.flush()


def main() -> None:
    given: dict[str, str] = {}
    name = ""
    for word in sys.argv[1:]:
        if word.startswith("--"):
            name, _, text = word[2:].partition("=")
            given[name] = text
        elif name:
            given[name] = f"{given[name]} {word}".strip()
    if "fail" in given:
        raise SystemExit("this command fails")
    train(given) if Path(sys.argv[0]).stem == "train" else evaluate(given)


main()
