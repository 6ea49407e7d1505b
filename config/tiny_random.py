"""The laptop's twin of random_gpt2.py: the layer of tiny_meta.py among a random tenth of the positions.

python prepare.py --injection=none"""

from dataclasses import replace

from nanometa.config.tiny_gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, second_attention="random"))
