"""What probe.py rate_distortion tells a person, in nats."""

import sys

from nanometa.common.terminal import write


def ticking(epoch: int, going: int) -> None:
    """Where the training of a curve's probes is, on a terminal alone."""
    if sys.stdout.isatty():
        write(f"\repoch {epoch}, {going} probes go on \r")


def progress(line: dict) -> str:
    """A curve for a person, as soon as it is measured."""
    ends = [line["points"][k] for k in (0, -1)]
    told = " .. ".join(f"({point['rate']:.2f}, {point['distortion']:.3f})" for point in ends)
    flag = f"  BELOW THE CONVERSE at {line['violations']} points" if line["violations"] else ""
    return (
        f"{line['target']:<8} layer {line['layer']:<2} {line['state']:<10} (R, D) {told}  no bottleneck "
        f"{line['ceiling']['distortion']:.3f}  shuffled {line['shuffled']['distortion']:.3f}  H {line['entropy']:.3f}"
        f"  {'found' if line['found'] else 'nothing found'}  {line['seconds']:.0f} s{flag}"
    )


def table(lines: list[dict]) -> str:
    """All lines for a person, in nats."""
    out = []
    for line in (line for line in lines if line["kind"] == "curve"):
        out.append(
            f"{line['task']}, {line['placement']}, {line['level']}, {line['length']} positions, layer {line['layer']}, "
            f"{line['target']} from {line['state']}: n = {line['n']}, {line['train_texts']} to train, "
            f"{line['probe_seeds']} probe seeds, {line['classes']} classes{'' if line['found'] else ': NOTHING FOUND'}"
        )
        floor = f", floor {line['floor']:.3f}" if line["floor"] > 0 else ""
        out.append(
            f"  ln K {line['uniform']:.3f}, H {line['entropy']:.3f} (test texts alone {line['entropy_test']:.3f}), "
            f"constant {line['cross_entropy']:.3f}, shuffled {line['shuffled']['distortion']:.3f}, no bottleneck "
            f"{line['ceiling']['distortion']:.3f}{floor}"
        )
        out.append(f"  {'beta':>8} {'R':>8} {'(95 %)':>18} {'D':>8} {'(95 %)':>16} {'seeds':>16} {'D + R - H':>10}")
        for point in line["points"]:
            low, high = point["rate_interval"]
            seeds = "-" if point["seed_interval"] is None else "{:.3f} .. {:.3f}".format(*point["seed_interval"])
            D = "{:.3f} .. {:.3f}".format(*point["distortion_interval"])
            below = f"  BELOW THE CONVERSE by more than {point['converse_tolerance']:.3f}"
            out.append(
                f"  {point['beta']:>8.4g} {point['rate']:>8.3f} {f'{low:.3f} .. {high:.3f}':>18} "
                f"{point['distortion']:>8.3f} {D:>16} {seeds:>16} {point['above_converse']:>10.3f}"
                + below
                * point["violates_converse"]
            )
    out += [compared(line) for line in lines if line["kind"] == "comparison"]
    return "\n".join([*out, *KEY])


KEY = (
    "Nats. R: rate, at most what the code tells of the state. D: distortion, cross-entropy of the target. That of",
    "constant: by training texts' frequencies; shuffled: learned from other texts' targets; floor: with all of a bag",
    "known; no bottleneck: of this probe at no price, no bound. 95 % over texts and probe seeds; of a run, not its arm",
)


def compared(line: dict) -> str:
    """Two curves for a person."""
    first, second = line["states"]
    where = f"{line['task']}, {line['placement']}, {line['length']} positions, layer {line['layer']}"
    head = f"{where}: D of {first} less D of {second} at equal R"
    if not any(line["found"]):
        return f"{head}\n  {line['verdict']}"
    at = "  ".join(
        f"{rate:g}: not reached" if of is None else "{:g}: {:+.3f} ({:+.3f} .. {:+.3f})".format(rate, *of)
        for rate, of in zip(line["rates"], line["differences"], strict=True)
    )
    low, high = line["difference_interval"]
    return (
        f"{head}\n  {at}\n  mean up to R = {line['up_to']:.2f} of H = {line['entropy']:.2f}: {line['difference']:+.3f} "
        f"({low:+.3f} .. {high:+.3f}), p {line['p']:.3g}, Holm {line['holm']:.3g}; {first} has less distortion by more "
        f"than {line['effect']:g}: {line['verdict']}"
    )
