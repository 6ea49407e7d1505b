"""The laptop's twin of meta_gpt2.py: 4 layers of 192 on the embedded dataset (python prepare.py), minutes on 2 cores.

Windows of 512 positions (461 content tokens and 51 meta-tokens), so that tasks of that length fit later."""

from config import GPTConfig, TrainConfig

config = TrainConfig(
    model=GPTConfig(n_layer=4, n_head=3, n_embd=192, block_size=512, second_attention="meta", position="rope"),
    dataset="data/stdlib_uniform",
    batch_size=8,  # 3,688 content tokens a step
    micro_batch_size=8,
    max_steps=700,
    learning_rate=2e-3,  # small models bear more than GPT-2's 6e-4
    min_lr=2e-4,
    warmup_steps=50,
    eval_interval=100,
    eval_windows=64,
    save_interval=100,
    compile=False,  # it would take longer than it saves
)
