"""Measures preparing against the tokenizer alone: tiktoken's own batch rate on the same text and the same cores.

python bench_prepare.py --tokenizer=gpt2                      # the embedded corpus
python bench_prepare.py config/packages.py --tokenizer=gpt2   # 129 MB; any settings of prepare.py, files by full path
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench import alternate, spread
from cli import load_config, run_cli
from config import PrepareConfig, UserError
from data.inject import inject, marker_places
from data.shards import read_manifest, token_dtype
from data.sources import Piece, open_source
from data.staging import BLOCK_TOKENS
from data.tokenizer import Tokenizer
from runlog import environment

ROOT = Path(__file__).resolve().parent
CALL_CHARS = 16 * 2**20  # text in one call of tiktoken: the lists of ids of 100 MB would be 2 GB


def in_calls(texts: list[str]) -> list[list[str]]:
    """Texts in lists of about CALL_CHARS."""
    ends = itertools.accumulate(map(len, texts))
    groups = itertools.groupby(zip(ends, texts, strict=True), key=lambda pair: pair[0] // CALL_CHARS)
    return [[text for _, text in group] for _, group in groups]


def prepare(folder: Path, *args: str) -> None:
    command = [sys.executable, str(ROOT / "prepare.py"), *args]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"prepare.py fails: {result.stderr.strip().removeprefix('error: ')}")


def prepare_anew(*args: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), *args, "--name=timed")


def inject_all(manifest: dict) -> None:
    """All markers of a dataset's chunks, in the blocks in which shards are written; the content is zeros."""
    C, M = manifest["chunk_content"], manifest["chunk_markers"]
    n, marker = BLOCK_TOKENS // C + 1, manifest["tokenizer"]["markers"]["<|meta|>"]
    content = np.zeros((n, C), token_dtype(manifest["tokenizer"]["n_vocab"]))
    for split in manifest["splits"].values():
        for first in range(0, split["chunks"], n):
            places = marker_places(manifest["injection"], first, n, C, M, manifest["seed"])
            inject(content, places, marker)


def bench(argv: list[str], repeats: int) -> None:
    argv = [str(Path(arg).resolve()) if Path(arg).is_file() else arg for arg in argv]
    cfg = load_config(PrepareConfig, argv, config_file=True)
    source = open_source(cfg)
    items = [item for unit in range(source.n_units) for item in source.read(unit) if isinstance(item, Piece)]
    pieces, documents, open_document = [piece.text for piece in items], [], []
    for piece in items:
        open_document.append(piece.text)
        if piece.last:
            documents.append("".join(open_document))
            open_document = []
    n_bytes = sum(len(text.encode()) for text in pieces)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, *argv, "--name=whole")
        prepare(folder, *argv, "--name=whole", "--part=1/1")
        tokenizer, manifest = Tokenizer.load(folder / "data/whole"), read_manifest(folder / "data/whole")
        encoding = tokenizer._encoding

        def raw(calls: list[list[str]]) -> int:
            return sum(sum(map(len, encoding.encode_ordinary_batch(call, num_threads=cfg.workers))) for call in calls)

        n_tokens = raw(in_calls(pieces))
        part = str(folder / "data/whole.part1of1")
        functions = {
            "tiktoken, documents": lambda: raw(in_calls(documents)),
            "tiktoken, pieces": lambda: raw(in_calls(pieces)),
            "prepare.py": lambda: prepare_anew(*argv),
            "prepare.py --part=1/1": lambda: prepare_anew(*argv, "--part=1/1"),
            "prepare.py --merge": lambda: prepare_anew("--merge", part),
            "importing prepare": lambda: subprocess.run([sys.executable, "-c", "import prepare"], cwd=ROOT, check=True),
            "injection": lambda: inject_all(manifest),
        }
        times = alternate(functions, repeats)
    print(
        f"{source.description}: {n_bytes:,} bytes, {len(documents):,} documents, {n_tokens:,} tokens of "
        f"{tokenizer.name}; {cfg.workers} threads or workers"
    )
    for name, seconds in times.items():
        rate = statistics.median(seconds)
        rates = f"{n_bytes / rate / 1e6:6.2f} MB/s {n_tokens / rate / 1e6:6.2f} M tokens/s"
        print(f"  {name:31} {spread(seconds)}  {rates if 'tiktoken' in name or name == 'prepare.py' else ''}")
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min(median[name] for name in median if name.startswith("tiktoken"))
    whole, start = median["prepare.py"], median["importing prepare"]
    parts = {
        "starting": start,
        "reading, tokenizing, segments": median["prepare.py --part=1/1"] - start,
        "markers, shards, compressing": median["prepare.py --merge"] - start,
    }
    print(f"prepare.py, end to end / tiktoken at its best: {best / whole:.3f}")
    print(f"share of injection: {median['injection'] / whole:.1%}")
    print("where the time goes: " + ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts.items()))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, after two of warm-up (at least 2)")
    args, settings = parser.parse_known_args(argv)
    facts = environment()
    print(", ".join(f"{key} {facts[key]}" for key in ("processor", "threads", "commit")))
    bench(settings, args.repeats)


if __name__ == "__main__":
    run_cli(main)
