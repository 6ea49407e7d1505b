"""Prepares OpenWebText (Gokaslan & Cohen, 2019), nanoGPT's corpus of 8 million documents.

If the hub offers it only as a loading script, which `datasets` no longer runs, name a parquet mirror in --hf_dataset.

python prepare.py config/openwebtext.py"""

from dataclasses import replace

from nanometa.config.c4 import config as c4

config = replace(c4, recipe="", hf_dataset="Skylion007/openwebtext", hf_config="")
