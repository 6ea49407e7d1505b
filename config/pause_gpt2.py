"""Pause tokens (arXiv 2310.02226), 123.6M: the data of meta_gpt2.py, markers included, and no second attention.

Does the gain come from the second attention or from positions without text, where a model can compute?"""

from dataclasses import replace

from nanometa.config.meta_gpt2 import config as meta

config = replace(meta, model=replace(meta.model, second_attention="none"))
