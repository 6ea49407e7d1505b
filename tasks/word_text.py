"""Writes synthetic text over the words of the tasks, which teaches small models to copy within minutes.

    python -m nanometa.tasks.word_text --bytes=3000000 --output=out/words.jsonl

A model that has only read a few megabytes of source code has hardly learned induction, the continuation of a repeated
sequence, and then learns the tasks of this folder late, by chance. This text repeats sequences all the time. Each row
of the file is a document of one of two kinds, which take turns:

segments  Lines of 3 to 8 random words. Half of the lines repeat one of the last 20 different lines.
cycles    A random sequence of 3 to 40 different words, repeated over and over. On average, one word in 20 is followed
          by a jump to another place of the sequence.

The words are the items and the names of the tasks (tasks/words.py), each after a space. A tokenizer that is trained on
enough of this text has one token for each.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.keyed_random import Draws, stable_key
from nanometa.common.terminal import write_line
from nanometa.config.command_line import Parser, path_argument, run_cli
from nanometa.tasks.words import first_pools

WORDS = 200  # in a document, at least
SEGMENT = (3, 8)  # words in a line
RECENT = 20  # different lines that a line may repeat
CYCLE = (3, 40)  # words in a cycle
JUMP = 20  # one word in JUMP is followed by a jump


def documents(seed: int) -> Iterator[str]:
    """Yields an endless series of documents, which depends only on the seed."""
    words = [f" {word}" for pool in first_pools() for word in pool]
    number = 0
    while True:
        draws = Draws(stable_key("word text", seed, number))
        yield (_cycles if number % 2 else _segments)(draws, words)
        number += 1


def _segments(draws: Draws, words: list[str]) -> str:
    lines: list[str] = []
    different: list[str] = []
    written = 0
    while written < WORDS:
        if different and draws.below(2):
            line = draws.choice(different[-RECENT:])
        else:
            line = "".join(draws.choice(words) for _ in range(draws.between(*SEGMENT)))
            different.append(line)
        lines.append(line)
        written += line.count(" ")
    return "\n".join(lines) + "\n"


def _cycles(draws: Draws, words: list[str]) -> str:
    cycle = draws.sample(words, draws.between(*CYCLE))
    place, out = 0, []
    for _ in range(WORDS):
        out.append(cycle[place])
        place = draws.below(len(cycle)) if draws.below(JUMP) == 0 else (place + 1) % len(cycle)
    return "".join(out) + "\n"


def write(path: Path, size: int, seed: int) -> int:
    """Writes a file of JSON lines with at least `size` bytes of text. Returns the number of its documents.

    A file with this content stays untouched, because prepare.py refuses to go on with files that were written anew."""
    rows, written = [], 0
    for document in documents(seed):
        if written >= size:
            break
        rows.append(json.dumps({"text": document}) + "\n")
        written += len(document)
    content = "".join(rows).encode()
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return len(rows)


def main(argv: list[str]) -> None:
    """Writes the file that argv names."""
    parser = Parser(prog="python -m nanometa.tasks.word_text", description=__doc__)
    parser.add_argument("--bytes", type=int, default=3_000_000, help="bytes of text, at least (default: 3000000)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the text (default: 1337)")
    parser.add_argument("--output", type=path_argument, required=True, help="the file to write, NAME.jsonl")
    args = parser.parse_args(argv)
    if not 1 <= args.bytes <= 10**9:
        raise UserError(f"--bytes={args.bytes} is out of range: it must lie in 1 .. 1000000000.")
    if args.output.suffix != ".jsonl":
        raise UserError(f"--output={args.output} must end with .jsonl, because prepare.py reads its rows: rename it.")
    number = write(args.output, args.bytes, args.seed)
    write_line(f"{number:,} documents in {args.output}")


if __name__ == "__main__":
    run_cli(main)
