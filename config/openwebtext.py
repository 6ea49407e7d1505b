"""OpenWebText, nanoGPT's corpus (Gokaslan & Cohen, 2019): 8 million documents.

Where the hub has it as a loading script still, which `datasets` no longer runs, --hf_dataset names a mirror in parquet.

python prepare.py config/openwebtext.py"""

from dataclasses import replace

from nanometa.config.c4 import config as c4

config = replace(c4, recipe="", hf_dataset="Skylion007/openwebtext", hf_config="")
