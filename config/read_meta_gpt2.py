"""Trains a variant, 151.9M parameters, in which every token attends to the meta-tokens before it.

It uses the data of meta_gpt2.py. There, only meta-tokens read meta-tokens in the second attention; here, ordinary
tokens do so as well. It shows whether meta-tokens help as a memory that other tokens read."""

from dataclasses import replace

from nanometa.config.meta_gpt2 import config as meta

config = replace(meta, model=replace(meta.model, second_attention="read_meta"))
