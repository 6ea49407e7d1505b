"""Reference for the two target rules: determines one target at a time, on a whole stream instead of windows."""

IGNORE = -100


def stream_targets(stream: list[int], meta: int, rule: str) -> list[int]:
    """Returns the target of every position of a stream, IGNORE where there is none.

    ignore: the target is the next token, unless that is a marker. skip: the target at a content token is the next
    content token, and a marker has none. The first content token of the stream is never a target."""
    first_content = next(i for i, token in enumerate(stream) if token != meta)
    targets = []
    for i, token in enumerate(stream):
        if rule == "ignore":
            j = i + 1
        else:
            j = i + 1
            while j < len(stream) and stream[j] == meta:
                j += 1
        scored = j < len(stream) and stream[j] != meta and j != first_content and (rule == "ignore" or token != meta)
        targets.append(stream[j] if scored else IGNORE)
    return targets
