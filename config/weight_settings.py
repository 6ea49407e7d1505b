"""Defines WeightConfig, the weights of tokens in the training loss, and the registry of weighting rules."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from nanometa.config.checks import check, check_types
from nanometa.config.settings import Settings, setting


class Weighting(NamedTuple):
    """A rule that gives every target of a window its weight in the loss.

    The score is computed first (layers/weighting.py has the functions by their names). Then come, in this order and as
    far as the rule has them: the limit, the share that is kept, the normalization, the mixture, and the permutation."""

    score: Literal["absolute", "positive", "negative", "ratio", "after_marker"]
    limited: bool = False  # scores above weight_gamma become weight_gamma
    keeps: bool = False  # the share weight_kappa with the largest scores gets equal weights, all other targets none
    normalized: bool = True  # the weights of a window sum to its number of targets
    mixed: bool = False  # weight_lambda of equal weights and 1 - weight_lambda of the scores
    permuted: bool = False  # the weights are dealt out to the targets of the window at random

    @property
    def compares(self) -> bool:
        """Whether the score compares the loss of a target with its loss under a short context."""
        return self.score != "after_marker"


# The first five are those of arXiv 2503.09202 and, for longce, of arXiv 2410.23771.
WEIGHTINGS = {
    "dense": Weighting("absolute", mixed=True),
    "sparse": Weighting("absolute", keeps=True),
    "ppmi": Weighting("positive", keeps=True),
    "npmi": Weighting("negative", keeps=True),
    "longce": Weighting("ratio", limited=True, normalized=False),
    "permuted": Weighting("absolute", mixed=True, permuted=True),  # the control of dense
    "after_markers": Weighting("after_marker"),
}
WeightingName = Literal["uniform", "dense", "sparse", "ppmi", "npmi", "longce", "permuted", "after_markers"]


def named(**properties) -> tuple[str, ...]:
    """Returns the names of the weightings with these properties."""
    return tuple(
        name
        for name, rule in WEIGHTINGS.items()
        if all(getattr(rule, key) == value for key, value in properties.items())
    )


BRANCH = "a branch may change"
COMPARING = named(compares=True)
NORMALIZED = named(normalized=True)
SHIFTED = named(score="positive") + named(score="negative")


@dataclass(frozen=True)
class WeightConfig(Settings):
    """Weights of tokens in the training loss (docs/weighting.md). Evaluations never use them."""

    weighting: WeightingName = setting("uniform", on_resume=BRANCH)  # noqa: RUF009
    """weights of the targets in the training loss. uniform: all 1, the usual loss. The others depend on d, the nats of
    a target with the whole context minus its nats with a short context. dense: a mixture of 1 and |d|; sparse: only the
    share weight_kappa of the targets with the largest |d|; ppmi, npmi: the same with max(0, -d - log weight_shift) and
    max(0, d - log weight_shift); longce: min(exp(-d), weight_gamma). Controls: permuted, the weights of dense on other
    targets of the window; after_markers, weight 2 for the first target after a marker"""
    weight_lambda: float = setting(0.75, only_with={"weighting": named(mixed=True)}, on_resume=BRANCH)
    """share of equal weights in the mixture of weighting=dense; 1 gives the usual loss"""
    weight_kappa: float = setting(0.2, only_with={"weighting": named(keeps=True)}, on_resume=BRANCH)
    """share of the targets of a window that keep a weight, 1 / weight_kappa each; 1 gives the usual loss"""
    weight_shift: float = setting(1.0, only_with={"weighting": SHIFTED}, on_resume=BRANCH)
    """ppmi and npmi count differences beyond log weight_shift"""
    weight_gamma: float = setting(5.0, only_with={"weighting": named(limited=True)}, on_resume=BRANCH)
    """largest weight of longce"""
    weight_norm: Literal["none", "batch"] = setting(
        "none", only_with={"weighting": named(normalized=False)}, on_resume=BRANCH
    )
    """normalization of the weights of longce. none: as published, so that they also change the size of the gradient;
    batch: they sum to the number of targets in the batch"""
    short_length: int | None = setting(None, only_with={"weighting": COMPARING}, on_resume=BRANCH)
    """largest number of content tokens in a short context; None = a quarter of those of a window"""
    short_stride: int | None = setting(None, only_with={"weighting": COMPARING}, on_resume=BRANCH)
    """content tokens between the starts of short contexts: each target has a short context of short_length -
    short_stride + 1 tokens or more; None = (1 - short_length / content of a window) short_length, for which the short
    contexts have as many tokens as the window"""
    weight_after: int = setting(0, only_with={"weighting": tuple(WEIGHTINGS)}, on_resume=BRANCH)
    """step from which on the weights are used; before it they are all 1"""

    def __post_init__(self):
        check_types(self)
        check(self, "weight_lambda", 0 <= self.weight_lambda <= 1, "lie in [0, 1]")
        check(self, "weight_kappa", 0 < self.weight_kappa <= 1, "lie in (0, 1]")
        check(self, "weight_shift", self.weight_shift > 0, "be above 0")
        check(self, "weight_gamma", self.weight_gamma > 0, "be above 0")
        check(self, "weight_after", self.weight_after >= 0, "be at least 0")
        for name in ("short_length", "short_stride"):
            value = getattr(self, name)
            check(self, name, value is None or 1 <= value <= 2**24, "lie in 1 .. 16777216, or be None")
        if self.short_length is not None and self.short_stride is not None:
            most = f"be at most short_length={self.short_length}"
            check(self, "short_stride", self.short_stride <= self.short_length, most)

    @property
    def label(self) -> str:
        """The short name of the weighting in JSON lines, reports and figures; "" for the usual loss."""
        rule = self.rule
        if rule is None:
            return ""
        values = {"mixed": self.weight_lambda, "keeps": self.weight_kappa, "limited": self.weight_gamma}
        parts = [self.weighting, *(f"{value:g}" for name, value in values.items() if getattr(rule, name))]
        if self.weighting in SHIFTED and self.weight_shift != 1:
            parts.append(f"shift {self.weight_shift:g}")
        return " ".join(parts + ["normed"] * (self.weight_norm == "batch"))

    @property
    def rule(self) -> Weighting | None:
        """The entry of `weighting` in the registry, or None for the usual loss."""
        return WEIGHTINGS.get(self.weighting)
