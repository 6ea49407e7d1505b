"""A run of GPT-2's size at four times its window: 1024 -> 4096 positions, with YaRN (arXiv 2309.00071).

python train.py config/extend_4x.py --init_from=out/meta_gpt2 --dataset=data/pg19_uniform --run_name=meta_4096

Model and target rule are the run's, which must have rotary positions (a learned table is interpolated with
--rope_scaling=pi, without this file). The paper of meta-tokens (App. C) gives the factors, and not how long it
trained. Steps, warm-up, batch and weight decay are those of YaRN's paper; its rate, 2e-5, was for 7 billion parameters:
ours is higher, and was not tuned. Documents must be as long as the window: python prepare.py --min_document_tokens
leaves out those that are not."""

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
