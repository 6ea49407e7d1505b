"""As extend_4x.py, to eight times the window: 1024 -> 8192 positions.

python train.py config/extend_8x.py --init_from=out/meta_gpt2 --dataset=data/pg19_uniform --run_name=meta_8192"""

from dataclasses import replace

from nanometa.config.extend_4x import config as four

config = replace(four, model=replace(four.model, block_size=8192, rope_factor=8.0), micro_batch_size=1)
