"""Trains a baseline of compression: a random half of all positions is forgotten at once."""

from dataclasses import replace

from nanometa.config import MarkerConfig
from nanometa.config.tiny_gpt2 import config as gpt2

config = replace(
    gpt2,
    markers=MarkerConfig(evict="scattered", compression_ratio=(0.5,)),
)
