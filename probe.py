"""Probes a trained run: its attention, its states, and the use that it makes of meta-tokens.

python probe.py positions --run=out/recall --lengths 128 256         # meta-tokens without their position or embedding
python probe.py attention --run=out/recall                           # logit boost and entropy drop of every head
python probe.py patching --run=out/recall                            # states replaced by those of another text
python probe.py residual --run=out/recall                            # what the states of meta-tokens contain
python probe.py rate_distortion --run=out/recall                     # how much can be read from a meta-token's state
python probe.py paper_bottleneck --run=out/recall                    # the paper's probe on 50 texts, many times
python probe.py ablation --run=out/meta                              # the second attention, or markers, taken away

A call appends lines to a file in the run's folder, and redraws a picture beside it from all lines about the same
weights. If a cell was measured more than once, the line with the most texts counts, or the last of those with equally
many."""

from nanometa.config.command_line import run_cli, run_named
from nanometa.probes import ablation, attention, paper_bottleneck, patching, positions, rate_distortion, residual
from nanometa.reports.probe_sections import SECTIONS

PROBES = {
    "positions": (positions.PositionsProbe, positions.main),
    "attention": (attention.AttentionProbe, attention.main),
    "patching": (patching.PatchingProbe, patching.main),
    "residual": (residual.ResidualProbe, residual.main),
    "rate_distortion": (rate_distortion.RateDistortionProbe, rate_distortion.main),
    "paper_bottleneck": (paper_bottleneck.PaperBottleneckProbe, paper_bottleneck.main),
    "ablation": (ablation.AblationProbe, ablation.main),
}
if unpaired := PROBES.keys() ^ SECTIONS.keys():
    raise ImportError(
        f"{', '.join(sorted(unpaired))}: a probe needs an entry in PROBES of probe.py and one in SECTIONS of "
        f"reports/probe_sections.py."
    )


def main(argv: list[str]) -> None:
    run_named(argv, PROBES, "probe", __doc__)


if __name__ == "__main__":
    run_cli(main)
