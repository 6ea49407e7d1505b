"""Turns text into token shards with meta-tokens injected.

    python prepare.py                                    # the embedded dataset: Python's standard library
    python prepare.py --injection=none                   # the same content without markers
    python prepare.py --source=files --files 'texts/**/*.txt' --name=mine \\
        --tokenizer=gpt2 --chunk_content=922 --chunk_markers=102      # the paper's window
    python prepare.py --inspect data/stdlib_uniform      # what is in there
"""

import hashlib
import json
import lzma
import os
import shutil
import signal
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cli import load_config, run_cli
from config import PrepareConfig, UserError
from data.inject import inject, marker_places
from data.loader import Windows
from data.shards import MANIFEST, ShardWriter, read_manifest, token_dtype
from data.sources import Piece, Source, open_source
from data.tokenizer import SPEC_FILE, Tokenizer
from rng import stable_key
from terminal import write_tokens

SPLITS = ("train", "val")
TOKENIZER_BYTES = 64 * 2**20  # text that a BPE is trained on at most
COMPRESSOR_BYTES = 8 * 2**20  # validation text that gzip and xz are measured on at most
BATCH_BYTES = 2**20  # text in one task of a worker


def split_of(text: str, cfg: PrepareConfig) -> str:
    """train or val, by a hash of the text: it never depends on other documents, and equal texts share a side.

    A long document is hashed piece by piece (64 KiB), so it cannot dominate validation."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"split %d" % cfg.seed).digest()
    return "val" if int.from_bytes(digest, "little") < cfg.val_fraction * 2**64 else "train"


def make_tokenizer(cfg: PrepareConfig, source: Source) -> Tokenizer:
    if cfg.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if cfg.tokenizer != "bpe":
        folder = Path(cfg.tokenizer)
        checkpoints = sorted(folder.glob(f"step_*/{SPEC_FILE}"))  # of a run
        if not (folder / SPEC_FILE).is_file() and not checkpoints:
            raise UserError(
                f"tokenizer={cfg.tokenizer!r} is unknown: it must be bpe, gpt2, or the folder of a prepared dataset "
                f"or of a run."
            )
        return Tokenizer.load(checkpoints[-1].parent if checkpoints else folder)

    def train_texts() -> Iterator[str]:
        room = TOKENIZER_BYTES
        for piece in source.pieces():
            if split_of(piece.text, cfg) == "train":
                yield piece.text
                room -= len(piece.text)
                if room <= 0:
                    return

    return Tokenizer.train(train_texts(), cfg.bpe_vocab_size)


_tokenizer: Tokenizer  # of a worker process


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [_tokenizer.encode(text) for text in texts]


class Encoders:
    """Worker processes that tokenize; the result does not depend on how many there are."""

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self.workers = workers
        self.pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(tokenizer,))
        self.pool.submit(_encode, []).result()  # starts the processes now, before the progress bar starts a thread

    def in_order(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
        """(piece, ids) in the order of the pieces. At most a few megabytes of text are under way, so memory does not
        grow with the corpus."""
        waiting: deque = deque()
        for task in tasks(pieces):
            waiting.append((task, self.pool.submit(_encode, [piece.text for piece in task])))
            if len(waiting) > 2 * self.workers:
                yield from self._finish(*waiting.popleft())
        while waiting:
            yield from self._finish(*waiting.popleft())

    @staticmethod
    def _finish(task: list[Piece], future: Future) -> Iterator[tuple[Piece, np.ndarray]]:
        return zip(task, future.result(), strict=True)


def tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about BATCH_BYTES of text."""
    task, size = [], 0
    for piece in pieces:
        task.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


