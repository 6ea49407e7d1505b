"""The laptop's twin of meta_gpt2.py: 4 layers of 192 on the embedded dataset (python prepare.py), minutes on 2 cores.

Windows of 512 positions (461 content tokens and 51 meta-tokens), so that tasks of that length fit later.
LOG.md has the trials behind optimizer, schedule, rate, rotary positions, batch and beta2."""

from nanometa.config import GPTConfig, TrainConfig

config = TrainConfig(
    model=GPTConfig(n_layer=4, n_head=3, n_embd=192, block_size=512, second_attention="meta", position="rope"),
    dataset="data/stdlib_uniform",
    batch_size=4,  # 1,844 content tokens a step: with so few tokens in all, steps count more than their noise
    micro_batch_size=4,
    max_steps=1400,
    optimizer="muon",  # 0.13 bits per byte better than AdamW here (LOG.md)
    schedule="wsd",  # 0.06 better than cosine, with either
    learning_rate=6e-3,  # small models bear more than GPT-2's 6e-4
    min_lr=1e-4,
    warmup_steps=100,
    beta2=0.99,  # small batches have noisy gradients; AdamW still has embeddings and norms
    weight_decay=0.05,
    eval_interval=200,
    eval_windows=64,
    save_interval=200,
    compile=False,  # it would take longer than it saves
    n_accelerators=1,  # for --dry_run: there is nothing in a batch of 4 to spread
)
