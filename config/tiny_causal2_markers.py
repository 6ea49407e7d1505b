"""Trains the control of causal2_markers_gpt2.py at the size of tiny_meta.py: a causal second attention, with markers.

python prepare.py"""

from dataclasses import replace

from nanometa.config.tiny_meta import config as meta

config = replace(meta, model=replace(meta.model, second_attention="causal"))
