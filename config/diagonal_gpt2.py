"""Trains a control, 151.9M parameters, whose meta-tokens read only themselves in the second attention.

It uses the data of meta_gpt2.py and shows whether the gain of meta_gpt2.py comes from the exchange of information among
meta-tokens or from the weights that process them."""

from dataclasses import replace

from nanometa.config.meta_gpt2 import config as meta

config = replace(meta, model=replace(meta.model, second_attention="diagonal"))
