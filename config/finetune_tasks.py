"""Fine-tunes a GPT-2-sized run on all four synthetic tasks at once (App. D.1 of the paper: 90,000 texts of each).

python train.py config/finetune_tasks.py --init_from=out/meta_gpt2 --train_length=256 --run_name=meta_256

The model, the tokenizer and the target rule are those of the run. The paper does not state the learning rate, the batch
size or the placements for its controls. Those chosen here are the same for every arm."""

from nanometa.config import TaskConfig, TrainConfig

config = TrainConfig(
    task=TaskConfig(
        tasks=("list_recall", "segment_counting", "parity", "copying"),
        placements=("target", "every", "none", "background"),
        train_length=256,
        questions=4,  # only for list recall
        curriculum_steps=2800,
    ),
    batch_size=64,
    micro_batch_size=8,
    max_steps=5625,  # 360,000 texts: 90,000 of each task
    learning_rate=1e-4,
    min_lr=1e-5,
    warmup_steps=200,
    eval_interval=500,
    save_interval=500,
)
