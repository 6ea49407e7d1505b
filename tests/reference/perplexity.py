"""The sliding window from its definition: every token by itself, from what stands before it and nothing else."""

from tests.reference.generate import next_logits
from tests.reference.targets import IGNORE, stream_targets


def token_nats(run, stream: list[int], length: int, stride: int) -> list[tuple[int, float]]:
    """For every scored token (place of what predicts it, in the first window that holds that; nats). Windows start at
    0, stride, 2 stride, ... The model must be in double precision."""
    out = []
    for source, target in enumerate(stream_targets(stream, run.tokenizer.meta, run.config.target_rule)):
        if target != IGNORE:
            start = 0
            while start + length <= source:
                start += stride
            logits = next_logits(run, stream[start : source + 1])
            out.append((source - start, -logits.log_softmax(-1)[target].item()))
    return out
