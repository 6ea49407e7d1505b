"""Extends the context window of tiny_meta.py or its controls from 512 to 4096 positions.

python prepare.py --min_document_tokens=4096
python train.py config/tiny_extend_8x.py --init_from=out/tiny_meta --run_name=meta_4096"""

from dataclasses import replace

from nanometa.config.tiny_extend_4x import config as four

config = replace(
    four,
    model=replace(four.model, block_size=4096, rope_factor=8.0),
    dataset="data/stdlib_uniform_4096plus",
    batch_size=2,
)
