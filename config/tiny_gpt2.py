"""Trains the baseline of gpt2.py at the size of tiny_meta.py: no markers, no second attention, the same content.

python prepare.py --injection=none"""

from dataclasses import replace

from nanometa.config.tiny_meta import config as meta

config = replace(
    meta,
    model=replace(meta.model, block_size=461, second_attention="none"),
    dataset="data/stdlib_none",
)
