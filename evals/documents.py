"""Pieces of single documents, and the loss by depth in them with intervals over documents."""

import math

import numpy as np

from nanometa.common.statistics import clustered_ratio


def pieces(content: np.ndarray, eot: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """content (N,), documents each ended by <|endoftext|> -> the pieces (P, size), the number of each one's document
    (P,), and the tokens of the longest document.

    A document is <|endoftext|>, which stands before it as before a prompt, and its tokens, without the <|endoftext|>
    that ends it. It is cut from its start into pieces that follow one another; what is left at its end is in none."""
    stream = np.append(np.array([eot], content.dtype), content)
    documents = np.split(stream, np.flatnonzero(stream == eot)[1:])
    cut = [document[: len(document) // size * size].reshape(-1, size) for document in documents]
    owners = np.repeat(np.arange(len(cut)), [len(rows) for rows in cut])
    return np.concatenate(cut), owners, max(map(len, documents))


class ByDepth:
    """Nats of scored tokens by depth, `bucket` depths together, and by document. A token's depth is the place of what
    predicts it among the content tokens of its piece: it is the same with any markers, in windows of any length."""

    def __init__(self, owners: np.ndarray, size: int, bucket: int):
        """owners (P,): the number of each piece's document; size: content tokens of a piece."""
        _, self.document, self.pieces = np.unique(owners, return_inverse=True, return_counts=True)
        self.bucket = bucket
        # of every piece all tokens but the first are scored, so documents differ in the number of their pieces alone
        self.tokens = np.bincount(np.arange(size - 1) // bucket)
        self.nats = np.zeros((len(self.pieces), len(self.tokens)))

    def add(self, piece: int, depths: np.ndarray, nats: np.ndarray) -> None:
        """depths, nats (N,) of tokens of a piece."""
        self.nats[self.document[piece]] += np.bincount(depths // self.bucket, nats, minlength=len(self.tokens))

    def figures(self) -> dict:
        """document_pieces (G,) and document_nats (G, buckets), nats a token; by_depth: for every bucket its first
        depth, tokens, nats a token and the 95 % interval of these over documents, None with one document."""
        n = self.pieces[:, None] * self.tokens  # (G, buckets)
        ends = [clustered_ratio(nats, count) for nats, count in zip(self.nats.T, n.T, strict=True)]
        means = (self.nats.sum(axis=0) / n.sum(axis=0)).tolist()
        starts = range(0, len(means) * self.bucket, self.bucket)
        return {
            "document_pieces": self.pieces.tolist(),
            "document_nats": (self.nats / n).tolist(),
            "by_depth": [
                [start, count, mean, *(end if math.isfinite(end) else None for end in interval)]
                for start, count, mean, interval in zip(starts, n.sum(axis=0).tolist(), means, ends, strict=True)
            ],
        }
