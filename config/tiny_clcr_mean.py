"""Trains the control of tiny_clcr.py in which the mean of a span's keys and values takes the place of its summary."""

from dataclasses import replace

from nanometa.config.tiny_clcr import config as clcr

config = replace(
    clcr,
    model=replace(clcr.model, summary="mean"),
)
