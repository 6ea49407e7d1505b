"""Trains the control of diagonal_gpt2.py at the size of tiny_meta.py: each meta-token reads only itself.

python prepare.py"""

from dataclasses import replace

from nanometa.config.tiny_meta import config as meta

config = replace(meta, model=replace(meta.model, second_attention="diagonal"))
