"""Extends the context window of a GPT-2-sized run from 1024 to 4096 positions, with YaRN (arXiv 2309.00071).

python train.py config/extend_4x.py --init_from=out/meta_gpt2 --dataset=data/pg19_uniform --run_name=meta_4096

The model and the target rule are those of the run, which must have rotary positions. For learned positions, use
--rope_scaling=pi without this file. The paper on meta-tokens (App. C) gives the factors, but not how long it trained.
Steps, warm-up, batch size and weight decay are those of the YaRN paper. Its learning rate of 2e-5 was for 7 billion
parameters; the one here is higher and was not tuned. Documents must be as long as the window: the setting
--min_document_tokens of prepare.py leaves out shorter ones."""

from nanometa.config import GPTConfig, TrainConfig

config = TrainConfig(
    model=GPTConfig(block_size=4096, position="rope", rope_scaling="yarn", rope_factor=4.0),
    dataset="data/pg19_uniform",
    batch_size=64,
    micro_batch_size=2,
    max_steps=400,
    schedule="constant",
    learning_rate=1e-4,
    min_lr=1e-4,
    warmup_steps=20,
    weight_decay=0.0,
    eval_interval=50,
    eval_windows=64,
    save_interval=100,
)
