"""Measures what a weighted loss adds to a training step, for a model that scores itself and for stored nats."""

from nanometa.benches.timing import Contestant, contest, quartiles, say
from nanometa.benches.training import MARKERS, SHAPES, Step, training_step

SCORERS = ("", "stored", "self")  # "": the usual loss


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Returns one row per shape, dtype, arm and scorer, in eager mode. The scorers of an arm take turns.

    The rule is `dense`; all rules cost the same but for some sorting of a window's targets."""
    rows = []
    for name in args.shapes:
        shape, vocabulary = SHAPES[name], (4160, 4096) if name == "tiny" else Step.vocabulary
        for dtype in args.dtypes:
            for arm, share in (("none", 0.0), ("meta", MARKERS)):
                step = Step(arm, dtype, False, shape, round(share * shape[3]), vocabulary)
                steps = {scorer: step.scored_by(scorer) for scorer in SCORERS}
                times, _ = contest({who: Contestant(training_step, one) for who, one in steps.items()}, args.repeats)
                for scorer in SCORERS:
                    low, middle, high = quartiles(times[scorer])
                    row = {"shape": name, "dtype": dtype, "arm": arm, "scorer": scorer or "none", "s a step": middle}
                    rows.append(row | {"quartiles": f"{low:.3f} .. {high:.3f}"})
                    say(rows[-1])
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns sentences that compare every scorer with the usual loss in the same turns."""
    found, plain = [], {}
    for row in rows:
        key = (row["shape"], row["dtype"], row["arm"])
        if row["scorer"] == "none":
            plain[key] = row["s a step"]
        else:
            added = row["s a step"] / plain[key] - 1
            found.append(f"{' '.join(key)}: the scorer {row['scorer']} adds {100 * added:+.0f} % to a step")
    return found
