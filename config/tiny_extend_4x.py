"""Extends the context window of tiny_meta.py or its controls from 512 to 2048 positions.

python prepare.py --min_document_tokens=2048
python train.py config/tiny_extend_4x.py --init_from=out/tiny_meta --run_name=meta_2048"""

from dataclasses import replace

from nanometa.config.extend_4x import config as full
from nanometa.config.tiny_meta import config as meta

config = replace(
    full,
    model=replace(meta.model, block_size=2048, rope_scaling="yarn", rope_factor=4.0),
    dataset="data/stdlib_uniform_2048plus",
    batch_size=4,
    micro_batch_size=1,
    max_steps=200,
    optimizer="muon",
    learning_rate=1e-3,
    min_lr=1e-3,
    eval_windows=16,
    compile=False,
    n_accelerators=1,
)
