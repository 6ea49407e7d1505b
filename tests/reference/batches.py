"""Reference for building a Batch: follows the docstring of Batch, with plain loops over lists."""

from tests.reference.targets import IGNORE, stream_targets


def batch(texts, marker, rule, T, pad, connected, meta_width, scored_width, counted) -> dict[str, list[list[int]]]:
    """Returns the fields of the Batch of texts, which are lists of at most T ids and are padded with the id `pad`.

    connected: for each text, the positions that the second attention connects.
    meta_width, scored_width: the widths of meta_index and scored_index.
    counted: for each text, the ids that may be targets."""
    fields = {"tokens": [], "targets": [], "positions": [], "meta_index": [], "scored_index": []}
    for text, members, ids in zip(texts, connected, counted, strict=True):
        targets = [target if target in ids else IGNORE for target in stream_targets(text, marker, rule)]
        targets += [IGNORE] * (T - len(text))
        fields["tokens"].append(text + [pad] * (T - len(text)))
        fields["targets"].append(targets)
        fields["positions"].append(list(range(T)))
        for name, places, width in (
            ("meta_index", sorted(members), meta_width),
            ("scored_index", [place for place in range(T) if targets[place] != IGNORE], scored_width),
        ):
            fields[name].append(places + [T] * (width - len(places)))
    return fields
