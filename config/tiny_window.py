"""Trains a baseline of compression: a sliding window, and the first four tokens (attention sinks, arXiv 2309.17453)."""

from dataclasses import replace

from nanometa.config import MarkerConfig
from nanometa.config.tiny_gpt2 import config as gpt2

config = replace(
    gpt2,
    markers=MarkerConfig(evict="window", eviction_window=226, sinks=4),
)
