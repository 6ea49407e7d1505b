"""Looks into a trained run.

python probe.py positions --run=out/recall --lengths 128 256         # meta-tokens without position, without embedding
python probe.py rate_distortion --run=out/recall                     # how much can be read from a meta-token's state
"""

from cli import run_cli, run_named
from probes import positions, rate_distortion

PROBES = {
    "positions": (positions.PositionsProbe, positions.main),
    "rate_distortion": (rate_distortion.RateDistortionProbe, rate_distortion.main),
}


def main(argv: list[str]) -> None:
    run_named(argv, PROBES, "probe", __doc__)


if __name__ == "__main__":
    run_cli(main)
