"""Trains a control, 151.9M parameters, in which every ordinary token gets the mean of the values so far.

It uses the data of meta_gpt2.py. Meta-tokens attend among themselves as there; all other positions get the mean of the
values up to theirs, which a dense implementation with masks of -1e9 instead of -inf computes. It shows whether a gain
could come from such masks, since a mean of past values can count."""

from dataclasses import replace

from nanometa.config.meta_gpt2 import config as meta

config = replace(meta, model=replace(meta.model, second_attention="meta_mean"))
