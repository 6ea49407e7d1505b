"""Compares the speed of prepare.py with that of tiktoken, its tokenizer, by itself, on the same text and cores."""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from nanometa.benches.timing import alternate, quartiles
from nanometa.common.errors import UserError
from nanometa.config import PrepareConfig
from nanometa.config.command_line import load_config
from nanometa.data.inject import inject, marker_places
from nanometa.data.shards import read_manifest, token_dtype
from nanometa.data.sources import Piece, open_source
from nanometa.data.staging import BLOCK_TOKENS
from nanometa.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CALL_CHARS = 16 * 2**20  # characters per call of tiktoken, whose lists of ids take 2 GB for 100 MB of text


def in_calls(texts: list[str]) -> list[list[str]]:
    """Splits texts into lists of about CALL_CHARS characters."""
    ends = itertools.accumulate(map(len, texts))
    groups = itertools.groupby(zip(ends, texts, strict=True), key=lambda pair: pair[0] // CALL_CHARS)
    return [[text for _, text in group] for _, group in groups]


def prepare(folder: Path, *args: str) -> None:
    """Runs prepare.py in a folder. Raises UserError if it fails."""
    command = [sys.executable, str(ROOT / "prepare.py"), *args]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"prepare.py failed: {result.stderr.strip().removeprefix('error: ')}")


def prepare_anew(*args: str) -> None:
    """Runs prepare.py in a new temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), *args, "--name=timed")


def inject_all(manifest: dict) -> None:
    """Injects the markers of a whole dataset into zeros, in blocks of the size in which shards are written."""
    C, M = manifest["chunk_content"], manifest["chunk_markers"]
    n, marker = BLOCK_TOKENS // C + 1, manifest["tokenizer"]["markers"]["<|meta|>"]
    content = np.zeros((n, C), token_dtype(manifest["tokenizer"]["n_vocab"]))
    for split in manifest["splits"].values():
        for first in range(0, split["chunks"], n):
            places = marker_places(manifest["injection"], first, n, C, M, manifest["seed"])
            inject(content, places, marker)


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Measures prepare.py from the text files to a new dataset, and the parts of that work one by one."""
    rows = []
    for recipe, tokenizer in (("stdlib", "gpt2"), ("stdlib", "bpe"), ("packages", "gpt2")):
        argv = [str(ROOT / f"config/{recipe}.py"), f"--tokenizer={tokenizer}", "--workers=2"]
        try:
            rows += corpus(f"{recipe}, {tokenizer}", argv, args.repeats)
        except UserError as error:  # for example, because the packages are not installed
            print(f"{recipe} is left out: {error}")
    return rows


def corpus(name: str, argv: list[str], repeats: int) -> list[dict]:
    """Returns one row per way of processing a corpus. argv: the command line of prepare.py for it."""
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
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
    rows = []
    for who, seconds in times.items():
        low, middle, high = quartiles(seconds)
        row = {"corpus": name, "who": who, "s": middle, "quartiles": f"{low:.2f} .. {high:.2f}"}
        if "tiktoken" in who or who == "prepare.py":
            row |= {"MB/s": n_bytes / middle / 1e6, "M tokens/s": n_tokens / middle / 1e6}
        rows.append(row)
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns sentences that compare prepare.py with tiktoken, and split up its time."""
    out = []
    for name in dict.fromkeys(row["corpus"] for row in rows):
        s = {row["who"]: row["s"] for row in rows if row["corpus"] == name}
        best, whole, start = (
            min(s["tiktoken, documents"], s["tiktoken, pieces"]),
            s["prepare.py"],
            s["importing prepare"],
        )
        parts = {
            "starting": start,
            "reading, tokenizing, segments": s["prepare.py --part=1/1"] - start,
            "markers, shards, compressing": s["prepare.py --merge"] - start,
        }
        out.append(
            f"{name}: prepare.py, end to end / tiktoken's faster way {best / whole:.3f}; injection "
            f"{s['injection'] / whole:.1%}; " + ", ".join(f"{part} {took / whole:.0%}" for part, took in parts.items())
        )
    return out
