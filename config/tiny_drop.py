"""Trains the control of tiny_clcr.py in which the spans are forgotten without a summary."""

from dataclasses import replace

from nanometa.config.tiny_clcr import config as clcr

config = replace(
    clcr,
    markers=replace(clcr.markers, marks="none", closing_reads="all"),
    model=replace(clcr.model, block_size=461, meta_position="same"),
    target_rule="ignore",
)
