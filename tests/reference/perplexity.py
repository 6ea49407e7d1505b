"""Reference for the sliding window of evals/perplexity.py: scores every token separately from the tokens before it."""

from tests.reference.generate import next_logits
from tests.reference.targets import IGNORE, stream_targets


def token_nats(run, stream: list[int], length: int, stride: int) -> list[tuple[int, int, float]]:
    """Returns a tuple (position in the stream, position in the window, nats) for every scored token.

    The positions are those of the token that predicts it, and the window is the first one that contains that token.
    Windows start at 0, stride, 2 * stride, ... The model must be in double precision.
    """
    out = []
    for source, target in enumerate(stream_targets(stream, run.tokenizer.meta, run.config.target_rule)):
        if target != IGNORE:
            start = 0
            while start + length <= source:
                start += stride
            logits = next_logits(run, stream[start : source + 1])
            out.append((source, source - start, -logits.log_softmax(-1)[target].item()))
    return out


def pieces(content: list[int], eot: int, size: int) -> list[tuple[int, list[int]]]:
    """Returns the pieces of documents, cut token by token, as pairs (number of the document, ids)."""
    out, document, piece = [], 0, [eot]
    for token in [*content, None]:  # None stands for the end
        if len(piece) == size:
            out.append((document, piece))
            piece = []
        if token == eot:
            document, piece = document + 1, [eot]
        else:
            piece.append(token)
    return out
