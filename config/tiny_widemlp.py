"""Trains the control of widemlp_gpt2.py at the size of tiny_meta.py: equal parameters in an MLP of 6 n_embd.

python prepare.py --injection=none"""

from dataclasses import replace

from nanometa.config.tiny_gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, n_inner=6 * gpt2.model.n_embd))
