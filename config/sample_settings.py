"""Defines SampleConfig, the settings of sample.py, which generates text."""

from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import Suppress

from nanometa.common.errors import UserError
from nanometa.config.checks import check, check_types
from nanometa.config.marker_settings import MarkerConfig
from nanometa.config.model_settings import Rescale
from nanometa.config.settings import SET, Settings, setting


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Generates text with a trained model."""

    run: str = ""
    """folder of a run (out/NAME) or of one of its checkpoints; by default the newest run in out/"""
    prompt: str | None = None
    """text to continue, which may contain <|meta|>; by default the start of a document"""
    prompt_file: str = ""
    """UTF-8 file to read the prompt from; - reads standard input"""
    max_new_tokens: int = 300
    """content tokens to generate; markers are not counted"""
    count: int = 1
    """number of samples"""
    temperature: float = 0.8
    """sampling temperature; 0 = always take the most likely token"""
    top_k: int | None = setting(200, only_with={"temperature": SET})
    """sample from the k most likely tokens; None = from all tokens"""
    top_p: float = setting(1.0, only_with={"temperature": SET})
    """sample from the smallest set of most likely tokens that has at least this total probability"""
    seed: int = setting(1337, only_with={"temperature": SET, "meta": ("trained", "uniform")})
    """seed of the sampled tokens and of random marker positions"""
    stop_at_endoftext: bool = False
    """end a sample at <|endoftext|>"""
    meta: Literal["trained", "none", "periodic", "uniform"] = "trained"
    """where to insert markers. trained: as in the training data of the run; none: nowhere; periodic, uniform: by that
    rule of prepare.py"""
    compression_ratio: float | None = setting(None, only_with={"meta": ("trained",)})
    """share of the context to save, for a run that was trained with such shares; None = those of training, of which
    every window draws one"""
    show_markers: Literal["auto", "yes", "no"] = "auto"
    """print the markers, dimmed; auto = only on a terminal"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """device to run on; auto = cuda, else mps, else cpu"""
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"
    """precision of the forward pass; auto = bfloat16 autocast where the hardware supports it, else float32"""
    rescale: Rescale = field(default_factory=Rescale)
    typed: Suppress[tuple[str, ...]] = field(default=(), compare=False, repr=False, metadata={"hidden": True})
    """names of the settings that the command line set, even to their defaults"""

    def __post_init__(self):
        check_types(self)
        for name in ("max_new_tokens", "count"):
            check(self, name, getattr(self, name) >= 1, "be at least 1")
        check(self, "temperature", self.temperature == 0 or self.temperature >= 1e-3, "be 0, or at least 0.001")
        check(self, "top_k", self.top_k is None or self.top_k >= 1, "be at least 1, or None")
        check(self, "top_p", 0 < self.top_p <= 1, "lie in (0, 1]")
        check(self, "compression_ratio", 0 <= (self.compression_ratio or 0) < 1, "lie in [0, 1), or be None")
        check(self, "seed", self.seed >= 0, "be at least 0")
        if self.prompt is not None and self.prompt_file:
            raise UserError("prompt and prompt_file are both given: give only one of them.")

    def refuse_unused(self, injection: str, scheme: MarkerConfig) -> None:
        """Raises UserError if a setting that was typed has no effect on a run.

        injection, scheme: the rules that place the markers in the samples of the run."""
        if self.top_k == 1 and (idle := [name for name in ("temperature", "top_p") if name in self.typed]):
            raise UserError(
                f"--{idle[0]} has no effect with --top_k=1, which always takes the most likely token: leave one of "
                f"them out."
            )
        greedy = "temperature=0" if self.temperature == 0 else "top_k=1" if self.top_k == 1 else ""
        if greedy and not (injection == "uniform" or scheme.is_random) and "seed" in self.typed:
            raise UserError(
                f"--seed has no effect, because {greedy} always takes the most likely token and injection={injection} "
                f"places no marker at random: leave --seed out."
            )
