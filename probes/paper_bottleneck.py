"""python probe.py paper_bottleneck: repeats the paper's own rate-distortion probe, to see how much it scatters.

The paper puts a variational bottleneck on the last meta-token's hidden state, and another on the last ordinary token's,
trains both on 50 examples with batch 1 for 5 epochs at prices beta from 0.01 to 1.0, and finds less distortion for the
meta-token. Its distortions of 10.0 to 10.8 nats are close to guessing among GPT-2's ids, ln 50257 = 10.8, so its
probes have hardly learned. Here exactly that experiment is done `repeats` times, each time with 50 other texts, other
initial weights and another noise. Known of it are:

    q(z|h) = N(mu(h), diag sigma^2(h)), linear in h; prior N(0, I); decoder softmax(W z + b) over the vocabulary
    loss -ln q(y|z) + beta KL(q(z|h) | prior), batch 1, 5 epochs, 50 texts

Not known are the size of z, the optimizer, the initial weights, the target, the layer, and whether training or test
texts are shown. Here they are 32, Adam at 0.001, those of torch's Linear, the first id of the answer, the final hidden
state (after the last LayerNorm), and both. The vocabulary is that of the run, without markers.

    meta      the last meta-token before the question; in texts without them `delimiter`, the last word "mark"
    last      the last ordinary token before the question
    features  random features of the same size: normal, with the mean and variance of each dimension of the first
              state, drawn anew for each text. They contain nothing about any text

All states of a repetition share their texts, initial weights, order and noise. `difference` is the distortion of the
first state minus that of another at the same beta, on test texts, as a mean over repetitions, with Student's interval.
`sd` is the standard deviation of that difference over repetitions: a single experiment, as in the paper, shows a
difference as large as this by chance. `below` is the share of repetitions in which the first state has less distortion.
A first state that beats `last`, but no more than it beats `features`, has shown nothing about meta-tokens. At equal
beta, rates differ, too; they are given. probe.py rate_distortion compares at equal rates, with probes that have
learned."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanometa.common.errors import UserError
from nanometa.common.statistics import seed_difference
from nanometa.common.terminal import write
from nanometa.config import Placement, Task
from nanometa.evals.common import check_ranges, progress
from nanometa.evals.tasks import texts
from nanometa.probes.marked_texts import MarkedTextsProbe, mark_name
from nanometa.probes.probe_command import run_probe
from nanometa.probes.text_positions import locate_all, missing, states_of_texts
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run

SPLITS = ("train/paper_bottleneck", "test")
DRAWS = 8  # codes that are drawn for each measured text


@dataclass(frozen=True)
class PaperBottleneckProbe(MarkedTextsProbe):
    """Measures the paper's rate-distortion probe, trained on 50 texts, on meta-tokens, other tokens and random
    features, and how much its result scatters."""

    tasks: tuple[Task, ...] = ("list_recall",)
    """tasks to read; each has cells of its own"""
    placements: tuple[Placement, ...] = ("target",)
    """placements of meta-tokens to read; each has cells of its own"""
    n: int = 1000
    """number of test texts in each cell"""
    repeats: int = 20
    """number of repetitions of the experiment"""
    train_texts: int = 50
    """number of texts that each probe is trained on"""
    epochs: int = 5
    betas: tuple[float, ...] = (0.01, 0.05, 0.2, 1.0)
    """prices of the rate; each has probes of its own"""
    z_dim: int = 32
    """dimensions of the code"""
    learning_rate: float = 0.001

    def __post_init__(self):
        super().__post_init__()
        check_ranges(
            self, n=(2, 10**6), repeats=(2, 10**4), train_texts=(1, 10**5), epochs=(1, 10**4), betas=(0, 1e6),
            z_dim=(1, 10**4), learning_rate=(1e-9, 1),
        )  # fmt: skip


def main(cfg: PaperBottleneckProbe) -> None:
    if idle := [name for name in ("margin", "effect") if name in cfg.typed]:
        raise UserError(f"--{idle[0]} has no effect on paper_bottleneck, which gives no verdicts: leave it out.")
    run, facts = cfg.open()
    cells = cfg.cells(run)
    for maker, level, length in cells:  # raises UserError for texts or states that the run lacks
        first_state(maker, locate_all(run, maker, texts(maker, level, length, 20), 0, "test"))
    how = {name: getattr(cfg, name) for name in ("repeats", "train_texts", "epochs", "z_dim", "learning_rate")}
    run_probe(cfg, "paper_bottleneck", run, facts, cells, {}, measure_cell, alike=how)


def first_state(maker: Maker, located: list) -> str:
    """Returns the name of the state at the mark, meta or delimiter. Raises UserError if some texts have neither."""
    for name in ("meta", "delimiter"):
        if not missing(name, located):
            return name
    raise UserError(
        f"{maker.name} with placement {maker.placement} cannot be read, because {missing('meta', located)}: take other "
        f"--placements."
    )


def measure_cell(cfg: PaperBottleneckProbe, run: Run, maker: Maker, level: str, length: int) -> list[dict]:
    """Returns one line for each state and beta of a cell. Prints each state's figures."""
    started = time.perf_counter()
    sizes = (cfg.repeats * cfg.train_texts, cfg.n)
    examples = [texts(maker, level, length, n, split) for split, n in zip(SPLITS, sizes, strict=True)]
    located = [locate_all(run, maker, of, 0, split) for of, split in zip(examples, SPLITS, strict=True)]
    first = first_state(maker, [*located[0], *located[1]])
    layer = run.model.cfg.n_layer
    with torch.no_grad():
        pool, test = (
            run.model.ln_f(states_of_texts(run, of, at, [first, "last"], [layer])[0]).float().cpu()
            for of, at in zip(examples, located, strict=True)
        )  # (2, N, C)
    features = random_features(pool[0], [len(pool[0]), len(test[0])])
    states = {
        name: (train, held)
        for name, train, held in zip(
            (first, "last", "features"), (*pool, features[0]), (*test, features[1]), strict=True
        )
    }
    labels = [torch.tensor([int(text.ids[text.answer]) for text in of]) for of in located]
    V, measured = run.tokenizer.n_content, {name: [] for name in states}
    with progress("repeating the experiment", cfg.repeats) as advance, torch.autocast("cpu", enabled=False):
        for repeat in range(cfg.repeats):
            rows = slice(repeat * cfg.train_texts, (repeat + 1) * cfg.train_texts)
            for name, (train, held) in states.items():
                here = train[rows], labels[0][rows]
                weights = fit_heads(*here, V, cfg, repeat)
                measured[name].append([*measure_heads(weights, *here), *measure_heads(weights, held, labels[1])])
            advance(1)
    # (4, repeats, betas): distortion and rate of training texts, then of test texts
    found = {name: np.moveaxis(np.array(of), 0, 1) for name, of in measured.items()}
    seconds = (time.perf_counter() - started) / (len(found) * len(cfg.betas))
    shared = {
        "mark": mark_name(maker), "n": cfg.n, "repeats": cfg.repeats, "train_texts": cfg.train_texts,
        "epochs": cfg.epochs, "z_dim": cfg.z_dim, "learning_rate": cfg.learning_rate, "uniform": math.log(V),
        "seconds": seconds,
    }  # fmt: skip
    lines = []
    for name, of in found.items():
        for i, beta in enumerate(cfg.betas):
            line = {**shared, "state": name, "beta": beta}
            for field, values in zip(("train_distortion", "train_rate", "distortion", "rate"), of, strict=True):
                line |= {field: float(values[:, i].mean()), f"{field}_interval": over_repeats(values[:, i])}
            if name != first:
                line |= compared(first, found[first][2, :, i], of[2, :, i])
            lines.append(line)
        write_progress(lines[-len(cfg.betas) :])
    return lines


