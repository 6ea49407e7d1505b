"""Plain GPT-2, 123.6M parameters, on the same content windows as meta_gpt2.py: 922 positions, no markers.

Prepare its dataset with the command in meta_gpt2.py and --injection=none --name=gpt2_none."""

from dataclasses import replace

from config.meta_gpt2 import config as meta

config = replace(
    meta,
    model=replace(meta.model, block_size=922, second_attention="none"),
    dataset="data/gpt2_none",
)
