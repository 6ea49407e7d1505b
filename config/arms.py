"""The registry of arms: what the second attention of a block connects, and what an arm is called.

A new second attention is an entry here, a value in the documented table of settings and, for the tests, its definition
in tests/reference/gpt.py and a run in tests/test_controls.py. Tests fail until these exist. Everything else reads the
entry: the model, cached decoding, settings, checks of the dataset, --dry_run, labels, probes and reports. The tests run
for every entry. Another value of `connects` also needs a layer in model.py (SECOND_LAYERS). A pattern that `connects`
and `window` do not describe has to be built wherever attention is computed: meta_attention.py, the dynamic scale of
layers/rope.py, inference/cache.py, probes/heads.py, and training/estimate.py for its memory.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SecondAttention:
    """One value of the setting second_attention."""

    name: str
    label: str | None
    """the arm's short name in lines, reports and figures; None where other settings decide it (see arm_label)"""
    connects: Literal["markers", "random", "all", "nothing"]
    """the positions of a window that attend to each other: its markers, some drawn at random, all, or none"""
    markers: Literal["needed", "allowed", "refused"]
    """in the dataset"""
    window: int | None = None
    """how many of the connected positions each one reads, the last ones, its own included; None: all up to its own"""

    @property
    def has_layer(self) -> bool:
        return self.connects != "nothing"

    @property
    def gathers(self) -> bool:
        """Returns whether the layer works on a few rows of the window, named by meta_index, and not on all."""
        return self.connects in ("markers", "random")

    def rows(self, T: int, M: int, random_fraction: float) -> int:
        """Returns how many of T positions, M of them markers, the layer connects."""
        return {"markers": M, "random": round(random_fraction * T), "all": T, "nothing": 0}[self.connects]


SECOND_ATTENTIONS = {
    entry.name: entry
    for entry in (
        SecondAttention("meta", "meta", connects="markers", markers="needed"),
        SecondAttention("diagonal", "diagonal", connects="markers", markers="needed", window=1),
        SecondAttention("causal", "causal2", connects="all", markers="allowed"),
        SecondAttention("random", "random", connects="random", markers="refused"),
        SecondAttention("none", None, connects="nothing", markers="allowed"),
    )
}

SecondAttentionName = Literal[tuple(SECOND_ATTENTIONS)]


def arm_label(second: SecondAttention, wide_mlp: bool, has_markers: bool) -> str:
    """Returns the short name of an arm, as in config/ and records/: meta, causal2, random, widemlp, pause or gpt2.

    An arm that differs from these has another name, so that lines of two arms are never taken for one: "causal2 with
    markers", "meta, wide mlp". wide_mlp: the MLP's width is not 4 n_embd; has_markers: the dataset has markers."""
    name = second.label or ("pause" if has_markers else "widemlp" if wide_mlp else "gpt2")
    if second.label and second.markers == "allowed" and has_markers:
        name += " with markers"
    return f"{name}, wide mlp" if wide_mlp and name != "widemlp" else name
