"""Cuts the documents of a split into pieces that two runs with different tokenizers read alike, byte for byte.

Two datasets of the same text have different tokens, but their tokens cover the same bytes of the split. A place of the
text where a token ends under both tokenizers is a common border. Pieces begin and end at common borders, so that
neither run reads a byte that the other lacks. With one tokenizer the pieces are those of evals/documents.py."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanometa.common.errors import UserError
from nanometa.data.inject import strip
from nanometa.data.shards import read_manifest
from nanometa.evals.common import read_split
from nanometa.evals.documents import documents_of
from nanometa.training.checkpoint import Run


class SharedPiece(NamedTuple):
    """A piece of a document, as the content ids of two tokenizers. Both cover the same bytes."""

    document: int
    first: np.ndarray  # (P,) ids of the first run; the first piece of a document starts with <|endoftext|>
    second: np.ndarray  # (Q,) ids of the second run, likewise


def check_same_text(first: Path, second: Path) -> None:
    """Raises UserError unless the validation splits of two datasets were made from the same text.

    The shards of a split end with a whole chunk, so those of one dataset may hold some more of the text."""
    manifests = [read_manifest(folder) for folder in (first, second)]
    splits = [manifest["splits"]["val"] for manifest in manifests]
    contents = {(manifest["tokenizer"]["fingerprint"], split["content_sha256"])
                for manifest, split in zip(manifests, splits, strict=True)}  # fmt: skip
    if len(contents) == 1:
        return
    for folder, split in zip((first, second), splits, strict=True):
        if "text_sha256" not in split:
            raise UserError(
                f"the manifest of {folder} has no text_sha256, so its text cannot be compared with that of the other "
                f"dataset: prepare it again."
            )
    if splits[0]["text_sha256"] != splits[1]["text_sha256"]:
        raise UserError(
            f"the validation texts of {first} and {second} differ: prepare both from the same source, with the same "
            f"--seed, --val_fraction and --min_document_tokens=0."
        )


def shared_pieces(runs: tuple[Run, Run], folders: tuple[Path, Path], size: int) -> list[SharedPiece]:
    """Returns the pieces of the validation split that both runs read, in the order of the text.

    runs, folders: the runs, and for each a dataset with its tokenizer. size: most content tokens of a piece, under
    both tokenizers. Raises UserError if the datasets do not fit the runs, or have different texts."""
    check_same_text(*folders)
    contents = [strip(read_split(run, folder, None), run.tokenizer.meta)
                for run, folder in zip(runs, folders, strict=True)]  # fmt: skip
    documents = [documents_of(content, run.tokenizer.eot) for content, run in zip(contents, runs, strict=True)]
    lengths = [run.tokenizer.token_bytes for run in runs]
    found = []
    for number, (first, second) in enumerate(zip(*documents, strict=False)):  # one split may hold more documents
        ends = [np.cumsum(of[ids]) for of, ids in zip(lengths, (first, second), strict=True)]
        found += [SharedPiece(number, first[i], second[j]) for i, j in cuts(*ends, size)]
    return found


def cuts(first: np.ndarray, second: np.ndarray, size: int) -> list[tuple[slice, slice]]:
    """Returns the tokens of each piece of a document, under two tokenizers.

    first (N,), second (M,): the byte at which each token of the document ends, 0 for the <|endoftext|> at its start.
    A piece ends at the last common border up to which it has at most `size` tokens under both tokenizers. The remainder
    of the document is dropped, and so is a stretch of more than `size` tokens without a common border."""
    _, *at = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    out, start, end = [], (0, 0), (0, 0)  # counted in tokens
    for border in zip(*(of + 1 for of in at), strict=True):
        if longest(start, border) > size:
            if end > start:
                out.append((start, end))
            start = end if longest(end, border) <= size else border
        end = border
    if longest(start, end) == size:
        out.append((start, end))
    return [tuple(slice(int(i), int(j)) for i, j in zip(*piece, strict=True)) for piece in out]


def longest(start: tuple[int, int], end: tuple[int, int]) -> int:
    """Returns the tokens between two places of a text, under the tokenizer that has more of them."""
    return max(end[0] - start[0], end[1] - start[1])


def carried(flags: np.ndarray, flagged: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Carries a property of tokens over to the tokens of another tokenizer.

    flags (N,) bool: which tokens have it. flagged (N,), asked (M,): bytes of the tokens of the same text under both
    tokenizers. Returns which of the M tokens consist wholly of bytes of such tokens, (M,) bool, never a token without
    bytes. Neighbors that have it are one interval of bytes."""
    has = np.append(0, np.cumsum(np.repeat(flags, flagged)))  # of the bytes before each byte, and of all
    ends = np.cumsum(asked)
    return (asked > 0) & (has[ends] - has[ends - asked] == asked)
