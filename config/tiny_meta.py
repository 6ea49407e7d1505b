"""Trains a small model with meta-attention on a laptop, within minutes on 2 cores: 4 layers, 192 wide.

Its dataset is Python's standard library (python prepare.py). A window has 512 positions (461 content tokens and 51
meta-tokens), so that task texts of that length fit later. LOG.md has the experiments behind the choice of optimizer,
schedule, learning rate, rotary positions, batch size and beta2."""

from nanometa.config import GPTConfig, TrainConfig

config = TrainConfig(
    model=GPTConfig(n_layer=4, n_head=3, n_embd=192, block_size=512, second_attention="meta", position="rope"),
    dataset="data/stdlib_uniform",
    batch_size=4,  # 1,844 content tokens: with little data, many noisy steps beat few precise ones
    micro_batch_size=4,
    max_steps=1400,
    optimizer="muon",  # 0.13 bits per byte better than AdamW here (LOG.md)
    schedule="wsd",  # 0.06 bits per byte better than cosine, with either optimizer
    learning_rate=6e-3,  # small models tolerate more than GPT-2's 6e-4
    min_lr=1e-4,
    warmup_steps=100,
    beta2=0.99,  # small batches have noisy gradients; AdamW still updates the embeddings and norms
    weight_decay=0.05,
    eval_interval=200,
    eval_windows=64,
    save_interval=200,
    compile=False,  # compiling would take longer than it saves
    n_accelerators=1,  # for --dry_run: a batch of 4 cannot use more
)
