"""Trains a control, 151.9M parameters, with meta-tokens in the data and a second attention that is causal over all
positions.

It uses the data of meta_gpt2.py and differs from it only in the mask of the second attention, so it shows whether the
gain of meta_gpt2.py comes from the mask."""

from dataclasses import replace

from nanometa.config.meta_gpt2 import config as meta

config = replace(meta, model=replace(meta.model, second_attention="causal"))
