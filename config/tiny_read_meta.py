"""Trains the arm of read_meta_gpt2.py at the size of tiny_meta.py: every token reads the meta-tokens.

python prepare.py"""

from dataclasses import replace

from nanometa.config.tiny_meta import config as meta

config = replace(meta, model=replace(meta.model, second_attention="read_meta"))
