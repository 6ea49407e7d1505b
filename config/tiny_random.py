"""Trains the control of random_gpt2.py at the size of tiny_meta.py: a second attention among random positions.

python prepare.py --injection=none"""

from dataclasses import replace

from nanometa.config.tiny_gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, second_attention="random"))
