"""Fine-tunes a run of tiny_meta.py or of its controls on the synthetic tasks, like finetune_tasks.py.

python train.py config/tiny_tasks.py --init_from=out/tiny_meta --train_length=128 --run_name=meta_128"""

from dataclasses import replace

from nanometa.config.finetune_tasks import config as full

config = replace(
    full,
    task=replace(full.task, train_length=128, curriculum_steps=1000),
    batch_size=32,
    micro_batch_size=32,
    max_steps=2000,
    optimizer="muon",
    schedule="wsd",
    learning_rate=3e-3,
    min_lr=1e-4,
    warmup_steps=50,
    beta2=0.99,
    weight_decay=0.05,
    eval_interval=250,
    save_interval=500,
    compile=False,
    n_accelerators=1,  # for --dry_run: the batch is not split
)
