"""Trains tiny_sr.py with meta-attention among the sentinels, so that each one also reads the earlier ones."""

from dataclasses import replace

from nanometa.config.tiny_sr import config as sr

config = replace(
    sr,
    model=replace(sr.model, second_attention="meta"),
)
