"""Trains the control for sparsity, 151.9M parameters: the second attention connects a random tenth of the positions.

It uses the data of gpt2.py, without markers, and shows whether the gain of meta_gpt2.py comes from the meta-tokens or
from a sparse second attention."""

from dataclasses import replace

from nanometa.config.gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, second_attention="random"))
