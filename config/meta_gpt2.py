"""Trains GPT-2 with meta-attention by the paper's recipe (arXiv 2509.16278, appendix B).

The model has 151.9M parameters and sees 98B positions.

    python train.py config/meta_gpt2.py --dry_run       # estimates time and cost, without data or GPU
    python prepare.py config/c4.py
    torchrun --standalone --nproc_per_node=8 train.py config/meta_gpt2.py
The paper trains with learned and with rotary positions. For rotary ones, add --position=rope.
"""

from nanometa.config import GPTConfig, TrainConfig

config = TrainConfig(
    model=GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, second_attention="meta", position="learned"),
    dataset="data/c4_uniform",
    batch_size=480,  # windows: 491,520 positions, 442,560 content tokens
    micro_batch_size=12,
    max_steps=200_000,
    learning_rate=6e-4,
    min_lr=6e-5,
    warmup_steps=2000,
    eval_interval=1000,
    eval_windows=480,
    save_interval=1000,
)
