"""Trains tiny_meta's model with a sentence sentinel: <|sr|> after every sentence, which reads that sentence alone.

The rules are those of arXiv 2406.10985. A window has the 461 content tokens of the other tiny configs, and room for
51 sentinels."""

from dataclasses import replace

from nanometa.config import MarkerConfig
from nanometa.config.tiny_pause import config as pause

config = replace(
    pause,
    model=replace(pause.model, meta_position="previous"),
    dataset="data/stdlib_none",
    target_rule="skip",
    markers=MarkerConfig(marker_place="sentence", marks="sr", closing_reads="segment"),
)
