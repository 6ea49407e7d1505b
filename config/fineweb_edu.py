"""FineWeb-Edu's sample of 10 billion tokens (Penedo et al., arXiv 2406.17557); --hf_config=default is all of it.

python prepare.py config/fineweb_edu.py"""

from dataclasses import replace

from nanometa.config.c4 import config as c4

config = replace(c4, recipe="", hf_dataset="HuggingFaceFW/fineweb-edu", hf_config="sample-10BT")
