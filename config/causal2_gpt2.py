"""Trains a control with equally many parameters, 151.9M: its second attention is causal, over all positions.

It uses the data of gpt2.py, without markers, and shows whether the gain of meta_gpt2.py comes from the meta-tokens or
from the additional weights."""

from dataclasses import replace

from nanometa.config.gpt2 import config as gpt2

config = replace(gpt2, model=replace(gpt2.model, second_attention="causal"))
