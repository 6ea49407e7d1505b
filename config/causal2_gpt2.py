"""The control with equal parameters, 151.9M: a second causal attention where meta_gpt2.py has meta-attention.

On the data of gpt2.py, without markers: does the gain come from the meta-tokens or from the weights?"""

from dataclasses import replace

from nanometa.config.gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, second_attention="causal"))
