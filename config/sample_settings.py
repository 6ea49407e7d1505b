"""Settings of sampling."""

from dataclasses import dataclass, field
from typing import Literal

from nanometa.common.errors import UserError
from nanometa.config.checks import check, check_types
from nanometa.config.model_settings import Rescale
from nanometa.config.settings import SET, Settings, setting


@dataclass(frozen=True)
class SampleConfig(Settings):
    """What to write with a trained model."""

    run: str = ""
    """a run's folder (out/NAME) or one of its checkpoints; by default the newest run in out/"""
    prompt: str | None = None
    """text to continue; may contain <|meta|>; by default the start of a document"""
    prompt_file: str = ""
    """read the prompt from this UTF-8 file; - is standard input"""
    max_new_tokens: int = 300
    """content tokens to write; markers come on top"""
    count: int = 1
    """samples"""
    temperature: float = 0.8
    """0 = always the most likely token"""
    top_k: int | None = setting(200, only_with={"temperature": SET})
    """draw from the k most likely tokens; None = from all"""
    top_p: float = setting(1.0, only_with={"temperature": SET})
    """draw from the smallest set of tokens with this much probability"""
    seed: int = 1337
    """keys the draws and the places of the markers"""
    meta: Literal["trained", "none", "periodic", "uniform"] = "trained"
    """where markers are inserted: as the run's data had them, nowhere, or by another rule"""
    stop_at_endoftext: bool = False
    """end a sample at <|endoftext|>"""
    show_markers: Literal["auto", "yes", "no"] = "auto"
    """print the markers, dim; auto = only on a terminal"""
    rescale: Rescale = field(default_factory=Rescale)
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"

    def __post_init__(self):
        check_types(self)
        for name in ("max_new_tokens", "count"):
            check(self, name, getattr(self, name) >= 1, "be at least 1")
        check(self, "temperature", self.temperature == 0 or self.temperature >= 1e-3, "be 0, or at least 0.001")
        check(self, "top_k", self.top_k is None or self.top_k >= 1, "be at least 1, or None")
        check(self, "top_p", 0 < self.top_p <= 1, "lie in (0, 1]")
        check(self, "seed", self.seed >= 0, "be at least 0")
        if self.prompt is not None and self.prompt_file:
            raise UserError("prompt and prompt_file are both given: leave one out.")
