"""Changes single expressions of the core files, in a copy of the repository, and counts how many the tests notice.

    python -m tests.mutate --count=60 --seed=1           # of all files in TESTS; some seconds for each change
    python -m tests.mutate --count=20 --only=data/layout.py

A change is caught if a test fails or takes too long. A change that survives is printed: either no test looks at what
its line does, or it has no effect. The same seed makes the same changes. The exit status says
nothing about survivors; it is not 0 if the tests fail without a change.
"""

import ast
import contextlib
import difflib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nanometa.common.errors import UserError
from nanometa.common.interrupts import interrupts_postponed, raise_interrupts
from nanometa.config.command_line import Parser, run_cli
from tests.conftest import ROOT

# the tests of each core file; tests/test_mutate.py checks that they exist and that no core file is missing
TESTS = {
    "model.py": "test_model",
    "meta_attention.py": "test_meta_attention test_model",
    "layers/loss.py": "test_loss",
    "layers/rope.py": "test_rope",
    "layers/scores.py": "test_loss test_perplexity",
    "layers/short_contexts.py": "test_short_contexts",
    "layers/weighting.py": "test_weighting",
    "layers/visibility.py": "test_visibility test_limited_cache",
    "data/layout.py": "test_layout test_data",
    "data/inject.py": "test_injection",
    "data/loader.py": "test_data",
    "data/markers.py": "test_markers test_limited_cache",
    "data/sentences.py": "test_markers",
    "data/shards.py": "test_data",
    "data/spans.py": "test_markers",
    "data/assemble.py": "test_data test_prepare",
    "data/tokenizer.py": "test_data",
    "training/adapters.py": "test_adapters test_peft",
    "training/optimizer.py": "test_optim",
    "training/bad_steps.py": "test_guard",
    "training/evaluation.py": "test_perplexity test_train",
    "common/statistics.py": "test_stats test_report",
    "common/keyed_random.py": "test_injection test_tasks",
    "inference/cache.py": "test_generate_cache",
    "inference/decoder.py": "test_generate_cache test_limited_cache",
    "inference/generation.py": "test_generate test_generate_cache",
    "inference/limited_cache.py": "test_limited_cache",
    "inference/scoring.py": "test_generate",
    "tasks/categories.py": "test_floors",
    "tasks/copying.py": "test_tasks test_floors",
    "tasks/curriculum.py": "test_task_training",
    "tasks/example.py": "test_tasks test_oracle",
    "tasks/floors.py": "test_floors",
    "tasks/list_recall.py": "test_tasks test_floors",
    "tasks/oracle.py": "test_oracle",
    "tasks/parity.py": "test_tasks test_floors",
    "tasks/segment_counting.py": "test_tasks test_floors",
    "tasks/source.py": "test_tasks test_task_training",
    "tasks/word_text.py": "test_word_text",
    "tasks/words.py": "test_tasks",
    "evals/compression.py": "test_compression",
    "evals/forgotten.py": "test_compression",
    "evals/longppl.py": "test_longppl",
    "evals/piece_reader.py": "test_longppl",
    "evals/shared_text.py": "test_longppl",
    "evals/perplexity.py": "test_perplexity test_documents",
}
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip


class Mutant(NamedTuple):
    """A changed source file."""

    file: str
    line: int
    text: str  # of the whole file


def changed(node: ast.AST) -> ast.AST | None:
    """Returns an expression with another operator, bound, constant or truth value, or None if it has none of them."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        return type(node)(**{**dict(ast.iter_fields(node)), "op": SWAPS[type(node.op)]()})
    if isinstance(node, ast.Compare):
        return ast.Compare(node.left, [SWAPS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        return ast.Constant(not node.value if type(node.value) is bool else node.value + 1)
    return None


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes below a node, without annotations, and without the parts of f-strings, which are messages."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            message = isinstance(child, ast.JoinedStr)
            if isinstance(child, ast.AST) and not message and name not in ("annotation", "returns"):
                yield child
                yield from expressions(child)


def mutants(file: str, text: str) -> list[Mutant]:
    """Returns all mutants of a file, in the order of its text. Each differs from it in one expression."""
    lines, found = text.encode().splitlines(keepends=True), []
    for node in expressions(ast.parse(text)):
        if (new := changed(node)) is not None:
            first, last = node.lineno - 1, node.end_lineno - 1
            before = b"".join(lines[:first]) + lines[first][: node.col_offset]  # offsets count bytes
            after = lines[last][node.end_col_offset :] + b"".join(lines[last + 1 :])
            code = ast.unparse(ast.fix_missing_locations(new))
            found.append(Mutant(file, node.lineno, (before + f"({code})".encode() + after).decode()))
    return found


def difference(old: str, new: str) -> str:
    """Returns the lines that differ, with - and +."""
    rows = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    return "\n".join(f"    {row}" for row in list(rows)[3:])


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """Copies the files of the repository, as they are now, into a temporary folder."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names.stdout.decode().splitlines():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        yield Path(folder)


def passes(copy: Path, tests: str, seconds: float) -> bool:
    """Returns whether tests pass in a copy of the repository within this time."""
    options = ["-x", "-q", "-m", "not slow and not cuda", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{name}.py" for name in tests.split())]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = None
    try:
        with interrupts_postponed():  # otherwise the process could be started and never be killed
            process = subprocess.Popen(command, cwd=copy, env=env, start_new_session=True, **silent)
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group, because tests start programs
            process.wait()


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="number of changes, over all files (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the choice of changes (default: 1)")
    parser.add_argument("--only", choices=TESTS, help="one file")
    args = parser.parse_args(argv)
    raise_interrupts()  # so that the copy is removed and the tests end
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal was closed
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    files = [args.only] if args.only else list(TESTS)
    possible = [mutant for file in files for mutant in mutants(file, (ROOT / file).read_text())]
    chosen = random.Random(args.seed).sample(possible, min(args.count, len(possible)))
    survivors = 0
    with copied() as copy:
        for file in dict.fromkeys(mutant.file for mutant in sorted(chosen)):
            original, started = (copy / file).read_text(), time.perf_counter()
            if not passes(copy, TESTS[file], 3600):
                raise UserError(f"the tests of {file} ({TESTS[file]}) fail without a change: correct them first.")
            limit = 30 + 3 * (time.perf_counter() - started)
            for mutant in sorted(of for of in chosen if of.file == file):
                (copy / file).write_text(mutant.text)
                survived = passes(copy, TESTS[file], limit)
                survivors += survived
                print(f"{'SURVIVED' if survived else 'caught'}  {file}:{mutant.line}", flush=True)
                if survived:
                    print(difference(original, mutant.text), flush=True)
            (copy / file).write_text(original)
    caught = len(chosen) - survivors
    print(f"{caught} of {len(chosen)} changes were caught, of {len(possible)} possible ones (seed {args.seed})")


if __name__ == "__main__":
    run_cli(main)
