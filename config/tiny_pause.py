"""The laptop's twin of pause_gpt2.py: the data of tiny_meta.py, markers included, without its second attention.

python prepare.py"""

from dataclasses import replace

from nanometa.config.tiny_meta import config as meta

config = replace(meta, model=replace(meta.model, second_attention="none"))
