"""Trains the control of causal2_gpt2.py at the size of tiny_meta.py: equal parameters, no markers.

python prepare.py --injection=none"""

from dataclasses import replace

from nanometa.config.tiny_gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, second_attention="causal"))
