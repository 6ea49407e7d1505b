"""Trains the control of pause_gpt2.py at the size of tiny_meta.py: its data with markers, no second attention.

python prepare.py"""

from dataclasses import replace

from nanometa.config.tiny_meta import config as meta

config = replace(meta, model=replace(meta.model, second_attention="none"))