def random_features(like: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Returns normal features (n, C) for each size, with the mean and variance of each dimension of `like` (N, C)."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation = like.mean(0), like.std(0)
    return [mean + deviation * torch.randn(n, like.size(1), generator=generator) for n in sizes]


def over_repeats(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of values (repeats,), by Student's t."""
    return seed_difference(values, np.zeros(len(values)))[1:]


def compared(first: str, ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Returns the fields about the distortion of the first state minus that of another, from (repeats,) each."""
    mean, *interval = seed_difference(ours, theirs)
    return {
        "minus_from": first, "difference": mean, "difference_interval": interval,
        "sd": float((ours - theirs).std(ddof=1)), "below": float((ours < theirs).mean()),
    }  # fmt: skip


def write_progress(lines: list[dict]) -> None:
    points = "  ".join(f"({line['rate']:.1f}, {line['distortion']:.3f})" for line in lines)
    write(f"  {lines[0]['state']:<10} (R, D) by beta {points}  ln V {lines[0]['uniform']:.3f}\n")


# ----------------------------------------------------------------------------- the paper's head


def initial_weights(C: int, V: int, cfg: PaperBottleneckProbe, seed: int) -> dict[str, torch.Tensor]:
    """Returns initial weights as of torch's Linear, uniform within +-1/sqrt(inputs): those of mu and ln sigma^2, then
    those of the decoder."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(inputs: int, *shape: int) -> torch.Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)

    Z = cfg.z_dim
    return {
        "code": uniform(C, C, 2 * Z), "code_bias": uniform(C, 2 * Z),
        "out": uniform(Z, Z, V), "out_bias": uniform(Z, V),
    }  # fmt: skip


def heads(weights: dict, h: torch.Tensor, y: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns distortions and rates (P, B) of states h (B, C), labels y (B,) and noise (B, Z), for P probes."""
    code = torch.einsum("bc,pcz->pbz", h, weights["code"]) + weights["code_bias"][:, None]
    mean, log_variance = code.chunk(2, dim=-1)
    rates = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
    logits = (mean + noise * (0.5 * log_variance).exp()) @ weights["out"] + weights["out_bias"][:, None]
    nats = F.cross_entropy(logits.flatten(0, 1), y.expand(len(logits), -1).flatten(), reduction="none")
    return nats.view(rates.shape), rates


def fit_heads(h: torch.Tensor, y: torch.Tensor, V: int, cfg: PaperBottleneckProbe, seed: int) -> dict:
    """Trains one probe for each beta on states h (N, C) and labels y (N,), one text at a time. Returns their weights
    (P, ...). All probes with the same seed start from the same weights and see the same order and noise."""
    start = initial_weights(h.size(1), V, cfg, seed)
    weights = {name: w.expand(len(cfg.betas), *w.shape).clone().requires_grad_() for name, w in start.items()}
    betas, generator = torch.tensor(cfg.betas)[:, None], torch.Generator().manual_seed(seed + 1_000_003)
    optimizer = torch.optim.Adam(weights.values(), lr=cfg.learning_rate)
    for _ in range(cfg.epochs):
        for i in torch.randperm(len(h), generator=generator).tolist():
            noise = torch.randn(1, cfg.z_dim, generator=generator)
            optimizer.zero_grad(set_to_none=True)
            nats, rates = heads(weights, h[i : i + 1], y[i : i + 1], noise)
            (nats + betas * rates).sum().backward()
            optimizer.step()
    return {name: w.detach() for name, w in weights.items()}


@torch.no_grad()
def measure_heads(weights: dict, h: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean distortion and rate (P,) of texts, over DRAWS codes of each."""
    generator, sums = torch.Generator().manual_seed(0), torch.zeros(2, len(weights["code"]), dtype=torch.float64)
    for start in range(0, len(h), 256):
        part = h[start : start + 256], y[start : start + 256]
        for _ in range(DRAWS):
            noise = torch.randn(len(part[0]), weights["out"].size(1), generator=generator)
            sums += torch.stack(heads(weights, *part, noise)).double().sum(-1) / DRAWS
    nats, rates = (sums / len(h)).numpy()
    return nats, rates
