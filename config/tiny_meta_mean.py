"""Trains the arm of meta_mean_gpt2.py at the size of tiny_meta.py: ordinary tokens get a mean of values.

python prepare.py"""

from dataclasses import replace

from nanometa.config.tiny_meta import config as meta

config = replace(meta, model=replace(meta.model, second_attention="meta_mean"))
