"""Registers the arms of the experiment: what the second attention of a block connects, and the name of each arm.

To add a second attention, add an entry here, a value to the documented table of settings and, for the tests, its
definition in tests/reference/gpt.py and a run in tests/test_controls.py. Tests fail until these exist. Everything else
reads the entry: the model, cached decoding, settings, dataset checks, --dry_run, labels, probes and reports. The tests
run for every entry.

A new value of `connects` also needs, in this file, a place in the type of `connects`, in `rows`, and in `selects` if
only some of the positions are connected; and a layer in SECOND_LAYERS of model.py. If the connected positions are not
those of the markers, it also needs their selection in data/layout.py (connected_positions) and, for generated text, in
inference/generation.py (takes_part, _slots). docs/extend.md lists what randomly drawn positions need in addition.

A pattern that `connects`, `window` and `others` cannot describe must be implemented wherever attention is computed:
meta_attention.py, the dynamic scale of layers/rope.py, inference/cache.py, probes/heads.py, and training/estimate.py
for its FLOPs and memory. A new value of `others` is such a pattern.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SecondAttention:
    """An option of the setting second_attention."""

    name: str
    label: str | None
    """short name of the arm in JSON lines, reports and figures; None if it depends on other settings (see arm_label)"""
    connects: Literal["markers", "random", "all", "nothing"]
    """positions of a window that attend to each other: the markers, randomly drawn positions, all positions, or none"""
    markers: Literal["needed", "allowed", "refused"]
    """whether the dataset must, may or must not contain markers"""
    window: int | None = None
    """number of connected positions that each one attends to: itself and the last ones before; None = all of them"""
    others: Literal["nothing", "mean", "read"] = "nothing"
    """what the positions get that are not connected. nothing: the layer does not change them; mean: the mean of the
    values of all positions up to theirs, connected or not; read: they attend to the connected positions before them"""

    def __post_init__(self):
        if self.others != "nothing" and (self.connects != "markers" or self.window is not None):
            raise ValueError(f"others={self.others} is implemented for all markers only: connects=markers, window=None")

    @property
    def has_layer(self) -> bool:
        """Whether a block has a second attention layer at all."""
        return self.connects != "nothing"

    @property
    def selects(self) -> bool:
        """Whether only the positions in meta_index are keys, instead of all positions of the window."""
        return self.connects in ("markers", "random")

    @property
    def gathers(self) -> bool:
        """Whether only the positions in meta_index are queries and keys, instead of all positions of the window."""
        return self.selects and self.others != "read"

    def rows(self, T: int, M: int, random_fraction: float) -> int:
        """Returns how many positions the layer connects in a window of T positions, M of which are markers."""
        return {"markers": M, "random": round(random_fraction * T), "all": T, "nothing": 0}[self.connects]


SECOND_ATTENTIONS = {
    entry.name: entry
    for entry in (
        SecondAttention("meta", "meta", connects="markers", markers="needed"),
        SecondAttention("diagonal", "diagonal", connects="markers", markers="needed", window=1),
        SecondAttention("meta_mean", "meta+mean", connects="markers", markers="needed", others="mean"),
        SecondAttention("read_meta", "read meta", connects="markers", markers="needed", others="read"),
        SecondAttention("causal", "causal2", connects="all", markers="allowed"),
        SecondAttention("random", "random", connects="random", markers="refused"),
        SecondAttention("none", None, connects="nothing", markers="allowed"),
    )
}

SecondAttentionName = Literal[tuple(SECOND_ATTENTIONS)]


def arm_label(second: SecondAttention, wide_mlp: bool, has_markers: bool) -> str:
    """Returns the short name of an arm, as used in config/ and records/: meta, causal2, random, widemlp, pause or gpt2.

    Other combinations get a longer name, such as "causal2 with markers" or "meta, wide mlp", so that no two arms share
    a name. wide_mlp: the MLP's width is not 4 n_embd; has_markers: the dataset has markers."""
    name = second.label or ("pause" if has_markers else "widemlp" if wide_mlp else "gpt2")
    if second.label and second.markers == "allowed" and has_markers:
        name += " with markers"
    return f"{name}, wide mlp" if wide_mlp and name != "widemlp" else name
