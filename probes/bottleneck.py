"""Trains variational information bottlenecks (Alemi et al., ICLR 2017), many of them at once.

    q(z|h) = N(mu(h), diag sigma^2(h))      prior N(0, I)      q(y | z, query)
    minimizes D + beta R      D = E[-ln q(y | z, query)]      R = E[KL(q(z|h) | prior)], both in nats

R is an upper bound of the information that z contains about h, so (R, D) lies on or above the rate-distortion curve of
the best encoder and decoder, and D + R >= H(Y | query) for every h. Only the decoder sees the query.

Probes are independent of each other. Those that differ only in beta or seed are rows (P, ...) of the same tensors, so
that one batched product computes all of them. A row gets the same weights as a probe that is trained by
itself (tests/reference/bottleneck.py)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanometa.config.checks import check_types
from nanometa.config.settings import SET, setting
from nanometa.evals.common import check_ranges

NARROW = -2.0  # initial ln sigma^2: codes are informative from the start, while with sigma = 1 many stay at rate 0


class Source(NamedTuple):
    """The states, questions and labels of N texts."""

    states: torch.Tensor  # (N, C)
    query: torch.Tensor  # (N, q) int64: the question as q numbers below some Q; q may be 0
    labels: torch.Tensor  # (N, 1): an int64 class, or a float value, for which D is the squared error


class Member(NamedTuple):
    """The settings of one probe.

    kind: "bottleneck"; "ceiling", where z = mu(h) and the rate costs nothing; or "shuffled", a ceiling trained on the
    labels of other texts."""

    beta: float
    seed: int
    kind: str


@dataclass(frozen=True)
class Training:
    """The settings of a probe's training and measurement."""

    z_dim: int = 32
    """dimensions of the code; several items of 5 nats each fit into 32 at low noise"""
    hidden: int = 64
    """width of the decoder's layer that the question gates; 0 for a linear decoder, as in the paper"""
    gates: float = setting(0.5, only_with={"hidden": SET})
    """initial standard deviation of the gates over questions, around their mean of 1"""
    epochs: int = 30
    patience: int = 10
    """a probe stops after this many epochs without a lower loss on the validation texts"""
    batch: int = 200
    learning_rate: float = 0.01
    """initial learning rate, which falls to 0 at the last epoch"""
    weight_decay: float = 3.0
    """weight decay of AdamW for matrices; with less, a probe memorizes the 20 training texts per class, and its D at
    rate 0 is far above that of the class frequencies"""
    draws: int = 8
    """number of codes that are drawn for each measured text"""

    def __post_init__(self):
        check_types(self)
        check_ranges(
            self, z_dim=(1, 10**4), hidden=(0, 10**4), gates=(0, 100), epochs=(1, 10**5), patience=(1, 10**5),
            batch=(1, 10**6), learning_rate=(1e-9, 1), weight_decay=(0, 100), draws=(1, 10**4),
        )  # fmt: skip


def frequencies(labels: torch.Tensor, K: int) -> torch.Tensor:
    """Returns the shares (K,) of the classes. One text is added to each class, so that no share is 0."""
    counts = torch.bincount(labels.flatten(), minlength=K) + 1
    return counts / counts.sum()


def drawn(seed: int, C: int, Q: int, K: int, how: Training, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the initial weights of one probe. Its last matrix is zero, so its first output is `bias` (K,), the
    logarithms of the class frequencies."""
    generator = torch.Generator().manual_seed(seed)
    Z, H = how.z_dim, how.hidden

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(rows)

    weights = {
        "code": matrix(C, 2 * Z), "code_bias": torch.cat([torch.zeros(Z), torch.full((Z,), NARROW)]),
        "out": torch.zeros(Z, K), "out_bias": bias,
    }  # fmt: skip
    if not H:
        return weights | {"question": torch.zeros(Q, K)}
    question = how.gates * torch.randn(Q, 2 * H, generator=generator)
    return weights | {
        "question": question, "inner": matrix(Z, H), "inner_bias": torch.zeros(H), "inner_out": torch.zeros(H, K),
    }  # fmt: skip


def forward(weights: dict, states, query, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns outputs (P, B, K) and rates (P, B) for states (P, B, C), query (P, B, q) and noise (P, B, Z). Where the
    noise is 0, z = mu."""

    def affine(x, name):  # a matrix for each probe
        return torch.baddbmm(weights[f"{name}_bias"][:, None], x, weights[name])

    mean, log_variance = affine(states, "code").chunk(2, dim=-1)
    rates = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1)
    z = mean + noise * (0.5 * log_variance).exp()
    # each probe has its own table of query vectors; the tables are stacked and indexed as one
    tables, first = weights["question"], torch.arange(len(query), device=query.device) * weights["question"].size(1)
    question = F.embedding(query + first[:, None, None], tables.flatten(0, 1)).sum(dim=2)  # (P, B, K or 2H)
    outputs = affine(z, "out")
    if "inner" not in weights:
        return outputs + question, rates
    # the question gates the code, because a lookup is a product of the two
    gate, shift = question.chunk(2, dim=-1)
    return outputs + F.gelu(affine(z, "inner") * (1 + gate) + shift) @ weights["inner_out"], rates


