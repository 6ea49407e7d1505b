"""Settings of the model, and of how a trained model's positions are read."""

from dataclasses import dataclass
from typing import Literal

from nanometa.common.errors import UserError
from nanometa.config.arms import SECOND_ATTENTIONS, SecondAttention, SecondAttentionName
from nanometa.config.checks import check, check_types, nearest_multiples
from nanometa.config.settings import Settings, setting

RANDOM_ATTENTIONS = tuple(name for name, second in SECOND_ATTENTIONS.items() if second.connects == "random")


@dataclass(frozen=True)
class GPTConfig(Settings):
    """The shape of the model. The defaults are GPT-2 124M with meta-attention (151.9M parameters)."""

    n_layer: int = 12
    """blocks"""
    n_head: int = 12
    """heads of every attention, the second one included"""
    n_embd: int = 768
    """width"""
    n_inner: int | None = None
    """width of the MLP; None = 4 n_embd, as GPT-2; 6 n_embd has the parameters of a second attention"""
    block_size: int = 1024
    """positions in a window, markers included; a whole number of the dataset's chunks"""
    vocab_size: int | None = None
    """rows of the embedding; None = the dataset's tokenizer decides"""
    content_vocab_size: int | None = None
    """ids below this can be predicted, the rest are markers and spare rows; None = the tokenizer decides"""
    second_attention: SecondAttentionName = "meta"
    """after causal attention in every block: attention among the meta-tokens; controls of equal size: a second
    causal attention, or attention among randomly drawn positions (sparsity without tokens); or nothing (GPT-2)"""
    random_fraction: float = setting(0.1, only_with={"second_attention": RANDOM_ATTENTIONS})
    """share of a window's positions that second_attention=random connects, drawn for each window; needs no markers"""
    position: Literal["learned", "rope"] = "learned"
    """a learned table, as GPT-2, or rotary q and k in every attention"""
    meta_position: Literal["same", "none", "none_first", "none_second"] = "same"
    """meta-tokens have the position of their place in the window, as all tokens, or none; with rope also none in the
    first, causal attention alone, or in the second"""
    rope_theta: float = setting(10000.0, only_with={"position": ("rope",)})
    """base of the rotary wavelengths"""
    rope_scaling: Literal["none", "pi", "ntk", "yarn"] = "none"
    """how rotary positions reach beyond the window of training: position interpolation (also of a learned table),
    NTK-aware, or YaRN"""
    rope_factor: float = 1.0
    """block_size over the window of training; with init_from=RUN the model is that run's, and its window grows by so
    much, with rope_scaling=none too"""
    rope_dynamic: bool = False
    """for evaluation: the factor is no more than a text's length asks for, and grows with it"""
    yarn_beta_fast: float = setting(32.0, only_with={"rope_scaling": ("yarn",)})
    """YaRN leaves what turns more often than this in the window of training"""
    yarn_beta_slow: float = setting(1.0, only_with={"rope_scaling": ("yarn",)})
    """YaRN interpolates what turns less often than this"""
    yarn_ramp: Literal["code", "paper"] = setting("code", only_with={"rope_scaling": ("yarn",)})
    """between the two: linear in the number of the pair of dimensions, as YaRN's code, or in its turns, as its paper"""
    yarn_attention_factor: float | None = setting(None, only_with={"rope_scaling": ("yarn",)})
    """what q and k are multiplied by; None = YaRN's 0.1 ln(factor) + 1, and 1.0 = no temperature"""
    dropout: float = 0.0
    """0 for pretraining, as in the paper; above 0 the masks depend on the number of processes and on micro_batch_size,
    so a run repeats exactly only with the same of both"""
    bias: bool = False
    """biases in linear layers and LayerNorms; True is needed for GPT-2's own weights"""

    def __post_init__(self):
        check_types(self)
        for name, most in (("n_layer", 10**4), ("n_head", 10**4), ("n_embd", 2**16), ("block_size", 2**24)):
            check(self, name, 1 <= getattr(self, name) <= most, f"lie in 1 .. {most}")
        check(self, "dropout", 0 <= self.dropout < 1, "lie in [0, 1)")
        check(self, "n_inner", self.n_inner is None or 1 <= self.n_inner <= 2**18, "lie in 1 .. 262144, or be None")
        check(self, "random_fraction", 0 < self.random_fraction <= 1, "lie in (0, 1]")
        if self.second.markers == "refused" and self.meta_position != "same":
            raise UserError(
                f"meta_position={self.meta_position} needs meta-tokens, and second_attention={self.second_attention} "
                f"runs without: leave one out."
            )
        check(self, "rope_theta", self.rope_theta > 1, "be above 1")
        check(self, "rope_factor", 1 <= self.rope_factor <= 2**16, "lie in 1 .. 65536")
        check(self, "yarn_beta_slow", 0 < self.yarn_beta_slow < self.yarn_beta_fast, "lie between 0 and yarn_beta_fast")
        factor = self.yarn_attention_factor
        check(self, "yarn_attention_factor", factor is None or factor > 0, "be above 0, or None")
        if self.rope_scaling == "none" and self.rope_dynamic:
            raise UserError(
                "rope_dynamic does nothing with rope_scaling=none: add --rope_scaling=yarn, or leave it out."
            )
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} cannot be split into n_head={self.n_head} heads: take "
                f"n_embd={nearest_multiples(self.n_embd, self.n_head)} or another n_head."
            )
        if self.position == "rope" and (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"position=rope needs an even head size, and n_embd/n_head = {self.n_embd // self.n_head}: "
                f"choose n_embd and n_head so that their ratio is even."
            )
        if self.rope_scaling == "ntk" and self.n_embd // self.n_head == 2:
            raise UserError(
                "rope_scaling=ntk needs heads of more than one pair of dimensions: take rope_scaling=pi, or another "
                "n_head."
            )

    @property
    def second(self) -> SecondAttention:
        """The registry's entry of second_attention."""
        return SECOND_ATTENTIONS[self.second_attention]

    @property
    def original_block_size(self) -> int:
        """The window that the positions were trained in, before it was extended."""
        return round(self.block_size / self.rope_factor)

    def check_position(self) -> None:
        """Raises UserError for a factor that leaves a part of a position, and for settings that a learned table has no
        use for. Not checked at once: a factor may be given alone,
        and the window and the kind of positions come from the run that is extended."""
        allowed = ("pi",) if self.rope_factor != 1 else ("none", "pi")
        if self.position == "learned" and (self.rope_scaling not in allowed or self.rope_dynamic):
            raise UserError(
                f"rope_scaling={self.rope_scaling}{', rope_dynamic' * self.rope_dynamic} by {self.rope_factor:g} needs "
                f"position=rope: a table of learned positions can be interpolated once, with --rope_scaling=pi."
            )
        if self.position == "learned" and self.meta_position not in ("same", "none"):
            raise UserError(
                f"meta_position={self.meta_position} needs position=rope: learned positions are added before any "
                f"attention."
            )
        window = self.block_size / self.rope_factor
        if abs(window - round(window)) > 1e-6 * window:
            raise UserError(
                f"rope_factor={self.rope_factor} does not divide block_size={self.block_size} into a whole window: "
                f"take a factor that does."
            )


@dataclass(frozen=True)
class Rescale(Settings):
    """How a run's positions are read; by default as it was trained."""

    rope_scaling: Literal["none", "pi", "ntk", "yarn"] | None = None
    """stretch the run's window without training: pi (also of a learned table), ntk, yarn; none = read on plainly;
    None = as trained"""
    rope_factor: float = 1.0
    """by so much, from the window before any extension"""
    rope_dynamic: bool = False
    """by no more than a text's length asks for, and the more the longer it gets; exact for every token, and so many
    times as slow"""

    def __post_init__(self):
        check_types(self)
        if self.rope_scaling is None and (self.rope_factor != 1 or self.rope_dynamic):
            given = "rope_dynamic" if self.rope_dynamic else f"rope_factor={self.rope_factor:g}"
            raise UserError(f"{given} needs --rope_scaling: add --rope_scaling=yarn (or pi, ntk, none).")
        if self.rope_scaling not in (None, "none") and self.rope_factor == 1 and not self.rope_dynamic:
            raise UserError(
                f"rope_scaling={self.rope_scaling} by a factor of 1 changes nothing: add --rope_factor=4, or "
                f"--rope_dynamic."
            )
