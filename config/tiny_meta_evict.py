"""Trains tiny_meta.py with a cache that keeps meta-tokens alone: text is forgotten behind the next meta-token."""

from dataclasses import replace

from nanometa.config import MarkerConfig
from nanometa.config.tiny_meta import config as meta

config = replace(
    meta,
    markers=MarkerConfig(evict="segment"),
)
