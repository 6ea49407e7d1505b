"""python probe.py residual: tests whether the state of a meta-token contains the tokens before it.

The paper calls meta-tokens summaries of what comes before them, and shows cosine similarities of a meta-token's states
with those of past tokens that differ by some hundredths. Here the residual stream that enters every block and the last
LayerNorm (probes/residual_stream.py) is read at one place of each text:

    mark      the mark that ends the span of the question, as in probe.py patching: a meta-token, or with placement
              none the word "mark"
    word      the same texts and place with each meta-token replaced by the word "mark", which shows what an ordinary
              token has there (with placement target this is a text of placement none; with others no run has seen such
              texts)
    ordinary  a random token of the body that is no mark

and compared with the token d positions back:

    cosine    between the state at the place and that of the token d back; `floor`: the same with the token d back from
              the place of another text; `centred`: after subtracting the layer's mean state over all texts and
              positions
    decoded   share of texts in which a linear classifier (multinomial logistic regression, trained on other texts, with
              L2 chosen on yet others) names the token d back from the state alone; `majority`: share if it always named
              the commonest token of its training; `shuffled`: trained on labels in random order

"nearer" holds where the centred cosine is above its floor, "more" where more is decoded from the mark than from the
word in its place, on the same test texts. With placement none the word is the mark, and nothing is compared. Decodable
information need not be used by the model; probe.py patching tests that. The verdicts are about this checkpoint;
verdicts about its arm need several seeds."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanometa.common.errors import UserError
from nanometa.common.statistics import bootstrap_means, mcnemar, mean_p, paired_difference, wilson
from nanometa.common.terminal import write
from nanometa.config.checks import check
from nanometa.evals.common import check_finite
from nanometa.evals.tasks import about
from nanometa.inference.scoring import hidden_states
from nanometa.probes.marked_texts import (
    MarkedTextsProbe,
    batches,
    mark_name,
    marks,
    random_ordinary_position,
    span_end_mark,
)
from nanometa.probes.probe_command import run_probe
from nanometa.probes.residual_stream import record_states
from nanometa.tasks.example import Example, Maker
from nanometa.tasks.words import DELIMITER
from nanometa.training.checkpoint import Run

STRENGTHS = (1e-1, 1e-2, 1e-3)  # strengths of L2, from strong to weak; each fit starts from the one before it
STEPS = 20  # steps of L-BFGS for each strength
CLAIMS = ("nearer", "more")


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
        distances = self.distances
        check(self, "distances", distances and all(1 <= d < 2**20 for d in distances), "be at least 1")
        check(self, "train", 8 <= self.train <= 10**6, "lie in 8 .. 1000000")
        check(self, "n", self.n >= 2, "be at least 2, because a text needs another one")


def main(cfg: ResidualProbe) -> None:
    run_probe(cfg, "residual", ("target",), CLAIMS, lambda *cell: measure_residual(*cell, cfg))


# ----------------------------------------------------------------------------- reading


@dataclass
class Place:
    """The states at one place of N texts and at the tokens before it, in L = n_layer + 1 layers."""

    here: torch.Tensor  # (L, N, C)
    past: torch.Tensor  # (L, N, D, C): states of the tokens at each of D distances; D = 0 if they are not needed
    tokens: np.ndarray  # (N, D): ids of these tokens; -1 where the text starts later


def texts_of(maker: Maker, split: str, n: int, level: str, length: int) -> list[Example]:
    """Returns the texts with a mark among n texts of a split. No text is in two splits."""
    made = (maker.example(split, i, math.ceil(0.9 * length), length, (level,)) for i in range(n))
    return [example for example in made if len(marks(maker, example))]


def places_of(maker: Maker, examples: list[Example]) -> dict[str, tuple[list[Example], list[int]]]:
    """Returns, for each place, the texts as they are read there, and the position of the place in each text."""
    at = [span_end_mark(maker, example) for example in examples]
    out = {"mark": (examples, at)}
    word = maker.tokenizer.encode(f" {DELIMITER}").tolist()
    if maker.markers.has_meta and len(word) == 1:
        meta = maker.tokenizer.meta
        replaced = [e._replace(ids=np.where(e.ids == meta, word[0], e.ids)) for e in examples]
        out["word"] = (replaced, at)
    out["ordinary"] = (examples, [random_ordinary_position(maker, example, i) for i, example in enumerate(examples)])
    return out


@torch.no_grad()
def read(run: Run, examples: list[Example], at: list[list[int]], distances: tuple[int, ...], past_too: bool):
    """Returns a Place for each list of N positions in `at`, and the mean state (L, C) over all positions."""
    here, past, total, count = [[] for _ in at], [[] for _ in at], 0, 0
    back, where = np.array((0, *distances)), np.array(at)[..., None]
    where = where - back  # (places, N, 1 + D)
    there = where >= 1  # position 0 is <|endoftext|> in every text
    with record_states(run.model) as entering:
        for rows, batch in batches(run, examples):
            check_finite(run, hidden_states(run.model, batch).sum().float().cpu().numpy())
            read_states = torch.stack(entering).float()  # (L, B, T, C)
            ends = torch.tensor([len(e.ids) for e in examples[rows]], device=read_states.device)
            real = torch.arange(batch.tokens.size(1), device=ends.device) < ends[:, None]
            total, count = total + read_states[:, real].sum(1).cpu().double(), count + int(real.sum())
            text = torch.arange(len(ends), device=ends.device)[:, None]
            for number, places in enumerate(where[:, rows] if past_too else where[:, rows, :1]):
                found = read_states[:, text, torch.from_numpy(places.clip(min=0)).to(ends.device)].cpu()
                here[number].append(found[:, :, 0])
                past[number].append(found[:, :, 1:])
    out = []
    for number, places in enumerate(where):
        ids = np.array([e.ids[p.clip(min=0)] for e, p in zip(examples, places, strict=True)])
        tokens = np.where(there[number], ids, -1)[:, 1:]
        out.append(Place(torch.cat(here[number], 1), torch.cat(past[number], 1), tokens))
    return out, (total / count).float()


def read_all(
    run: Run, maker: Maker, examples: list[Example], distances: tuple[int, ...], past_too: bool = True
) -> dict[str, tuple[Place, torch.Tensor]]:
    """Returns, for each place, its states and the mean state of the texts in which it was read."""
    out, places = {}, places_of(maker, examples)
    for names in (("mark", "ordinary"), ("word",)):
        asked = {name: places[name] for name in names if name in places}
        if asked:
            read_in = next(iter(asked.values()))[0]
            found, mean = read(run, read_in, [at for _, at in asked.values()], distances, past_too)
            out |= {name: (place, mean) for name, place in zip(asked, found, strict=True)}
    return out


# ----------------------------------------------------------------------------- measuring


def measure_residual(run: Run, maker: Maker, level: str, length: int, cfg: ResidualProbe) -> list[dict]:
    """Returns one line for each place, layer and distance of a cell. Prints each layer as soon as it is measured."""
    sizes = {"train/probe": cfg.train, "val": max(4, cfg.train // 4), "test": cfg.n}
    made = {split: texts_of(maker, split, n, level, length) for split, n in sizes.items()}
    places = [places_of(maker, examples) for examples in made.values()]
    if not any(all(sum(at > min(cfg.distances) for at in of[name][1]) > 1 for of in places) for name in places[0]):
        raise UserError(f"distances={cfg.distances} reach beyond the start of all texts: take shorter ones.")
    splits = {split: read_all(run, maker, of, cfg.distances, split == "test") for split, of in made.items()}
    test, lines = splits["test"], []
    for layer in range(run.model.cfg.n_layer + 1):
        started, mine = time.perf_counter(), []
        for i, d in enumerate(cfg.distances):
            hits: dict[str, np.ndarray] = {}
            for name, (place, mean) in test.items():
                there = place.tokens[:, i] >= 0
                sets = [(splits[split][name][0].here[layer], splits[split][name][0].tokens[:, i]) for split in sizes]
                if min((tokens >= 0).sum() for _, tokens in sets) < 2:
                    continue
                line = {
                    "probe": "residual", **about(maker, level, length), "mark": mark_name(maker), "place": name,
                    "layer": layer, "distance": d, "n": int(there.sum()),
                    **similarity(place.here[layer][there], place.past[layer][there][:, i], mean[layer]),
                }  # fmt: skip
                line |= decoded(sets, hits, name)
                mine.append(line)
            compare(mine, hits, d)
        seconds = time.perf_counter() - started
        lines += [{**line, "seconds": seconds / len(mine)} for line in mine]
        write(progress(mine, seconds) + "\n")
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


def decoded(sets: list[tuple], hits: dict[str, np.ndarray], name: str) -> dict:
    """Returns the decoded shares. sets: states (N, C) and ids (N,) of train, val and test, with -1 for a missing token.
    Stores in hits[name] whether each test text (N,) is right, NaN where there is no token."""
    (x, y), (x_val, y_val), (x_test, y_test) = ((x[y >= 0], y[y >= 0]) for x, y in sets)
    classes, y = np.unique(y, return_inverse=True)
    n, common = len(y_test), classes[np.bincount(y).argmax()]
    named, strength = classify(x, y, len(classes), [x_val, x_test], lambda at: (classes[at] == y_val).mean())
    order = np.random.default_rng(0).permutation(len(y))
    by_chance, _ = classify(x, y[order], len(classes), [x_val, x_test], None, (strength,))
    right = classes[named[1]] == y_test
    hits[name] = np.full(len(sets[2][1]), np.nan)
    hits[name][sets[2][1] >= 0] = right
    return {
        "decoded": float(right.mean()), "decoded_interval": wilson(int(right.sum()), n),
        "majority": float((y_test == common).mean()), "shuffled": float((classes[by_chance[1]] == y_test).mean()),
        "classes": len(classes), "train": len(y), "strength": strength,
        "outcomes": "".join("-" if math.isnan(hit) else str(int(hit)) for hit in hits[name]),
    }  # fmt: skip


def classify(x, y, K: int, others: list, score=None, strengths: tuple[float, ...] = STRENGTHS):
    """Fits multinomial logistic regressions of y (N,) in 0 .. K - 1 on standardized x (N, C). Returns the most likely
    classes for each x of `others`, and the L2 that was used: the one with the best score on the first of `others`, or
    without a score the last one."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, y = (x - mean) / deviation, torch.from_numpy(y)
    others = [(other - mean) / deviation for other in others]
    weight, bias = (torch.zeros(K, size, requires_grad=True) for size in (x.size(1), 1))
    best, chosen = -math.inf, None
    for strength in strengths:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss(strength=strength, optimizer=optimizer):
            optimizer.zero_grad()
            nats = F.cross_entropy(F.linear(x, weight, bias[:, 0]), y) + strength / 2 * weight.square().sum() / K
            nats.backward()
            return nats

        with torch.enable_grad():
            optimizer.step(loss)
        with torch.no_grad():
            named = [F.linear(other, weight, bias[:, 0]).argmax(1).numpy() for other in others]
        now = score(named[0]) if score else math.inf
        if now > best or not score:
            best, chosen = now, (named, strength)
    return chosen


def compare(lines: list[dict], hits: dict[str, np.ndarray], distance: int) -> None:
    """Adds to the line of the mark how much more is decoded from it than from the word in its place, on the same
    texts."""
    if not {"mark", "word"} <= hits.keys():
        return
    there = ~np.isnan(hits["mark"])
    mark, word = (hits[name][there] == 1 for name in ("mark", "word"))
    difference, low, high = paired_difference(mark, word)
    line = next(line for line in lines if (line["place"], line["distance"]) == ("mark", distance))
    line |= {"more": difference, "more_interval": (low, high), "more_p": mcnemar(mark, word)}


# ----------------------------------------------------------------------------- progress


def progress(lines: list[dict], seconds: float) -> str:
    """Returns one line of text about a measured layer, to show the progress."""
    first = lines[0]
    shares = "  ".join(
        f"{name}: " + " ".join(f"{line['decoded']:.0%}" for line in lines if line["place"] == name)
        for name in dict.fromkeys(line["place"] for line in lines)
    )
    cell = f"{first['task']} {first['placement']} {first['length']}"
    return f"{cell}  layer {first['layer']}  decoded {shares}  {seconds:.1f} s"
