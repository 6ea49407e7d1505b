"""python probe.py rate_distortion --known: checks the bottleneck on sources whose answer is known.

Two sources have a known rate-distortion curve, which the bottleneck has to reach. Planted lookups then show what the
probe finds with its own settings: a state holds some items, each of them one of 200, and a question names one. All of
them can be read from such a state, so the remaining distortion is what the probe fails to find."""

import math

import torch

from nanometa.probes.bottleneck import Member, Source, Training, fit, measure_bottlenecks

VARIANCE = 4.0
GAUSSIAN_BETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # at 8, twice the variance, the rate is 0
GAUSSIAN_TEXTS = 8000
GAUSSIAN = Training(z_dim=1, hidden=0, epochs=40, patience=40, learning_rate=0.03, weight_decay=0.0, draws=64)
NEAR = 0.02  # nats by which a point may differ from R(D) of the Gaussian, in either direction
CLASSES, CLASS_TEXTS = 16, 4000
CLASS_BETAS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 3.0)
CATEGORICAL = Training(z_dim=8, epochs=40, patience=40, weight_decay=0.0, draws=64)
SLACK = 0.02  # nats by which a point may lie below the converse, or differ from the ends of the curve
POOL, WIDTH = 200, 192  # a lookup has as many items as list recall, and the state width of a small model
PLANTED = ((1, 1), (7, 1), (7, 4))  # number of items, and factor on the probe's number of training texts


def gaussian(n: int, seed: int) -> Source:
    """Returns a Gaussian source under squared error, whose R(D) = 1/2 ln(variance / D)."""
    values = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))
    return Source(values, torch.zeros(n, 0, dtype=torch.long), values * math.sqrt(VARIANCE))


def categorical(n: int, seed: int) -> Source:
    """Returns a source of one of CLASSES equally likely classes, as a one-hot vector."""
    labels = torch.randint(CLASSES, (n, 1), generator=torch.Generator().manual_seed(seed))
    one_hot = torch.nn.functional.one_hot(labels[:, 0], CLASSES).float()
    return Source(one_hot, torch.zeros(n, 0, dtype=torch.long), labels)


def points(make, K: int, betas: tuple[float, ...], how: Training, n: int) -> list[tuple[float, float, float]]:
    """Returns (beta, R, D) of bottlenecks trained on n texts of a source and measured on n others."""
    members = [Member(beta, 0, "bottleneck") for beta in betas]
    weights = fit(make(n, 1), make(n // 4, 2), K, 0, members, how)
    D, R = (x.mean(dim=1).tolist() for x in measure_bottlenecks(weights, make(n, 3), members, how))
    return list(zip(betas, R, D, strict=True))


def lookup(items: int, n: int, seed: int) -> Source:
    """Returns a source whose state is a sum of random vectors, one for each item at its place. If there are several
    places, the question names one."""
    vectors = torch.randn(items, POOL, WIDTH, generator=torch.Generator().manual_seed(0)) / math.sqrt(items)
    generator = torch.Generator().manual_seed(seed)
    held = torch.randint(POOL, (n, items), generator=generator)
    asked = torch.randint(items, (n, 1), generator=generator)
    state = sum(vectors[place, held[:, place]] for place in range(items))
    return Source(state, asked[:, : items - 1], held.gather(1, asked))


def report() -> str:
    """Returns a text with the measured points of both sources beside their known curves."""
    out = [f"a Gaussian of variance {VARIANCE:g}, squared error: R(D) = 1/2 ln({VARIANCE:g} / D), within {NEAR:g} nats"]
    for beta, R, D in points(gaussian, 1, GAUSSIAN_BETAS, GAUSSIAN, GAUSSIAN_TEXTS):
        exact = 0.5 * math.log(VARIANCE / D)
        right = "yes" if abs(R - exact) <= NEAR else "NO"
        out.append(f"  beta {beta:<5g} D {D:.3f} (exact {beta / 2:.3f})  R {R:.3f}  R(D) {exact:.3f}  {right}")
    H = math.log(CLASSES)
    out.append(
        f"one of {CLASSES} equally likely classes, cross-entropy: D + R >= ln {CLASSES} = {H:.3f}, within {SLACK:g} "
        f"nats; points lie above the line by the cost of a Gaussian code for classes, and on the curve at both ends"
    )
    for beta, R, D in points(categorical, CLASSES, CLASS_BETAS, CATEGORICAL, CLASS_TEXTS):
        right = "yes" if D + R >= H - SLACK else "NO"
        out.append(f"  beta {beta:<5g} R {R:.3f}  D {D:.3f}  D + R - ln {CLASSES} {D + R - H:+.3f}  {right}")
    return "\n".join(out)


def lookup_report(items: int, line: dict) -> str:
    """Returns a text with the curve of a lookup."""
    curve = "  ".join(f"({point['rate']:.2f}, {point['distortion']:.3f})" for point in line["points"])
    return (
        f"planted: a state of width {WIDTH} holds {items} of {POOL} items, and a question names one; all can be read, "
        f"and knowing nothing leaves ln {POOL} = {math.log(POOL):.3f} nats\n  {line['train_texts']} texts to train: "
        f"{'found' if line['found'] else 'NOTHING FOUND'}, no bottleneck D {line['ceiling']['distortion']:.3f}, (R, D) "
        f"by beta\n  {curve}"
    )
