"""Measures the time and memory of a training step by window length and share of meta-tokens, next to its FLOPs."""

from nanometa.benches.timing import Contestant, contest, quartiles, say
from nanometa.benches.training import Step, training_step
from nanometa.training.estimate import flops_per_window

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
POSITIONS = 16384  # per step, for all lengths
# (arm, share of meta-tokens); "dense" computes "meta" under masks over all rows, as in the paper
ARMS = (("none", 0.0), ("meta", 0.1), ("meta", 0.2), ("dense", 0.1))
DENSE_AT_MOST = 4096  # with longer windows, the masks and scores of "dense" would take most of an hour


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Measures models of 6 layers of width 384 in bf16 and eager mode, each in a fresh process.

    The vocabulary is small, so that the head does not dominate. The column "s at the matmul peak" has the seconds of a
    step if all FLOPs ran at the speed of a matrix product."""
    rows = []
    for T in LENGTHS:
        for arm, share in ARMS:
            if arm == "dense" and T > DENSE_AT_MOST:
                continue
            shape = (6, 6, 384, T, POSITIONS // T)
            step = Step(arm, "bf16", False, shape, round(share * T), vocabulary=(4160, 4096))
            times, peaks_of = contest({arm: Contestant(training_step, step)}, args.repeats)
            low, middle, high = quartiles(times[arm])
            flops = flops_per_window(step.config(), step.markers) * (POSITIONS // T)
            row = {"T": T, "who": arm, "markers": share, "s a step": middle, "quartiles": f"{low:.2f} .. {high:.2f}"}
            row |= {"peak GB": peaks_of[arm] / 1e9, "TFLOP": flops / 1e12}
            if "bf16" in peaks:
                row["s at the matmul peak"] = flops / peaks["bf16"]
            rows.append(row)
            say(row)
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns an empty list, because the table already shows everything that this section measures."""
    return []
