"""The laptop's twin of widemlp_gpt2.py: the parameters of tiny_meta.py in an MLP of 6 instead of 4 widths.

python prepare.py --injection=none"""

from dataclasses import replace

from nanometa.config.tiny_gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, n_inner=6 * gpt2.model.n_embd))
