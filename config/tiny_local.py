"""Trains a baseline of compression: every position reads only the later half of the text before it."""

from dataclasses import replace

from nanometa.config import MarkerConfig
from nanometa.config.tiny_gpt2 import config as gpt2

config = replace(
    gpt2,
    markers=MarkerConfig(evict="local", compression_ratio=(0.5,)),
)
