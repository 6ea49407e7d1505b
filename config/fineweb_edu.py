"""Prepares the 10-billion-token sample of FineWeb-Edu (Penedo et al., arXiv 2406.17557).

With --hf_config=default, it prepares the whole corpus.

python prepare.py config/fineweb_edu.py"""

from dataclasses import replace

from nanometa.config.c4 import config as c4

config = replace(c4, recipe="", hf_dataset="HuggingFaceFW/fineweb-edu", hf_config="sample-10BT")
