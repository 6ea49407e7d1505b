"""Builds a dataset from tokenized segments: cuts them into chunks, injects markers, writes shards and the manifest.

Documents that are too short are left out first."""

import hashlib
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.files import write_atomically
from nanometa.common.interrupts import interrupts_postponed
from nanometa.common.keyed_random import stable_key
from nanometa.config import PrepareConfig
from nanometa.config.settings import why_idle
from nanometa.data.inject import inject, marker_places
from nanometa.data.shards import MANIFEST, ShardWriter, token_dtype
from nanometa.data.staging import BLOCK_TOKENS, SPLITS, Segment, read_segment
from nanometa.data.tokenizer import Tokenizer

COMPRESSOR_BYTES = 8 * 2**20  # gzip and xz are measured on at most this much validation text


class LongDocuments:
    """A filter that passes documents with at least `least` tokens, <|endoftext|> included, and counts the others.

    Every document of the stream ends with <|endoftext|>. A text that is divided between the splits is
    several documents."""

    def __init__(self, eot: int, least: int):
        self.eot, self.least = eot, least
        self.too_short = self.tokens_too_short = 0  # documents left out, and their tokens
        self.longest = 0  # tokens of the longest document, left out or not
        self._held: list[np.ndarray] = []  # parts of the current document while it may still be too short
        self._length = 0  # tokens of the current document so far

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Takes the next ids of the stream (N,) and returns those that pass (K,), also from earlier calls."""
        if not self.least:
            return ids
        out, ends = [], np.flatnonzero(ids == self.eot) + 1
        if len(ends):
            lengths = np.diff(ends, prepend=-self._length)
            stays = lengths >= self.least
            first, between, rest = np.split(ids, ends[[0, -1]])
            out = [*self._held, first] if stays[0] else []
            out.append(between[np.repeat(stays[1:], lengths[1:])])
            self.too_short += int((~stays).sum())
            self.tokens_too_short += int(lengths[~stays].sum())
            self.longest = max(self.longest, int(lengths.max()))
            self._held, self._length = [rest], len(rest)
        else:
            self._held.append(ids)
            self._length += len(ids)
        if self._length >= self.least:
            out, self._held = out + self._held, []
        return np.concatenate([ids[:0], *out])


class SplitWriter:
    """A writer of the shards of one split. It leaves out short documents, cuts chunks and injects markers."""

    def __init__(self, folder: Path, split: str, cfg: PrepareConfig, tokenizer: Tokenizer):
        self.C, self.M = cfg.chunk_content, cfg.chunk_markers if cfg.injection != "none" else 0
        self.cfg, self.tokenizer, self.split = cfg, tokenizer, split
        chunk = self.C + self.M  # a shard holds whole chunks
        self.shards = ShardWriter(folder, split, tokenizer.n_vocab, -(-cfg.shard_tokens // chunk) * chunk)
        self.dtype = token_dtype(tokenizer.n_vocab)
        self.key = stable_key(cfg.seed, "marker places", split)
        self.long = LongDocuments(tokenizer.eot, cfg.min_document_tokens)
        self.content_hash, self.text_hash = hashlib.sha256(), hashlib.sha256()
        self.chunks = self.bytes = 0
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    def add(self, ids: np.ndarray) -> None:
        """Adds the next ids (N,) of the content stream, in the dtype of the shards."""
        if len(ids := self.long.take(ids)):
            self.text_hash.update(marked_text(ids, self.tokenizer))
            self._pending.append(ids)
            self._pending_tokens += len(ids)
        if self._pending_tokens >= BLOCK_TOKENS:
            self._flush()

    def _flush(self) -> None:
        """Writes all whole chunks of the pending tokens, and keeps the rest."""
        stream = np.concatenate([np.empty(0, self.dtype), *self._pending])
        n = len(stream) // self.C
        content, rest = stream[: n * self.C].reshape(n, self.C), stream[n * self.C :]
        if n:
            places = marker_places(self.cfg.injection, self.chunks, n, self.C, self.M, self.key)
            self.shards.write(inject(content, places, self.tokenizer.meta).reshape(-1))
            self.content_hash.update(content)
            self.bytes += int(self.tokenizer.token_bytes[content].sum())
            self.chunks += n
        self._pending, self._pending_tokens = [rest], len(rest)

    def finish(self, documents: int, skipped: str) -> dict:
        """Writes the rest and returns the split's part of the manifest. Raises UserError if it has no whole chunk.

        documents: number of documents in the segments. skipped: note about skipped documents, for the error message."""
        self._flush()
        self.shards.close()
        documents -= self.long.too_short
        if not self.chunks:
            cure = "give more text"
            if self.long.too_short:
                skipped += f" ({self.long.too_short} others were left out by min_document_tokens={self.long.least})"
                cure += ", or lower --min_document_tokens"
            if not why_idle(self.cfg, "val_fraction"):
                cure += f", or {'raise' if self.split == 'val' else 'lower'} --val_fraction (each text of up to 64 KB, "
                cure += "and each such part of a longer one, goes to one split as a whole)"
                cure += ", or name --val_files" if self.cfg.source == "files" else ""
            raise UserError(
                f"the {self.split} split has {self._pending_tokens} tokens in {documents} documents, fewer than one "
                f"chunk of {self.C}{skipped}: {cure}."
            )
        return {
            "content_tokens": self.chunks * self.C,
            "markers": self.chunks * self.M,
            "chunks": self.chunks,
            "documents": documents,
            "bytes": self.bytes,
            "content_tokens_dropped_at_end": self._pending_tokens,  # too few for another chunk
            "content_sha256": self.content_hash.hexdigest(),  # the same in all arms
            "text_sha256": self.text_hash.hexdigest(),  # the same with every tokenizer; the dropped end is included
            "shards": self.shards.entries,
        }


def marked_text(ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """Returns the text of content ids (N,), with the byte FF, which no UTF-8 text contains, for every <|endoftext|>."""
    return b"\xff".join(tokenizer.text_bytes(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot)))


def compressed(segments: list[tuple[Path, Segment]], tokenizer: Tokenizer, least: int) -> dict:
    """Returns the bits per byte of gzip -9 and xz on at most 8 MiB of validation text, a baseline for models.

    segments: (folder, segment) of the whole source. least: the setting min_document_tokens."""
    text, long = bytearray(), LongDocuments(tokenizer.eot, least)
    for ids in (ids for where, segment in segments for ids in read_segment(where, segment, "val", tokenizer)):
        text += tokenizer.text_bytes(long.take(ids))
        if len(text) >= COMPRESSOR_BYTES:
            break
    del text[COMPRESSOR_BYTES:]
    size = max(len(text), 1)
    return {
        "bytes": len(text),
        "gzip_9_bits_per_byte": round(8 * len(zlib.compress(text, 9, wbits=31)) / size, 4),
        "xz_bits_per_byte": round(8 * len(lzma.compress(text)) / size, 4),
    }


def check_length(longest: dict[str, int], least: int) -> None:
    """Raises UserError if all documents of a split are too short. longest: tokens of the longest document, by split."""
    there = {split: tokens for split, tokens in longest.items() if tokens}
    empty = [split for split, tokens in there.items() if tokens < least]
    if empty:
        raise UserError(
            f"min_document_tokens={least} leaves no document in {' and '.join(empty)}, because the longest has "
            f"{', '.join(f'{tokens} tokens in {split}' for split, tokens in there.items())}: lower it to "
            f"{min(there.values())} or less, or give longer documents."
        )


def assemble(
    folder: Path,
    segments: list[tuple[Path, Segment]],
    cfg: PrepareConfig,
    tokenizer: Tokenizer,
    description: str,
    command: str,
    advance: Callable[[int], None],
) -> dict:
    """Writes shards, tokenizer and manifest into the existing, empty `folder`, and returns the manifest.

    segments: (folder, segment) of the whole source, in order. advance(tokens): called to report progress. Raises
    UserError for a damaged segment, and if a split has no document that is long enough or no whole chunk."""
    skipped = [item for _, segment in segments for item in segment.skipped_named][:100]
    n_skipped = sum(segment.skipped for _, segment in segments)
    note = f" (documents that were skipped: {n_skipped:,}, the first is {': '.join(skipped[0])})" if skipped else ""
    if not any(segment.splits[split]["tokens"] for _, segment in segments for split in SPLITS):
        raise UserError(f"there is no text in {description}{note}: give files with text.")
    writers = {split: SplitWriter(folder, split, cfg, tokenizer) for split in SPLITS}
    documents, tokens = (
        {split: sum(segment.splits[split][key] for _, segment in segments) for split in SPLITS}
        for key in ("documents", "tokens")
    )
    with ThreadPoolExecutor(1) as beside:  # compressing takes seconds, in which it releases the interpreter lock
        with interrupts_postponed():
            compressing = beside.submit(compressed, segments, tokenizer, cfg.min_document_tokens)
        for split, writer in writers.items():
            for where, segment in segments:
                for ids in read_segment(where, segment, split, tokenizer):
                    writer.add(ids)
                    advance(len(ids))
    check_length({split: writer.long.longest for split, writer in writers.items()}, cfg.min_document_tokens)
    splits = {split: writer.finish(documents[split], note) for split, writer in writers.items()}
    with interrupts_postponed():
        val_text_compressed = compressing.result()
    manifest = {
        "format": 1,
        "command": command,
        "source": description,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "n_content": tokenizer.n_content,
            "n_vocab": tokenizer.n_vocab,
            "markers": {"<|meta|>": tokenizer.meta},
        },
        "injection": cfg.injection,
        "chunk_content": cfg.chunk_content,
        "chunk_markers": cfg.chunk_markers if cfg.injection != "none" else 0,
        "seed": cfg.seed,
        "val_fraction": None if why_idle(cfg, "val_fraction") else cfg.val_fraction,  # None: val_files divide the text
        "min_document_tokens": cfg.min_document_tokens,
        "too_short": {
            "documents": sum(writer.long.too_short for writer in writers.values()),
            "of_documents": sum(documents.values()),
            "tokens": sum(writer.long.tokens_too_short for writer in writers.values()),
            "of_tokens": sum(tokens.values()),
        },
        "documents_skipped": n_skipped,
        "skipped": skipped,
        "skipped_by_kind": dict(sum((Counter(segment.skipped_by_kind) for _, segment in segments), Counter())),
        "endoftext_in_text": sum(segment.endoftext for _, segment in segments),
        "val_text_compressed": val_text_compressed,
        "splits": splits,
    }
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    # the manifest is written last, because it is what makes the folder a dataset
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest
