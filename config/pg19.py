"""Prepares PG-19 (Rae et al., arXiv 1911.05507), long documents: Project Gutenberg's books from before 1919.

python prepare.py config/pg19.py"""

from dataclasses import replace

from nanometa.config.c4 import config as c4

config = replace(c4, recipe="", hf_dataset="emozilla/pg19", hf_config="")
