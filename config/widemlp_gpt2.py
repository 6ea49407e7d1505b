"""The widened MLP, 151.9M: 12 C^2 weights a block, the 8 C^2 of GPT-2's and the 4 C^2 of a second attention.

On the data of gpt2.py, without markers: does the gain come from the attention or from the weights?"""

from dataclasses import replace

from nanometa.config.gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, n_inner=6 * gpt2.model.n_embd))
