"""python probe.py residual: tests whether the state of a meta-token contains the tokens before it.

The paper calls meta-tokens summaries of what comes before them, and shows cosine similarities between a meta-token's
states and those of past tokens, which differ by a few hundredths. Here the residual stream that enters every block and
the last LayerNorm (probes/residual_stream.py) is read at one place of each text:

    mark      the mark that ends the span of the question, as in probe.py patching: a meta-token, or with placement
              none the word "mark"
    word      the same texts and place with each meta-token replaced by the word "mark", which shows what an ordinary
              token has there (with placement target this is a text of placement none; with others no run has seen such
              texts)
    ordinary  a random token of the body that is not a mark

and compared with the token d positions back:

    cosine    the cosine between the state at the place and the state of the token d back; `floor`: the same with the
              token d back from the place of another text; `centred`: the same after subtracting the layer's mean state
              over all texts and positions
    decoded   share of texts in which a linear classifier that sees only the state names the token d back (multinomial
              logistic regression, trained on other texts, with L2 chosen on yet others); `majority`: the share if it
              always named the most frequent token of its training texts; `shuffled`: the share after training on labels
              in random order

"nearer" holds if the centred cosine is above its floor. "more" holds if more is decoded from the mark than from the
word in its place, on the same test texts. With placement none, the word is the mark, and nothing is compared. Decodable
information need not be used by the model; probe.py patching tests that. The verdicts are about this checkpoint;
verdicts about its arm need several seeds."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanometa.common.errors import UserError
from nanometa.common.statistics import bits, bootstrap_means, mean_p, wilson
from nanometa.common.terminal import write
from nanometa.evals.common import check_ranges
from nanometa.probes.marked_texts import (
    MarkedTextsProbe,
    at_places,
    mark_name,
    marked_texts,
    paired_claim,
    random_ordinary_position,
    read_states,
    span_end_mark,
)
from nanometa.probes.probe_command import run_probe
from nanometa.tasks.example import Example, Maker
from nanometa.tasks.words import DELIMITER
from nanometa.training.checkpoint import Run

STRENGTHS = (1e-1, 1e-2, 1e-3)  # strengths of L2, from strong to weak; each fit starts from the one before it
STEPS = 20  # steps of L-BFGS for each strength
CLAIMS = {"nearer": "nearer_", "more": "more_"}  # as in marked_texts.judged


@dataclass(frozen=True)
class ResidualProbe(MarkedTextsProbe):
    """Measures how similar a meta-token's states are to those of the tokens before it, and which tokens they reveal."""

    distances: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """distances of the earlier tokens, in positions back from the place"""
    train: int = 2000
    """number of texts that classifiers are trained on; a quarter as many texts choose the L2, and n is the number of
    test texts"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, distances=(1, 2**20), train=(8, 10**6), n=(2, 10**6))  # a floor needs another text


def main(cfg: ResidualProbe) -> None:
    run, facts = cfg.open()
    cells = cfg.marked_cells(run, ("target",))
    run_probe(cfg, "residual", run, facts, cells, CLAIMS, measure_residual)


# ----------------------------------------------------------------------------- reading


class States(NamedTuple):
    """The states at one place of N texts and at the tokens before it, in L = n_layer + 1 layers."""

    here: torch.Tensor  # (L, N, C)
    past: torch.Tensor  # (L, N, D, C): states of the tokens at each of D distances; D = 0 if they are not needed
    tokens: np.ndarray  # (N, D): ids of these tokens; -1 where the text starts later
    mean: torch.Tensor  # (L, C): mean state of all positions of these texts


def places_of(maker: Maker, examples: list[Example]) -> dict[str, tuple[list[Example], list[int]]]:
    """Returns, for each place, the texts as they are read there, and the position of the place in each text."""
    at = [span_end_mark(maker, example) for example in examples]
    ordinary = [random_ordinary_position(maker, example, i) for i, example in enumerate(examples)]
    out = {"mark": (examples, at), "ordinary": (examples, ordinary)}
    word = maker.tokenizer.encode(f" {DELIMITER}").tolist()
    if maker.markers.has_meta and len(word) == 1:
        meta = maker.tokenizer.meta
        out["word"] = ([e._replace(ids=np.where(e.ids == meta, word[0], e.ids)) for e in examples], at)
    return out


def read(run: Run, examples: list[Example], at: list[int], distances: tuple[int, ...], past_too: bool = True) -> States:
    """Returns the states of texts at one position of each (N,), and, if past_too, at the tokens before it."""
    found, total, count = [], 0, 0
    places = np.array(at)[:, None] - np.array((0, *distances))  # (N, 1 + D)
    read_at = places.clip(min=0)
    ends = torch.tensor([len(example.ids) for example in examples])
    for rows, batch, _, states in read_states(run, examples):
        real = torch.arange(batch.tokens.size(1)) < ends[rows, None]
        total += torch.stack(states).float()[:, real.to(states[0].device)].sum(1).cpu().double()
        count += int(real.sum())
        found.append(at_places(states, read_at[rows] if past_too else read_at[rows, :1]).float().cpu())
    states = torch.cat(found, dim=1)  # (L, N, 1 + D, C)
    ids = np.array([example.ids[places] for example, places in zip(examples, read_at, strict=True)])
    tokens = np.where(places >= 1, ids, -1)[:, 1:]  # position 0 is <|endoftext|> in every text
    return States(states[:, :, 0], states[:, :, 1:], tokens, (total / count).float())


# ----------------------------------------------------------------------------- measuring


def measure_residual(cfg: ResidualProbe, run: Run, maker: Maker, level: str, length: int) -> list[dict]:
    """Returns one line for each place, layer and distance of a cell. Prints each layer as soon as it is measured."""
    sizes = {"train/probe": cfg.train, "val": max(4, cfg.train // 4), "test": cfg.n}
    made = {split: marked_texts(maker, level, length, n, split) for split, n in sizes.items()}
    places = {split: places_of(maker, examples) for split, examples in made.items()}
    names, nearest = list(places["test"]), min(cfg.distances)
    if not any(all(sum(at > nearest for at in of[name][1]) > 1 for of in places.values()) for name in names):
        raise UserError(f"distances={cfg.distances} reach beyond the start of all texts: take shorter ones.")
    splits = {
        name: [read(run, *of[name], cfg.distances, split == "test") for split, of in places.items()] for name in names
    }
    lines: list[dict] = []
    for layer in range(run.model.cfg.n_layer + 1):
        started, mine = time.perf_counter(), []
        for i, d in enumerate(cfg.distances):
            by_place: dict[str, dict] = {}
            for name in names:
                sets, test = [(of.here[layer], of.tokens[:, i]) for of in splits[name]], splits[name][-1]
                there = test.tokens[:, i] >= 0
                if min((tokens >= 0).sum() for _, tokens in sets) >= 2:
                    by_place[name] = {
                        "mark": mark_name(maker), "place": name, "layer": layer, "distance": d, "n": int(there.sum()),
                        **similarity(test.here[layer][there], test.past[layer][there][:, i], test.mean[layer]),
                        **decoded(sets),
                    }  # fmt: skip
            if {"mark", "word"} <= by_place.keys():  # how much more is decoded from the mark, on the same texts
                right = [bits(by_place[name]["outcomes"].replace("-", "")) for name in ("mark", "word")]
                by_place["mark"] |= paired_claim("more", CLAIMS["more"], *right)
            mine += by_place.values()
        seconds = time.perf_counter() - started
        lines += [{**line, "seconds": seconds / len(mine)} for line in mine]
        write_progress(mine, seconds)
    return lines


def similarity(here: torch.Tensor, past: torch.Tensor, mean: torch.Tensor) -> dict:
    """Returns the cosines of here and past (N, C), before and after the mean (C,) is subtracted, and their floors,
    which pair text i with the past of text i + 1."""
    values = {}
    for name, shift in (("", torch.zeros_like(mean)), ("_centred", mean)):
        a, b = here - shift, past - shift
        values[f"cosine{name}"] = F.cosine_similarity(a, b, dim=-1).double().numpy()
        values[f"floor{name}"] = F.cosine_similarity(a, b.roll(-1, 0), dim=-1).double().numpy()
    values["nearer"] = values["cosine_centred"] - values["floor_centred"]
    low, high = bootstrap_means(np.stack(list(values.values()), axis=1))
    out = {"nearer_p": mean_p(values["nearer"])}
    for i, (name, value) in enumerate(values.items()):
        out |= {name: float(value.mean()), f"{name}_interval": (float(low[i]), float(high[i]))}
    return out


def decoded(sets: list[tuple[torch.Tensor, np.ndarray]]) -> dict:
    """Returns the decoded shares. sets: states (N, C) and ids (N,) of train, val and test, with -1 for a missing
    token."""
    (x, y), (x_val, y_val), (x_test, y_test) = ((x[y >= 0], y[y >= 0]) for x, y in sets)
    classes, y = np.unique(y, return_inverse=True)
    fits = zip(STRENGTHS, classify(x, y, len(classes), [x_val, x_test], STRENGTHS), strict=True)
    strength, (_, named) = max(fits, key=lambda fit: (classes[fit[1][0]] == y_val).mean())  # the first of equals
    order = np.random.default_rng(0).permutation(len(y))
    ((by_chance,),) = classify(x, y[order], len(classes), [x_test], (strength,))
    right, outcomes = classes[named] == y_test, np.full(len(sets[2][1]), "-")
    outcomes[sets[2][1] >= 0] = np.where(right, "1", "0")
    return {
        "decoded": float(right.mean()), "decoded_interval": wilson(int(right.sum()), len(right)),
        "majority": float((y_test == classes[np.bincount(y).argmax()]).mean()),
        "shuffled": float((classes[by_chance] == y_test).mean()),
        "classes": len(classes), "train": len(y), "strength": strength, "outcomes": "".join(outcomes),
    }  # fmt: skip


def classify(x, y, K: int, others: list, strengths: tuple[float, ...]) -> Iterator[list[np.ndarray]]:
    """Fits multinomial logistic regressions of y (N,) in 0 .. K - 1 on standardized x (N, C), one for each strength of
    L2, each from the weights of the one before. Yields the most likely classes for each x of `others`."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, y = (x - mean) / deviation, torch.from_numpy(y)
    others = [(other - mean) / deviation for other in others]
    weight, bias = (torch.zeros(K, size, requires_grad=True) for size in (x.size(1), 1))
    for strength in strengths:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss(strength=strength, optimizer=optimizer):
            optimizer.zero_grad()
            nats = F.cross_entropy(F.linear(x, weight, bias[:, 0]), y) + strength / 2 * weight.square().sum() / K
            nats.backward()
            return nats

        optimizer.step(loss)
        with torch.no_grad():
            named = [F.linear(other, weight, bias[:, 0]).argmax(1).numpy() for other in others]
        yield named


def write_progress(lines: list[dict], seconds: float) -> None:
    """Prints the figures of a measured layer."""
    shares = "  ".join(
        f"{name}: " + " ".join(f"{line['decoded']:.0%}" for line in lines if line["place"] == name)
        for name in dict.fromkeys(line["place"] for line in lines)
    )
    write(f"  layer {lines[0]['layer']}  decoded {shares}  {seconds:.1f} s\n")
