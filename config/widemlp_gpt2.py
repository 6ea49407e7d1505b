"""Trains a control with equally many parameters, 151.9M, in a wider MLP instead of a second attention.

The MLP has 12 C^2 weights per block: GPT-2's 8 C^2, and the 4 C^2 of a second attention (C = n_embd). It uses the data
of gpt2.py, without markers, and shows whether the gain comes from the second attention or from additional weights."""

from dataclasses import replace

from nanometa.config.gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, n_inner=6 * gpt2.model.n_embd))
