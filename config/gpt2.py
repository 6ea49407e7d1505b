"""Trains plain GPT-2, 123.6M parameters, on the same content as meta_gpt2.py: windows of 922 positions, no markers.

python prepare.py config/c4.py --injection=none"""

from dataclasses import replace

from nanometa.config.meta_gpt2 import config as meta

config = replace(
    meta,
    model=replace(meta.model, block_size=922, second_attention="none"),
    dataset="data/c4_none",
)
