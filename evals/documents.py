"""Cuts documents into pieces of equal size, and computes the loss by depth in them, with intervals over documents."""

import math

import numpy as np

from nanometa.common.statistics import clustered_ratio


def documents_of(content: np.ndarray, eot: int) -> list[np.ndarray]:
    """Returns the documents of a content stream (N,), each of which ends with <|endoftext|>.

    A document starts with <|endoftext|>, as a prompt does, and excludes the <|endoftext|> that ends it. The last one is
    what follows the last <|endoftext|>."""
    stream = np.append(np.array([eot], content.dtype), content)
    return np.split(stream, np.flatnonzero(stream == eot)[1:])


def pieces(content: np.ndarray, eot: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Cuts the documents of a content stream (N,) into pieces.

    Returns the pieces (P, size), the number of each piece's document (P,), and the tokens of the longest document.
    A document is cut from its start into consecutive pieces; the remainder at its end is dropped."""
    documents = documents_of(content, eot)
    cut = [document[: len(document) // size * size].reshape(-1, size) for document in documents]
    owners = np.repeat(np.arange(len(cut)), [len(rows) for rows in cut])
    return np.concatenate(cut), owners, max(map(len, documents))


class ByDepth:
    """Sums of nats of scored tokens, by depth in the piece and by document. The depths of a bucket are summed together.

    The depth of a token is the index of its predicting token among the content tokens of its piece. It does not depend
    on markers or on the length of windows."""

    def __init__(self, owners: np.ndarray, size: int, bucket: int):
        """owners (P,): number of each piece's document; size: content tokens in a piece; bucket: depths in a bucket."""
        _, self.document, self.pieces = np.unique(owners, return_inverse=True, return_counts=True)
        self.bucket = bucket
        # all tokens of a piece but its first are scored, so documents differ only in their number of pieces
        self.tokens = np.bincount(np.arange(size - 1) // bucket)
        self.nats = np.zeros((len(self.pieces), len(self.tokens)))

    def add(self, piece: int, depths: np.ndarray, nats: np.ndarray) -> None:
        """Adds the nats (N,) of tokens of a piece, at their depths (N,)."""
        self.nats[self.document[piece]] += np.bincount(depths // self.bucket, nats, minlength=len(self.tokens))

    def figures(self) -> dict:
        """Returns the loss by depth, of G documents.

        document_pieces (G,): the number of pieces of each document.
        document_nats (G, buckets): nats per token.
        by_depth: for every bucket its first depth, its number of tokens, their nats per token, and the two ends of the
            95 % interval over documents, which are None if there is only one document."""
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
