"""Defines MarkerConfig: where markers are placed while text is read, and what later positions may read."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from nanometa.common.errors import UserError
from nanometa.config.checks import check, check_types
from nanometa.config.settings import Settings, setting

# the places that end a segment of text, and the rules by which positions are forgotten; data/markers.py has both
DRAWN_PLACES = ("sentence", "newline", "random", "span")
Place = Literal["stored", "sentence", "newline", "random", "span"]
Evict = Literal["nothing", "segment", "local", "scattered", "window"]
SHARES = ("local", "scattered")  # these forget a share of all positions, without segments


class Hides(NamedTuple):
    """What the texts of a run can hide from a position, whatever their words."""

    before: bool  # whether some positions do not read from place 0
    after: bool  # whether some positions are not read for ever


@dataclass(frozen=True)
class MarkerConfig(Settings):
    """Markers that are placed while text is read, and what later positions may read (docs/sentinels.md).

    By default the markers are those of the dataset, and every position reads all positions before it."""

    marker_place: Place = "stored"
    """where a marker closes a segment of text. stored: where the dataset has its meta-tokens; sentence: after every
    sentence; newline: after every line; random: at random places; span: after random spans that are to be compressed.
    All but stored need a dataset without markers"""
    marks: Literal["sr", "meta", "clcr", "none"] = setting("sr", only_with={"marker_place": DRAWN_PLACES})
    """the markers that close a segment. sr: <|sr|>; meta: <|meta|>; clcr: <|cl|> and then <|cr|>; none: no marker, for
    spans that are forgotten without a summary"""
    closing_reads: Literal["all", "segment"] = "all"
    """what a closing marker reads: all positions before it, or only the segment that it closes"""
    evict: Evict = "nothing"
    """what is forgotten. segment: the text of a segment, once its marker has read it; local: for every position, the
    earliest share compression_ratio of those before it; scattered: a random share compression_ratio of all positions;
    window: all but the last eviction_window positions and the first sinks"""
    evict_delay: int = setting(0, only_with={"evict": ("segment",)})
    """number of further segments that must be closed before the text of a segment is forgotten"""
    sinks: int = setting(0, only_with={"evict": ("segment", "window")})
    """number of first content tokens that are never forgotten"""
    eviction_window: int = setting(64, only_with={"evict": ("window",)})
    """number of recent positions that evict=window keeps, the reading one included"""
    compression_ratio: tuple[float, ...] = setting((0.5,), only_with={"marker_place": ("span",), "evict": SHARES})
    """share of the content tokens of a window that is saved: with marker_place=span, a span of n tokens leaves one
    marker, and saves n - 1. With several ratios, the spans of every window draw one"""
    max_span: int = setting(25, only_with={"marker_place": ("span",)})
    """largest number of tokens in a span; the smallest is 2"""
    chunk_sentences: int = setting(1, only_with={"marker_place": ("sentence",)})
    """number of sentences in a segment"""
    sentence_tokens: int = setting(4, only_with={"marker_place": ("sentence",)})
    """least number of tokens in a sentence; a shorter one is joined to the next, unless its document ends"""
    random_marks: int = setting(33, only_with={"marker_place": ("random",)})
    """number of segments that marker_place=random closes in the content of a window"""

    def __post_init__(self):
        check_types(self)
        for name, least in (("evict_delay", 0), ("sinks", 0), ("eviction_window", 1), ("max_span", 2)):
            check(self, name, least <= getattr(self, name) <= 2**20, f"lie in {least} .. 1048576")
        for name in ("chunk_sentences", "sentence_tokens", "random_marks"):
            check(self, name, 1 <= getattr(self, name) <= 2**20, "lie in 1 .. 1048576")
        ratios = self.compression_ratio
        check(self, "compression_ratio", ratios, "have one value at least")
        check(self, "compression_ratio", all(0 <= ratio < 1 for ratio in ratios), "lie in [0, 1)")
        check(self, "compression_ratio", len(set(ratios)) == len(ratios), "name each ratio once")
        if self.evict in SHARES and len(ratios) > 1:
            raise UserError(
                f"compression_ratio={' '.join(map(str, ratios))} has several values, but evict={self.evict} has one "
                f"ratio for all texts: give one."
            )
        if self.marker_place == "stored" and self.evict in SHARES + ("window",) and self.closing_reads == "segment":
            raise UserError(
                f"closing_reads=segment and evict={self.evict} both limit what a marker reads: give one of them."
            )
        if self.places_markers and self.evict not in ("nothing", "segment"):
            raise UserError(
                f"evict={self.evict} has no segments, but marker_place={self.marker_place} closes some: use "
                f"evict=segment, or leave marker_place out."
            )
        if not self.closes and self.places_markers and self.closing_reads == "segment":
            raise UserError("closing_reads=segment has no effect, because marks=none has no closing marker.")
        if self.places_markers and not self.closes and (self.evict != "segment" or self.marker_place != "span"):
            raise UserError(
                f"marks=none with marker_place={self.marker_place} and evict={self.evict} changes nothing: it is the "
                f"control that forgets spans without a summary, so use marker_place=span and evict=segment."
            )
        if not self.closes and self.evict_delay:
            raise UserError(
                f"evict_delay={self.evict_delay} counts closing markers, and marks=none has none: leave it out."
            )

    @property
    def places_markers(self) -> bool:
        """Whether segments are found in the text of a dataset without markers, instead of stored there."""
        return self.marker_place != "stored"

    @property
    def closes(self) -> bool:
        """Whether a marker follows each segment, if there are segments at all."""
        return not self.places_markers or self.marks != "none"

    @property
    def has_ratio(self) -> bool:
        """Whether compression_ratio has an effect."""
        return self.marker_place == "span" or self.evict in SHARES

    @property
    def is_random(self) -> bool:
        """Whether the places of markers, or what is forgotten, are drawn at random."""
        return self.marker_place in ("random", "span") or self.evict == "scattered"

    @property
    def hides(self) -> Hides:
        """What the texts of a run can hide."""
        before = self.closing_reads == "segment"
        # two markers have overlapping segments, which attention without a mask (layers/visibility.py) does not allow
        pair = before and self.places_markers and self.marks == "clcr"
        return Hides(before, after=pair or self.evict != "nothing")

    @property
    def restricts(self) -> bool:
        """Whether anything is hidden at all."""
        return any(self.hides)

    @property
    def label(self) -> str:
        """The short name of the scheme in JSON lines, reports and figures; "" if it changes nothing."""
        if self.evict in SHARES:
            return f"{self.evict} {self.compression_ratio[0]:g}"
        if self.evict == "window":
            return f"window {self.eviction_window}" + (f" + {self.sinks} sinks" if self.sinks else "")
        parts = []
        if self.places_markers:
            parts += [self.marks if self.closes else "drop", self.marker_place]
            if self.marker_place == "sentence" and self.chunk_sentences > 1:
                parts.append(f"x {self.chunk_sentences}")
            if self.marker_place == "span":
                parts.append("/".join(f"{ratio:g}" for ratio in self.compression_ratio))
        if self.closing_reads == "segment":
            parts.append("own segment")
        if self.evict == "segment" and self.closes:
            parts.append("evict" + (f" after {self.evict_delay}" if self.evict_delay else ""))
            parts += [f"{self.sinks} sinks"] if self.sinks else []
        return " ".join(parts)
