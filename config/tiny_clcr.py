"""Trains compression sentinels: random spans of text are forgotten once <|cr|> has read them.

The rules are those of arXiv 2310.08152. Every window draws a ratio of compression, so that one model reads all of them.
A window has the same 461 content tokens as the other tiny configs, and room for the two markers of each span."""

from dataclasses import replace

from nanometa.config import MarkerConfig
from nanometa.config.tiny_sr import config as sr

config = replace(
    sr,
    model=replace(sr.model, block_size=528),
    markers=MarkerConfig(
        marker_place="span",
        marks="clcr",
        closing_reads="segment",
        evict="segment",
        compression_ratio=(0.0, 0.125, 0.25, 0.375, 0.5, 0.7, 0.9),
    ),
)