class SplitWriter:
    """Collects the content stream of one split, injects markers chunk by chunk, and writes shards."""

    def __init__(self, folder: Path, split: str, cfg: PrepareConfig, tokenizer: Tokenizer):
        self.C, self.M = cfg.chunk_content, cfg.chunk_markers if cfg.injection != "none" else 0
        self.cfg, self.tokenizer, self.split = cfg, tokenizer, split
        chunk = self.C + self.M  # whole chunks in a shard
        self.shards = ShardWriter(folder, split, tokenizer.n_vocab, -(-cfg.shard_tokens // chunk) * chunk)
        self.key = stable_key(cfg.seed, "marker places", split)
        self.content_hash = hashlib.sha256()
        self.chunks = self.bytes = self.documents = 0
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    def add(self, ids: np.ndarray) -> None:
        self._pending.append(ids)
        self._pending_tokens += len(ids)
        if self._pending_tokens >= 2**18:  # large enough to be quick, small in memory
            self._flush()

    def end_document(self) -> None:
        self.documents += 1
        self.add(np.array([self.tokenizer.eot], dtype=np.uint32))

    def _flush(self) -> None:
        stream = np.concatenate(self._pending) if self._pending else np.empty(0, np.uint32)
        n = len(stream) // self.C
        content, rest = stream[: n * self.C].reshape(n, self.C), stream[n * self.C :]
        if n:
            places = marker_places(self.cfg.injection, self.chunks, n, self.C, self.M, self.key)
            self.shards.write(inject(content, places, self.tokenizer.meta).reshape(-1))
            self.content_hash.update(content.astype(token_dtype(self.tokenizer.n_vocab)).tobytes())
            self.bytes += int(self.tokenizer.token_bytes[content].sum())
            self.chunks += n
        self._pending, self._pending_tokens = [rest], len(rest)

    def finish(self, skipped: str) -> dict:
        """-> the split's part of the manifest. Raises UserError if there is not one whole chunk."""
        self._flush()
        self.shards.close()
        if not self.chunks:
            raise UserError(
                f"the {self.split} split has {self._pending_tokens} tokens, fewer than one chunk of {self.C}"
                f"{skipped}: give more text, or {'raise' if self.split == 'val' else 'lower'} --val_fraction."
            )
        return {
            "content_tokens": self.chunks * self.C,
            "markers": self.chunks * self.M,
            "chunks": self.chunks,
            "documents": self.documents,
            "bytes": self.bytes,
            "content_tokens_dropped_at_end": self._pending_tokens,  # they do not fill a chunk
            "content_sha256": self.content_hash.hexdigest(),  # equal in all arms
            "shards": self.shards.entries,
        }


class Compressors:
    """Bits per byte of gzip -9 and xz on (the first 8 MiB of) the validation text: what a model has to beat."""

    def __init__(self):
        self.gzip, self.xz = zlib.compressobj(9, wbits=31), lzma.LZMACompressor()
        self.bytes = self.gzip_bytes = self.xz_bytes = 0

    def add(self, text: str) -> None:
        raw = text.encode()[: COMPRESSOR_BYTES - self.bytes]
        self.bytes += len(raw)
        self.gzip_bytes += len(self.gzip.compress(raw))
        self.xz_bytes += len(self.xz.compress(raw))

    def finish(self) -> dict:
        self.gzip_bytes += len(self.gzip.flush())
        self.xz_bytes += len(self.xz.flush())
        size = max(self.bytes, 1)
        return {
            "bytes": self.bytes,
            "gzip_9_bits_per_byte": round(8 * self.gzip_bytes / size, 4),
            "xz_bits_per_byte": round(8 * self.xz_bytes / size, 4),
        }


def write_dataset(folder: Path, cfg: PrepareConfig, command: str, console: Console) -> dict:
    """Writes shards, tokenizer and manifest into the existing, empty `folder` -> manifest."""
    source = open_source(cfg)
    console.print(f"{len(source.paths):,} documents, {source.total_bytes:,} bytes: {source.description}")
    tokenizer = make_tokenizer(cfg, source)
    console.print(
        f"tokenizer {tokenizer.name}: {tokenizer.n_content:,} tokens, embedding of {tokenizer.n_vocab:,} rows"
    )
    writers = {split: SplitWriter(folder, split, cfg, tokenizer) for split in SPLITS}
    compressors, run = Compressors(), None  # run = the split that the current document's last piece went to

    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    encoders = Encoders(tokenizer, cfg.workers)
    with encoders.pool, Progress(*columns, console=console) as progress:
        bar, tokens = progress.add_task("", total=source.total_bytes, rate=""), 0
        for piece, ids in encoders.in_order(source.pieces()):
            split = split_of(piece.text, cfg)
            if run not in (None, split):  # the document goes on in the other split: here it ends
                writers[run].end_document()
            writers[split].add(ids)
            if split == "val":
                compressors.add(piece.text)
            run = split
            if piece.last:
                writers[split].end_document()
                run = None
            tokens += len(ids)
            rate = f"{tokens / max(progress.tasks[0].elapsed or 0, 1e-9):,.0f} tokens/s"
            progress.update(bar, advance=int(tokenizer.token_bytes[ids].sum()), rate=rate)

    skipped = (
        f" ({len(source.skipped)} documents were skipped, {': '.join(source.skipped[0])})" if source.skipped else ""
    )
    manifest = {
        "format": 1,
        "command": command,
        "source": source.description,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "n_content": tokenizer.n_content,
            "n_vocab": tokenizer.n_vocab,
            "markers": {"<|meta|>": tokenizer.meta},
        },
        "injection": cfg.injection,
        "chunk_content": cfg.chunk_content,
        "chunk_markers": writers["train"].M,
        "seed": cfg.seed,
        "val_fraction": cfg.val_fraction,
        "documents_skipped": len(source.skipped),
        "skipped": source.skipped[:100],
        "val_text_compressed": compressors.finish(),
        "splits": {split: writers[split].finish(skipped) for split in SPLITS},
    }
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")  # last: a folder without it is no dataset
    return manifest


def prepare(cfg: PrepareConfig, command: str, console: Console, root: Path = Path("data")) -> Path:
    """Prepares root/<name> in a hidden folder beside it and renames that when all is written -> the folder."""
    folder = root / (cfg.name or f"{cfg.source}_{cfg.injection}")
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name, or delete it first.")
    partial = root / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = write_dataset(partial, cfg, command, console)
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({error}): nothing was kept.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print_summary(folder, manifest, console)
    return folder


def print_summary(folder: Path, manifest: dict, console: Console) -> None:
    C, M = manifest["chunk_content"], manifest["chunk_markers"]
    console.print(f"\n{folder}: {manifest['source']}")
    console.print(f"made by: {manifest['command']}")
    console.print(
        f"chunks of {C} content tokens + {M} markers ({manifest['injection']}, k = {M / (C + M):.4f}), "
        f"seed {manifest['seed']}, tokenizer {manifest['tokenizer']['name']}"
    )
    for name, split in manifest["splits"].items():
        console.print(
            f"  {name:5} {split['content_tokens']:>14,} content tokens + {split['markers']:,} markers, "
            f"{split['documents']:,} documents, {split['bytes']:,} bytes "
            f"({split['bytes'] / split['content_tokens']:.2f} a token), {len(split['shards'])} shards, "
            f"content sha256 {split['content_sha256'][:12]}"
        )
    packed = manifest["val_text_compressed"]
    console.print(
        f"  validation text: gzip -9 reaches {packed['gzip_9_bits_per_byte']:.3f} bits per byte, "
        f"xz {packed['xz_bits_per_byte']:.3f} (on {packed['bytes']:,} bytes)"
    )
    if manifest["documents_skipped"]:
        console.print(f"  {manifest['documents_skipped']} documents were skipped:", style="yellow")
        for path, reason in manifest["skipped"][:10]:
            console.print(f"    {path}: {reason}", style="yellow")


def inspect(folder: Path, console: Console, windows: int = 2) -> None:
    """Prints a dataset's manifest and its first windows with the markers made visible."""
    manifest = read_manifest(folder)
    print_summary(folder, manifest, console)
    chunk = manifest["chunk_content"] + manifest["chunk_markers"]
    for split in SPLITS:
        data = Windows(folder, split, chunk, "ignore")
        for window in range(min(windows, data.n_windows)):
            tokens = data.batch(np.array([window])).tokens[0].tolist()
            console.rule(f"{split}, window {window} of {data.n_windows:,}", style="dim")
            write_tokens(tokens, data.tokenizer)
            console.print()


def main(argv: list[str]) -> None:
    cfg = load_config(PrepareConfig, argv)
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    if cfg.inspect:
        inspect(Path(cfg.inspect), console)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up as Ctrl-C does
        prepare(cfg, " ".join(["python prepare.py", *argv]), console)


if __name__ == "__main__":
    run_cli(main)
