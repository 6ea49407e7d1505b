"""The two target rules, one token at a time, on a whole stream instead of windows."""

IGNORE = -100


def stream_targets(stream: list[int], meta: int, rule: str) -> list[int]:
    """The target of every position of a stream.

    ignore: the next token unless it is a marker. skip: at content, the next content token; at a marker, nothing.
    The stream's first content token is a target nowhere."""
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
