#!/bin/sh
# Looking inside three arms: about half an hour of probes an arm on one core, after the training of its run.
set -e
export OMP_NUM_THREADS=1
# meta_128, pause_128, causal2_128: as in records/2026-11-22_three_arms/run.sh
for run in meta_128 pause_128 causal2_128; do
    python probe.py positions --run=out/$run --tasks list_recall --placements target background --lengths 128 256
    python probe.py attention --run=out/$run
    python probe.py patching --run=out/$run --placements target none background
    python probe.py residual --run=out/$run --placements target background
    python probe.py rate_distortion --run=out/$run --placements target none background
    python probe.py rate_distortion --run=out/$run --states meta last random mean --targets answer back --back 1 4
    # chosen on planted lookups (--known with the same settings)
    python probe.py rate_distortion --run=out/$run --placements target background --states meta last \
        --z_dim 192 --hidden 512 --gates 8 --learning_rate 0.001
done
python probe.py rate_distortion --known
python probe.py rate_distortion --known --z_dim=192 --hidden=512 --gates=8 --learning_rate=0.001
python report.py out/meta_128 out/pause_128 out/causal2_128 --output=out/report
