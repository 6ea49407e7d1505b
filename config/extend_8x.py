"""Extends the context window of a GPT-2-sized run from 1024 to 8192 positions, like extend_4x.py.

python train.py config/extend_8x.py --init_from=out/meta_gpt2 --dataset=data/pg19_uniform --run_name=meta_8192"""

from dataclasses import replace

from nanometa.config.extend_4x import config as four

config = replace(four, model=replace(four.model, block_size=8192, rope_factor=8.0), micro_batch_size=1)
