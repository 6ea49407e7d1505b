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
