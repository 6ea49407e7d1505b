"""Lists the marker schemes that the settings allow, so that every new value of a setting is tested."""

import itertools
import typing

from nanometa.common.errors import UserError
from nanometa.config import MarkerConfig

CHOICES = {
    name: typing.get_args(hint)
    for name, hint in typing.get_type_hints(MarkerConfig).items()
    if typing.get_origin(hint) is typing.Literal
}
SMALL = {"random_marks": 3, "max_span": 6, "sentence_tokens": 3, "eviction_window": 5, "compression_ratio": (0.4,)}


def schemes(**changed) -> dict[str, MarkerConfig]:
    """Returns all combinations of places, marks and rules that MarkerConfig accepts, by name, in a small size."""
    found = {}
    for values in itertools.product(*CHOICES.values()):
        given = dict(zip(CHOICES, values, strict=True))
        if given["marker_place"] == "stored" and given["marks"] != "sr":
            continue  # the setting has no effect there
        try:
            found["-".join(values)] = MarkerConfig(**given, **{**SMALL, **changed})
        except UserError:
            pass
    return found


SCHEMES = schemes()
VARIANTS = {
    **SCHEMES,
    **{f"{name}-delay": cfg for name, cfg in schemes(evict_delay=1).items() if cfg.evict == "segment"},
    **{f"{name}-sinks": cfg for name, cfg in schemes(sinks=3).items() if cfg.evict in ("segment", "window")},
    **{f"{name}-two": cfg for name, cfg in schemes(chunk_sentences=2).items() if cfg.marker_place == "sentence"},
    **{
        f"{name}-mixed": cfg
        for name, cfg in schemes(compression_ratio=(0.2, 0.5)).items()
        if cfg.marker_place == "span"
    },
}
