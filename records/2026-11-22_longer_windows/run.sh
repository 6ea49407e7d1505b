#!/bin/sh
# Longer windows: extension, tasks at three lengths, and what loses by depth: hours on 2 cores, a job on each.
set -e
export OMP_NUM_THREADS=1
TASKS="python train.py config/tiny_tasks.py --tasks list_recall copying --placements target background --wandb=disabled"
ASK="python eval.py tasks --tasks list_recall --dtype=auto"
DEPTH="python eval.py perplexity --documents --dataset=data/stdlib_uniform_4096plus --markers trained --bucket=128 \
    --dtype=auto --output=depth.jsonl"
LOOK="python probe.py positions --dtype=auto --tasks list_recall copying --placements target background --lengths 128 256"

# the arms of records/2026-11-22_three_arms: window 512 (causal2, without markers: 461), seed 1337
python prepare.py
python prepare.py --injection=none
for arm in meta pause causal2; do python train.py config/tiny_$arm.py --wandb=disabled --run_name=tiny_$arm; done

# extension: 200 steps of 8,192 positions (causal2: of their content)
python prepare.py --min_document_tokens=2048
python prepare.py --min_document_tokens=4096
python prepare.py --min_document_tokens=4096 --injection=none
EXTEND="python train.py config/tiny_extend_8x.py --wandb=disabled"
for how in yarn none pi ntk; do $EXTEND --init_from=out/tiny_meta --rope_scaling=$how --run_name=meta_${how}8; done
$EXTEND --init_from=out/tiny_pause --run_name=pause_yarn8
$EXTEND --init_from=out/tiny_causal2 --dataset=data/stdlib_none_4096plus --block_size=3688 --run_name=causal2_yarn8
python train.py config/tiny_extend_4x.py --wandb=disabled --init_from=out/tiny_meta --run_name=meta_yarn4

# tasks at 128, from there at 512, from there at 1024
learn() { # name, base
    $TASKS --init_from=out/$2 --train_length=128 --max_steps=600 --curriculum_steps=300 --eval_interval=100 --run_name=$1_128
    $TASKS --init_from=out/$1_128 --train_length=512 --max_steps=150 --curriculum_steps=0 --batch_size=16 \
        --micro_batch_size=16 --eval_interval=1000 --run_name=$1_512
    $ASK --run=out/$1_128 --lengths 128 512 --n=200
    $ASK --run=out/$1_128 --lengths 256
    $ASK --run=out/$1_512 --lengths 1024
    $ASK --run=out/$1_512 --lengths 256 512 2048 --n=200
}
further() { # name
    $TASKS --init_from=out/$1_512 --train_length=1024 --max_steps=100 --curriculum_steps=0 --batch_size=16 \
        --micro_batch_size=8 --eval_interval=1000 --run_name=$1_1024
    $ASK --run=out/$1_1024 --placements target --lengths 2048
    $ASK --run=out/$1_1024 --placements background --lengths 2048 --n=200
    $ASK --run=out/$1_1024 --lengths 512 1024 --n=200
    $ASK --run=out/$1_1024 --placements target --lengths 3072 --n=200
}
for name in meta causal2 pause; do learn ${name}_yarn8 ${name}_yarn8; further ${name}_yarn8; done
learn meta_yarn4 meta_yarn4
learn meta_1x tiny_meta
learn causal2_1x tiny_causal2
# with n = 1000, too, and at the end of the window of 4096
for name in meta causal2 pause; do $ASK --run=out/${name}_yarn8_1024 --placements background --lengths 2048; done
for name in meta causal2; do
    for length in 512 1024; do $ASK --run=out/${name}_yarn8_$length --placements target --lengths 4096 --n=200; done
done
python report.py out/meta_1x_* out/meta_yarn4_* out/meta_yarn8_* out/pause_yarn8_* out/causal2_yarn8_* --output=out/report

# loss by depth, before and after extension; and the base, trained as much on the same text in windows of 512
python train.py config/tiny_meta.py --init_from=out/tiny_meta --dataset=data/stdlib_uniform_4096plus --batch_size=16 \
    --micro_batch_size=4 --max_steps=200 --schedule=constant --learning_rate=1e-3 --min_lr=1e-3 --warmup_steps=20 \
    --weight_decay=0 --beta2=0.95 --eval_interval=50 --run_name=meta_short --wandb=disabled
$DEPTH --run=out/tiny_meta --lengths 512 4096
for how in pi ntk yarn; do $DEPTH --run=out/tiny_meta --lengths 4096 --rope_scaling=$how --rope_factor=8; done
for how in none pi ntk yarn; do $DEPTH --run=out/meta_${how}8 --lengths 4096; done
$DEPTH --run=out/meta_short --lengths 512 4096
python plot.py depth.jsonl --output=depth.png

# meta-tokens without a position at inference: meta_128 of records/2026-11-22_three_arms, and a run with learned positions;
# and a model whose meta-tokens never had one
$LOOK --run=out/meta_128
apart() { # name, setting
    python train.py config/tiny_meta.py $2 --run_name=tiny_meta_$1 --wandb=disabled
    $TASKS --init_from=out/tiny_meta_$1 --train_length=128 --max_steps=600 --curriculum_steps=300 --eval_interval=100 \
        --run_name=meta_$1_128
}
apart learned --position=learned
$LOOK --run=out/meta_learned_128
apart unplaced --meta_position=none
$ASK --run=out/meta_unplaced_128 --lengths 128 512 --n=200
$ASK --run=out/meta_unplaced_128 --lengths 256
