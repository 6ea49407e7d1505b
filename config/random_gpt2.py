"""The control for sparsity, 151.9M: the layer of meta_gpt2.py among a random tenth of each window's positions.

On the data of gpt2.py, without markers: does the gain come from the meta-tokens or from a sparse second attention?"""

from dataclasses import replace

from nanometa.config.gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, second_attention="random"))
