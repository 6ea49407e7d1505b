"""python probe.py rate_distortion --known: is the bottleneck right, and what does it find?

Two sources whose rate-distortion curve is known, which it has to reach. And planted lookups, with the probe's own
settings: a state that holds items, each of them one of 200, and a question that names one. All of them can be read
from such a state, so that what is left is what the probe does not find."""

import math

import torch

from nanometa.probes.bottleneck import Member, Source, Training, fit, measure_bottlenecks

VARIANCE = 4.0
GAUSSIAN_BETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # at 8, twice the variance, the rate is 0
GAUSSIAN_TEXTS = 8000
GAUSSIAN = Training(
    z_dim=1, hidden=0, epochs=40, patience=40, batch=200, learning_rate=0.03, weight_decay=0.0, draws=64
)
NEAR = 0.02  # nats: how far a point may lie from R(D) of the Gaussian, where it may lie on either side by chance
CLASSES, CLASS_TEXTS = 16, 4000
CLASS_BETAS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 3.0)
CATEGORICAL = Training(
    z_dim=8, hidden=64, epochs=40, patience=40, batch=200, learning_rate=0.01, weight_decay=0.0, draws=64
)
SLACK = 0.02  # nats below the converse, and off the ends of the curve
POOL, WIDTH = 200, 192  # of a lookup: as many items as list recall has, in a state of a small model's width
PLANTED = ((1, 1), (7, 1), (7, 4))  # items, and how many times as many texts to train as the probe has by itself


def gaussian(n: int, seed: int) -> Source:
    """A Gaussian, to be told with the least squared error: R(D) = 1/2 ln(variance / D)."""
    values = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))
    return Source(values, torch.zeros(n, 0, dtype=torch.long), values * math.sqrt(VARIANCE))


def categorical(n: int, seed: int) -> Source:
    """One of K equally likely classes, as a one-hot vector."""
    labels = torch.randint(CLASSES, (n, 1), generator=torch.Generator().manual_seed(seed))
    return Source(
        torch.nn.functional.one_hot(labels[:, 0], CLASSES).float(), torch.zeros(n, 0, dtype=torch.long), labels
    )


def points(make, K: int, betas: tuple[float, ...], how: Training, n: int) -> list[tuple[float, float, float]]:
    """(beta, R, D) of bottlenecks trained on n texts of a source, measured on other n."""
    members = [Member(beta, 0, "bottleneck") for beta in betas]
    weights = fit(make(n, 1), make(n // 4, 2), K, 0, members, how)
    D, R = (x.mean(dim=1).tolist() for x in measure_bottlenecks(weights, make(n, 3), members, how))
    return list(zip(betas, R, D, strict=True))


def lookup(items: int, n: int, seed: int) -> Source:
    """The sum of a random vector for each of the items and its place. The question names a place, if there are two."""
    vectors = torch.randn(items, POOL, WIDTH, generator=torch.Generator().manual_seed(0)) / math.sqrt(items)
    generator = torch.Generator().manual_seed(seed)
    held = torch.randint(POOL, (n, items), generator=generator)
    asked = torch.randint(items, (n, 1), generator=generator)
    state = sum(vectors[place, held[:, place]] for place in range(items))
    return Source(state, asked[:, : items - 1], held.gather(1, asked))


def lookups(items: int, sizes: tuple[int, ...]) -> list[Source]:
    """Of so many texts each, none of which says anything of another."""
    return [lookup(items, n, seed) for seed, n in enumerate(sizes, start=1)]


def report() -> str:
    """Both sources whose curve is known, measured beside it, for a person."""
    out = [f"a Gaussian of variance {VARIANCE:g}, squared error: R(D) = 1/2 ln({VARIANCE:g} / D), within {NEAR:g} nats"]
    for beta, R, D in points(gaussian, 1, GAUSSIAN_BETAS, GAUSSIAN, GAUSSIAN_TEXTS):
        exact = 0.5 * math.log(VARIANCE / D)
        right = "yes" if abs(R - exact) <= NEAR else "NO"
        out.append(f"  beta {beta:<5g} D {D:.3f} (exact {beta / 2:.3f})  R {R:.3f}  R(D) {exact:.3f}  {right}")
    H = math.log(CLASSES)
    out.append(
        f"one of {CLASSES} equally likely classes, cross-entropy: D + R >= ln {CLASSES} = {H:.3f}, within {SLACK:g} "
        f"nats; above the line by what a Gaussian code of classes costs, and at both ends on the curve"
    )
    for beta, R, D in points(categorical, CLASSES, CLASS_BETAS, CATEGORICAL, CLASS_TEXTS):
        right = "yes" if D + R >= H - SLACK else "NO"
        out.append(f"  beta {beta:<5g} R {R:.3f}  D {D:.3f}  D + R - ln {CLASSES} {D + R - H:+.3f}  {right}")
    return "\n".join(out)


def lookup_report(items: int, line: dict) -> str:
    """A lookup's curve for a person."""
    told = "  ".join(f"({point['rate']:.2f}, {point['distortion']:.3f})" for point in line["points"])
    return (
        f"planted: a state of width {WIDTH} holds {items} of {POOL} items, and is asked for one; all could be told, "
        f"and to know nothing leaves ln {POOL} = {math.log(POOL):.3f} nats\n  {line['train_texts']} texts to train: "
        f"{'found' if line['found'] else 'NOTHING FOUND'}, no bottleneck D {line['ceiling']['distortion']:.3f}, (R, D) "
        f"by beta\n  {told}"
    )
