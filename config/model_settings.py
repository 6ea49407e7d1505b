"""Defines GPTConfig, the settings of the model, and Rescale, which extends the window of a trained model."""

from dataclasses import dataclass
from typing import Literal

from nanometa.common.errors import UserError
from nanometa.config.arms import SECOND_ATTENTIONS, SecondAttention, SecondAttentionName, arm_label
from nanometa.config.checks import check, check_types, nearest_multiples
from nanometa.config.settings import Settings, setting

RANDOM_ATTENTIONS = tuple(name for name, second in SECOND_ATTENTIONS.items() if second.connects == "random")


@dataclass(frozen=True)
class GPTConfig(Settings):
    """The model. The defaults are GPT-2 124M with meta-attention (151.9M parameters)."""

    n_layer: int = 12
    """number of blocks"""
    n_head: int = 12
    """number of heads in each attention, also in the second one"""
    n_embd: int = 768
    """embedding size, the width of the model"""
    block_size: int = 1024
    """context window: positions per window, including markers; must be a multiple of the dataset's chunk size"""
    second_attention: SecondAttentionName = "meta"
    """what the second attention of every block connects. meta: the meta-tokens (the paper's meta-attention); none: no
    second attention (GPT-2). Controls with equally many parameters: diagonal, each meta-token with itself only;
    meta_mean, the meta-tokens, and all other tokens get the mean of the values so far; read_meta, every token with the
    meta-tokens before it; causal, all positions; random, randomly drawn positions"""
    position: Literal["learned", "rope"] = "learned"
    """positional encoding. learned: a table, as in GPT-2; rope: rotary embedding of q and k in every attention"""
    n_inner: int | None = None
    """hidden size of the MLP; None = 4 n_embd, as in GPT-2; 6 n_embd adds as many parameters as a second attention"""
    dropout: float = 0.0
    """dropout rate; the paper pretrains with 0. Above 0, a run repeats exactly only with the same number of processes
    and the same micro_batch_size, because the dropout masks depend on both"""
    bias: bool = False
    """use biases in linear layers and LayerNorms; OpenAI's GPT-2 weights need True"""
    random_fraction: float = setting(0.1, only_with={"second_attention": RANDOM_ATTENTIONS})
    """for second_attention=random: share of the window's positions to connect, drawn anew for each window; the dataset
    must not contain markers"""
    meta_position: Literal["same", "previous", "none", "none_first", "none_second"] = "same"
    """positional encoding of markers. same: that of their place in the window, as for all tokens; previous: that of the
    content token before them, so that positions count content tokens alone; none: no encoding; none_first, none_second
    (with rope): none in the first, causal attention only, or in the second only"""
    summary: Literal["learned", "mean"] = setting("learned", only_with={"marks": ("clcr",)})
    """what later positions read of a span behind <|cr|>. learned: the keys and values of <|cr|>; mean: in every
    attention over all positions, the mean of the keys and values of the span, which needs no training"""
    vocab_size: int | None = None
    """rows of the embedding; None = set by the dataset's tokenizer"""
    content_vocab_size: int | None = None
    """number of ids that the model can predict; higher ids are markers and unused rows; None = set by the tokenizer"""

    # longer context windows
    rope_theta: float = setting(10000.0, only_with={"position": ("rope",)})
    """base of the rotary frequencies"""
    rope_scaling: Literal["none", "pi", "ntk", "yarn"] = "none"
    """how to extend positions beyond the trained window. pi: position interpolation (also for learned positions); ntk:
    NTK-aware scaling; yarn: YaRN; none: no scaling"""
    rope_factor: float = 1.0
    """block_size divided by the originally trained window; with init_from=RUN, the window of that run grows by this
    factor, also with rope_scaling=none"""
    rope_dynamic: bool = False
    """for evaluation: use the smallest factor that the length of the text needs, growing with the text"""
    yarn_beta_fast: float = setting(32.0, only_with={"rope_scaling": ("yarn",)})
    """YaRN does not interpolate dimensions that rotate more than this many times within the trained window"""
    yarn_beta_slow: float = setting(1.0, only_with={"rope_scaling": ("yarn",)})
    """YaRN fully interpolates dimensions that rotate fewer than this many times within the trained window"""
    yarn_ramp: Literal["code", "paper"] = setting("code", only_with={"rope_scaling": ("yarn",)})
    """interpolation between yarn_beta_fast and yarn_beta_slow. code: linear in the dimension pair's index, as in YaRN's
    code; paper: linear in its number of rotations, as in YaRN's paper"""
    yarn_attention_factor: float | None = setting(None, only_with={"rope_scaling": ("yarn",)})
    """factor that multiplies both q and k; None = YaRN's 0.1 ln(rope_factor) + 1; 1.0 = no change of temperature"""

    def __post_init__(self):
        check_types(self)
        for name, most in (("n_layer", 10**4), ("n_head", 10**4), ("n_embd", 2**16), ("block_size", 2**24)):
            check(self, name, 1 <= getattr(self, name) <= most, f"lie in 1 .. {most}")
        check(self, "dropout", 0 <= self.dropout < 1, "lie in [0, 1)")
        check(self, "n_inner", self.n_inner is None or 1 <= self.n_inner <= 2**18, "lie in 1 .. 262144, or be None")
        check(self, "random_fraction", 0 < self.random_fraction <= 1, "lie in (0, 1]")
        if self.second.markers == "refused" and self.meta_position != "same":
            raise UserError(
                f"meta_position={self.meta_position} needs meta-tokens, but second_attention={self.second_attention} "
                f"has none: leave one of them out."
            )
        check(self, "rope_theta", self.rope_theta > 1, "be above 1")
        check(self, "rope_factor", 1 <= self.rope_factor <= 2**16, "lie in 1 .. 65536")
        check(self, "yarn_beta_slow", 0 < self.yarn_beta_slow < self.yarn_beta_fast, "lie between 0 and yarn_beta_fast")
        factor = self.yarn_attention_factor
        check(self, "yarn_attention_factor", factor is None or factor > 0, "be above 0, or None")
        if self.rope_scaling == "none" and self.rope_dynamic:
            raise UserError(
                "rope_dynamic has no effect with rope_scaling=none: add --rope_scaling=yarn, or leave rope_dynamic out."
            )
        possible = nearest_multiples(self.n_embd, self.n_head * (2 if self.position == "rope" else 1))
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} cannot be split into n_head={self.n_head} heads: use n_embd={possible} or "
                f"another n_head."
            )
        if self.position == "rope" and (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"position=rope needs an even head size, but n_embd/n_head = {self.n_embd // self.n_head}: use "
                f"n_embd={possible} or another n_head."
            )
        if self.rope_scaling == "ntk" and self.n_embd // self.n_head == 2:
            raise UserError(
                "rope_scaling=ntk needs heads of more than one pair of dimensions, but n_embd/n_head = 2: use "
                "rope_scaling=pi or a smaller n_head."
            )

    @property
    def second(self) -> SecondAttention:
        """The entry of second_attention in the registry of arms."""
        return SECOND_ATTENTIONS[self.second_attention]

    def arm_name(self, has_markers: bool) -> str:
        """Returns the short name of the arm (see arm_label); has_markers: whether its dataset has markers."""
        return arm_label(self.second, self.n_inner not in (None, 4 * self.n_embd), has_markers)

    @property
    def original_block_size(self) -> int:
        """The context window that the positions were originally trained in, before any extension."""
        return round(self.block_size / self.rope_factor)

    def check_position(self) -> None:
        """Checks the settings of positions against each other.

        Raises UserError if rope_factor does not divide block_size, or if learned positions do not support a setting.
        __post_init__ cannot check this, because block_size and position may come from the run that is extended."""
        allowed = ("pi",) if self.rope_factor != 1 else ("none", "pi")
        if self.position == "learned" and (self.rope_scaling not in allowed or self.rope_dynamic):
            raise UserError(
                f"rope_scaling={self.rope_scaling}{', rope_dynamic' * self.rope_dynamic} by {self.rope_factor:g} needs "
                f"position=rope: learned positions can only be interpolated once, with --rope_scaling=pi."
            )
        if self.position == "learned" and self.meta_position in ("none_first", "none_second"):
            raise UserError(
                f"meta_position={self.meta_position} needs position=rope, because learned positions are added before "
                f"any attention: use --position=rope, or leave meta_position out."
            )
        window = self.block_size / self.rope_factor
        if abs(window - round(window)) > 1e-6 * window:
            raise UserError(
                f"rope_factor={self.rope_factor} does not divide block_size={self.block_size} into a whole window: "
                f"choose a factor that does."
            )


@dataclass(frozen=True)
class Rescale(Settings):
    """Extends the context window of a trained run without more training. By default nothing is changed."""

    rope_scaling: Literal["none", "pi", "ntk", "yarn"] | None = None
    """how to extend the positions. pi: position interpolation (also for learned positions); ntk: NTK-aware scaling;
    yarn: YaRN; none: a longer window without scaling; None = as trained"""
    rope_factor: float = 1.0
    """factor by which the window grows, relative to the window before any extension"""
    rope_dynamic: bool = False
    """use the smallest factor that the length of the text needs, growing with the text; exact for every token, and
    therefore many times slower"""

    def __post_init__(self):
        check_types(self)
        if self.rope_scaling is None and (self.rope_factor != 1 or self.rope_dynamic):
            given = "rope_dynamic" if self.rope_dynamic else f"rope_factor={self.rope_factor:g}"
            raise UserError(f"{given} needs --rope_scaling: add --rope_scaling=yarn (or pi, ntk, none).")
        if self.rope_scaling not in (None, "none") and self.rope_factor == 1 and not self.rope_dynamic:
            raise UserError(
                f"rope_scaling={self.rope_scaling} by a factor of 1 changes nothing: add --rope_factor=4 or "
                f"--rope_dynamic."
            )
