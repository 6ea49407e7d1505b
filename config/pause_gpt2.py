"""Trains with pause tokens (arXiv 2310.02226), 123.6M parameters: the data of meta_gpt2.py, but no second attention.

It shows whether the gain comes from the second attention or from extra positions in which the model can compute."""

from dataclasses import replace

from nanometa.config.meta_gpt2 import config as meta

config = replace(meta, model=replace(meta.model, second_attention="none"))
