"""Looks into a trained run.

python probe.py positions --run=out/recall --lengths 128 256         # meta-tokens without position, without embedding
python probe.py attention --run=out/recall                           # logit boost and entropy drop of every head
"""

from cli import run_cli, run_named
from probes import attention, positions

PROBES = {
    "positions": (positions.PositionsProbe, positions.main),
    "attention": (attention.AttentionProbe, attention.main),
}


def main(argv: list[str]) -> None:
    run_named(argv, PROBES, "probe", __doc__)


if __name__ == "__main__":
    run_cli(main)