def distortions(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the distortions (P, B) of outputs (P, B, K) and labels (P, B, 1)."""
    if labels.is_floating_point():
        return (outputs - labels).square().sum(dim=-1)
    return outputs.logsumexp(dim=-1) - outputs.gather(-1, labels)[..., 0]


def fit(
    train: Source, val: Source, K: int, Q: int, members: list[Member], how: Training, advance=lambda epochs: None
) -> dict:
    """Trains all members. Returns their weights (P, ...) by name; each member's are from its epoch with the least D +
    beta R on `val`. A member stops once this minimum has not fallen for `patience` epochs. K: number of classes,
    or 1 for float labels; Q: size of the queries' vocabulary.

    advance: called with 1 after each epoch, to show progress."""
    device, (N, C) = train.states.device, train.states.shape
    bias = torch.zeros(K) if train.labels.is_floating_point() else frequencies(train.labels, K).log().cpu()
    alone = {seed: drawn(seed, C, Q, K, how, bias) for seed in sorted({member.seed for member in members})}
    weights = {
        name: torch.stack([alone[member.seed][name] for member in members]).to(device).requires_grad_()
        for name in next(iter(alone.values()))
    }
    # row of each probe's seed
    row = torch.tensor([list(alone).index(member.seed) for member in members], device=device)
    betas = torch.tensor([member.beta for member in members], device=device)
    noisy = torch.tensor([member.kind == "bottleneck" for member in members], device=device)[:, None, None]
    shuffled = torch.tensor([member.kind == "shuffled" for member in members], device=device)[:, None]
    generators = [torch.Generator().manual_seed(seed + 1_000_003) for seed in alone]

    def each(draw) -> torch.Tensor:  # all probes with the same seed get the same draws
        return torch.stack([draw(generator) for generator in generators]).to(device)

    def orders(n: int) -> torch.Tensor:
        return each(lambda g: torch.randperm(n, generator=g))

    def noise(n: int) -> torch.Tensor:
        return each(lambda g: torch.randn(n, how.z_dim, generator=g))

    others = orders(N), orders(len(val.states))  # the text that each shuffled label comes from
    val_noise = noise(len(val.states))[row] * noisy

    def objective(source: Source, picked: torch.Tensor, other: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Returns the mean of D + beta R (P,) over the picked texts (seeds, B)."""
        picked = picked[row]
        labels = source.labels[torch.where(shuffled, other[row].gather(1, picked), picked)]
        outputs, rates = forward(weights, source.states[picked], source.query[picked], noise)
        return (distortions(outputs, labels) + betas[:, None] * rates).mean(dim=1)

    def judged() -> torch.Tensor:
        everything = torch.arange(len(val.states), device=device).expand(len(alone), -1)
        with torch.no_grad():
            return objective(val, everything, others[1], val_noise)

    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in weights.items() if name.endswith("bias")], "weight_decay": 0.0},
            {"params": [p for name, p in weights.items() if not name.endswith("bias")]},
        ],
        weight_decay=how.weight_decay,
    )
    batch = min(how.batch, N)
    steps = N // batch
    least, waited = judged(), torch.zeros(len(members), dtype=torch.long, device=device)
    best = {name: p.detach().clone() for name, p in weights.items()}
    for epoch in range(how.epochs):
        order = orders(N)  # (seeds, N)
        for step in range(steps):
            done = (epoch * steps + step) / (how.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * (1 - done)
            optimizer.zero_grad(set_to_none=True)
            picked = order[:, step * batch : (step + 1) * batch]
            objective(train, picked, others[0], noise(batch)[row] * noisy).sum().backward()
            optimizer.step()
        now, going = judged(), waited < how.patience
        better = (now < least) & going
        least, waited = torch.where(better, now, least), torch.where(better, 0, waited + 1)
        for name, p in weights.items():
            best[name][better] = p.detach()[better]
        advance(1)
        if not (going & (waited < how.patience)).any():
            break
    return best


@torch.no_grad()
def measure_bottlenecks(
    weights: dict, source: Source, members: list[Member], how: Training
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distortion and the rate of every text, (P, N) each. The distortion is a mean over draws of z."""
    P, N = len(members), len(source.states)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.tensor([member.kind == "bottleneck" for member in members], device=source.states.device)
    out = torch.zeros(P, N), torch.zeros(P, N)
    for start in range(0, N, 256):
        part = Source(*(x[start : start + 256].expand(P, -1, -1) for x in source))
        for _ in range(how.draws):
            noise = torch.randn(part.states.size(1), how.z_dim, generator=generator).to(noisy.device)
            outputs, rates = forward(weights, part.states, part.query, noise * noisy[:, None, None])
            out[0][:, start : start + 256] += distortions(outputs, part.labels).cpu() / how.draws
        out[1][:, start : start + 256] = rates.cpu()
    return out
