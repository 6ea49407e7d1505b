#!/bin/sh
# Three arms, pretrained, taught all tasks at two lengths, and evaluated: hours on 2 cores, two jobs at a time.
set -e
export OMP_NUM_THREADS=1
python prepare.py
python prepare.py --injection=none
printf '%s\n' meta pause causal2 | xargs -P 2 -I{} \
    python train.py config/tiny_{}.py --wandb=disabled --run_name=tiny_{}
printf '%s\n' '256 meta' '256 pause' '256 causal2' '128 meta' '128 pause' '128 causal2' | xargs -P 2 -L 1 sh -c '
    python train.py config/tiny_tasks.py --init_from=out/tiny_$1 --train_length=$0 --max_steps=1500 --wandb=disabled \
        --run_name=$1_$0 &&
    python eval.py tasks --run=out/$1_$0 --dtype=auto'
python report.py out/meta_128 out/meta_256 out/pause_128 out/pause_256 out/causal2_128 out/causal2_256 --output=out/report
