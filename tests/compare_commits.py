"""Compares what two commits compute: shards, losses, weights, samples and evaluations.

    python -m tests.compare_commits OLD [NEW]

NEW is HEAD unless it is given. Both commits are checked out into temporary worktrees, and tests/golden_driver.py of
this checkout runs the same commands with each of them. Changes that are not committed are therefore not compared. The
exit status is 1 if any result differs or is missing. A refactoring must keep every result equal to the last bit; a
comparison takes about two minutes on one core.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "tests/golden_driver.py"


def git(*args: str) -> str:
    """Runs git in this checkout and returns its output. Exits with git's message if git fails."""
    result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"git {' '.join(args)} failed: {result.stderr.strip()}")
    return result.stdout.strip()


@contextlib.contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Checks a commit out into `folder`, and removes the worktree at the end."""
    git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def results_of(commit: str) -> tuple[dict[str, str], bool]:
    """Runs the driver on a commit. Returns its results by name, and whether every command of the driver succeeded."""
    with tempfile.TemporaryDirectory() as folder, worktree(commit, Path(folder, "checkout")) as checkout:
        work, output = Path(folder, "work"), Path(folder, "results")
        work.mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(DRIVER), str(checkout), str(output)]
        status = subprocess.run(command, cwd=work, env=environment).returncode
        lines = output.read_text().splitlines() if output.exists() else []
        return dict(line.split(" ", 1) for line in lines), status == 0


def compare(old: dict[str, str], new: dict[str, str]) -> int:
    """Prints every name with "equal" or with both values, then a summary. Returns the number of equal results."""
    equal, names = 0, list(dict.fromkeys([*old, *new]))
    for name in names:
        before, after = old.get(name, "missing"), new.get(name, "missing")
        if before == after:
            equal += 1
            print(f"{name}: equal")
        else:
            print(f"{name}: DIFFERENT\n  old {before}\n  new {after}")
    print(f"{equal} of {len(names)} equal")
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", help="the commit that is known to be right")
    parser.add_argument("new", metavar="NEW", nargs="?", default="HEAD", help="the commit to check")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes the worktrees, as Ctrl-C does
    commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in (given.old, given.new)]
    found = []
    for commit in commits:
        print(f"running the driver on {commit[:12]}", file=sys.stderr, flush=True)
        found.append(results_of(commit))
    (old, old_succeeded), (new, new_succeeded) = found
    equal = compare(old, new)
    for commit, succeeded in zip(commits, (old_succeeded, new_succeeded), strict=True):
        if not succeeded:
            print(f"the driver failed on {commit[:12]}: its messages are above", file=sys.stderr)
    return 0 if old_succeeded and new_succeeded and old and equal == len(old | new) else 1


if __name__ == "__main__":
    sys.exit(main())
