"""python probe.py rate_distortion: measures how much of a text can be read from one hidden state, by rate.

The paper argues that a meta-token compresses what comes before it, and shows bottlenecks trained on 50 texts with a
distortion of 10.0 to 10.8 nats, close to the ln 50257 = 10.8 of guessing. Here the run is frozen and the states of
thousands of texts are read. On each state a variational bottleneck (probes/bottleneck.py) is trained at ten weights
beta of its rate, with early stopping on other texts. It is measured on the texts of eval.py tasks, which no probe has
seen. The states meta, delimiter, last, random and mean (probes/text_positions.py) precede the question, so their
decoder is given the question; the state `question` follows it.

Targets (the classes are the ids that occur as this target in the texts, and distortions are in nats):
    answer    the first id of the answer
    back_D    the id D positions before the state's (--targets back --back D ..)

Each curve is compared with
    ln K       for K classes
    H(Y)       the entropy of the labels: of all texts, with the correction of Miller and Madow, and of the test texts,
               without the correction
    constant   the cross-entropy of the test texts under the class frequencies of the training texts
    ceiling    the distortion of the same probe without noise and with a rate that costs nothing. It is not a bound: a
               bottleneck may do better, because noise keeps a probe from memorizing texts
    shuffled   a ceiling trained on shuffled labels

The converse D + R >= H(Y) must hold at every point within three standard errors, and a point below it is flagged. (H is
the entropy of Y given the question. Y and the question are independent in every task, except with --question=after,
whose question excludes one of 200 answers.) Something is found if a point has less distortion than both H(Y) and the
constant.

A rate is an upper bound of the information in the code, and a distortion is an upper bound that depends on this decoder
and the number of texts: a high curve means that the probe did not find the target, not that the state lacks it. Planted
states of width 192 show what can be found (--known; 1000 texts, one seed). If a state holds one item of 200, 0.04 of
5.30 nats are left after training on 4000 texts (and 1000 more for early stopping). If it holds seven items and the
question names one, 5.23 nats are left, and 5.17 after training on 16000 texts. So "nothing found" says next to nothing
about a lookup among several items. With the settings --z_dim 192 --hidden 512 --gates 8 --learning_rate 0.001, these
two figures are 4.52 and 3.97 nats, but no probe reaches a rate below 17 nats.

The states of one checkpoint are compared on the same texts and at equal rates, up to the largest rate that both reach.
If nothing was found from either state, there is no verdict. The comparison says nothing about arms, which need five or
more seeds of training."""

import dataclasses
import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.statistics import DECIDES, seed_difference
from nanometa.common.terminal import write
from nanometa.config import Placement, Task
from nanometa.config.checks import check, field_names
from nanometa.config.settings import setting
from nanometa.evals.common import check_ranges, progress
from nanometa.evals.tasks import texts
from nanometa.probes import self_check
from nanometa.probes.bottleneck import Member, Source, Training, fit, measure_bottlenecks
from nanometa.probes.marked_texts import MarkedTextsProbe, judged
from nanometa.probes.probe_command import run_probe
from nanometa.probes.rate_curves import Points, baselines, compared, constant_distortion, converse, found, intervals
from nanometa.probes.residual_stream import check_layer
from nanometa.probes.text_positions import (
    STATES,
    LocatedText,
    labels_of,
    locate_all,
    missing,
    queries_of,
    states_of_texts,
)
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run

SPLITS = ("train/rate_distortion", "val", "test")  # no text is in two splits (tasks/example.py)
VAL_TEXTS = 1000  # texts that stop the training of probes
BETAS = tuple(np.geomspace(2.0, 0.003, 10).tolist())  # prices of the rate; above 1 a rate costs more than it can gain
# rates in nats at which two curves are compared, if both reach them; the mean difference over all rates is also given
RATES = (1.0, 2.0, 4.0, 8.0)
CLAIMS = {"difference": ""}  # as in marked_texts.judged


@dataclass(frozen=True)
class RateDistortionProbe(MarkedTextsProbe):
    """Measures rate and distortion of bottlenecks on frozen hidden states, in nats."""

    known: bool = False
    """check the probe on sources whose answer is known, instead of reading a run"""
    tasks: tuple[Task, ...] = ("list_recall",)
    """tasks to read; each has cells of its own"""
    placements: tuple[Placement, ...] = ("target",)
    """placements of meta-tokens to read; each has cells of its own"""
    n: int = 1000
    """number of test texts in each cell"""
    train_texts: int = 4000
    """number of texts that probes are trained on; 1000 more texts decide when the training stops"""
    states: tuple[Literal["meta", "delimiter", "last", "random", "mean", "question"], ...] = ()
    """states to read; by default meta, delimiter, last and question, as far as the texts have them"""
    layers: tuple[int, ...] = ()
    """layers to read: 0 is the embedding, and i is the state after i blocks; by default the last"""
    targets: tuple[Literal["answer", "back"], ...] = ("answer",)
    back: tuple[int, ...] = setting((1,), only_with={"targets": ("back",)})
    """distances of the target back, in positions before the state"""
    seeds: int = 3
    """number of probes of each kind, which differ in initial weights, noise and order of texts"""
    training: Training = field(default_factory=Training)
    effect: float = 0.0
    margin: float = 0.05
    """in nats: the claim is "less distortion by more than effect"; its verdict is "does not hold" if the whole interval
    of the difference lies within +- margin"""

    BELOW = math.inf

    def __post_init__(self):
        super().__post_init__()
        check(self, "targets", self.targets, "name a target")
        check_ranges(self, n=(20, 10**6), train_texts=(20, 10**6), back=(1, 10**5), seeds=(1, 100))

    @property
    def distances(self) -> dict[str, int]:
        """Returns the names of the targets, such as back_1, with their distance from the state; the answer's is 0."""
        names = {"answer": {"answer": 0}, "back": {f"back_{d}": d for d in self.back}}
        return {name: back for target in self.targets for name, back in names[target].items()}

    @property
    def reach(self) -> int:
        """Returns the number of tokens that the targets need before a state's position."""
        return max(self.distances.values())


def main(cfg: RateDistortionProbe) -> None:
    if cfg.known:
        used = {"known", "n", "train_texts", *field_names(Training)}
        if idle := [name for name in cfg.typed if name not in used]:
            raise UserError(f"--{idle[0]} has no effect with --known, which reads no run: leave one of them out.")
        write(self_check.report() + "\n")
        for items, times in self_check.PLANTED:
            sizes = enumerate((times * cfg.train_texts, VAL_TEXTS, cfg.n), start=1)
            sources = [self_check.lookup(items, n, seed) for seed, n in sizes]
            line, _ = curve(dataclasses.replace(cfg, seeds=1), sources, self_check.POOL, items)
            write(self_check.lookup_report(items, line) + "\n")
        return
    run, facts = cfg.open()
    for layer in cfg.layers:
        check_layer(run.model, layer)
    cells = cfg.cells(run)
    for maker, level, length in cells:  # raises UserError for texts, states or targets that the run lacks
        states_of(cfg, maker, locate_all(run, maker, texts(maker, level, length, 20), cfg.reach, "test"))
    # curves of probes with other training settings belong in another picture
    how = dataclasses.asdict(cfg.training)
    run_probe(cfg, "rate_distortion", run, facts, cells, CLAIMS, measure_cell, judge=judged_within_reach, alike=how)


def states_of(cfg: RateDistortionProbe, maker: Maker, of: list[LocatedText]) -> list[str]:
    """Returns the states to read. Raises UserError if some texts lack a state that was named."""
    where = f"{maker.name} with placement {maker.placement}"
    for name in cfg.states:
        if why := missing(name, of):
            raise UserError(
                f"states={name} does not exist in {where}, because {why}: leave it out, or take other --placements."
            )
    wanted = cfg.states or ("meta", "delimiter", "last", "question")
    names = [name for name in STATES if name in wanted and not missing(name, of)]
    for name in names:
        if (least := min(text.at[name] for text in of)) < cfg.reach:
            raise UserError(
                f"back={cfg.back} asks for {cfg.reach} tokens before the state {name}, and a text of {where} has "
                f"{least}: lower --back, or take other --states."
            )
    return names


def measure_cell(cfg: RateDistortionProbe, run: Run, maker: Maker, level: str, length: int) -> list[dict]:
    """Returns the lines of a cell: its curves, and their comparisons. Prints each curve as soon as it is measured."""
    started, layers = time.perf_counter(), list(cfg.layers or (run.model.cfg.n_layer,))
    sizes = (cfg.train_texts, VAL_TEXTS, cfg.n)
    examples = [texts(maker, level, length, n, split) for split, n in zip(SPLITS, sizes, strict=True)]
    splits = [locate_all(run, maker, of, cfg.reach, split) for of, split in zip(examples, SPLITS, strict=True)]
    names = states_of(cfg, maker, list(itertools.chain(*splits)))
    read = [states_of_texts(run, of, at, names, layers) for of, at in zip(examples, splits, strict=True)]
    queries, Q = queries_of(splits)
    reading, curves = time.perf_counter() - started, []
    write(f"  {sum(sizes)} texts read in {reading:.0f} s, states {', '.join(names)}\n")
    for (target, back), (i, layer), (j, name) in itertools.product(
        cfg.distances.items(), enumerate(layers), enumerate(names)
    ):
        labels, K = labels_of(back, name, splits)
        if K < 2 or (back and name == "mean"):
            why = "the target is always the same id" if K < 2 else "this state has no position"
            write(f"  {target} at the state {name} is left out, because {why}\n")
            continue
        here = [part[i, j] for part in read]
        mean, deviation = here[0].mean(dim=0), here[0].std(dim=0).clamp(min=1e-6)
        told = [query[:, :0] if back else query for query in queries]
        sources = [
            Source((x - mean) / deviation, query.to(x.device), y.to(x.device))
            for x, query, y in zip(here, told, labels, strict=True)
        ]
        with torch.autocast(mean.device.type, enabled=False):
            figures, points = curve(cfg, sources, K, Q)
        line = {
            "kind": "curve", "layer": layer, "state": name,
            "told_the_question": not back, "target": target, **figures, "seconds_reading": reading,
        }  # fmt: skip
        write_progress(line)
        curves.append((line, points))
    return [line for line, _ in curves] + compare_states(curves)


def curve(cfg: RateDistortionProbe, sources: list[Source], K: int, Q: int) -> tuple[dict, Points]:
    """Trains probes on the first source, stops them early by their figures on the second, and returns their figures on
    the third."""
    started, how = time.perf_counter(), cfg.training
    train, val, test = (source.labels[:, 0].cpu().numpy() for source in sources)
    kinds = [(beta, "bottleneck") for beta in BETAS] + [(0.0, "ceiling"), (0.0, "shuffled")]
    members = [Member(beta, seed, kind) for beta, kind in kinds for seed in range(cfg.seeds)]
    with progress("training probes", how.epochs) as advance:
        weights = fit(sources[0], sources[1], K, Q, members, how, advance)
    measured = measure_bottlenecks(weights, sources[2], members, how)
    D, R = (x.double().numpy().reshape(len(kinds), cfg.seeds, -1) for x in measured)
    facts = baselines(train, val, test, K)
    points = Points(D[: len(BETAS)], R[: len(BETAS)], constant_distortion(train, test, K))
    low, high = intervals(points)
    drawn = [
        {
            "beta": beta, "rate": float(R[k].mean()), "rates": R[k].mean(axis=1).tolist(), **over_seeds(D[k]),
            "rate_interval": (low[0, k], high[0, k]), "distortion_interval": (low[1, k], high[1, k]),
            **converse(D[k], R[k], facts),
        }
        for k, beta in enumerate(BETAS)
    ]  # fmt: skip
    figures = {
        "n": len(test), "train_texts": len(train), "val_texts": len(val), "probe_seeds": cfg.seeds,
        **dataclasses.asdict(how), "classes": K, **facts, "points": drawn,
        "ceiling": over_seeds(D[-2]), "shuffled": over_seeds(D[-1]), "found": found(points, facts["entropy"]),
        "violations": sum(point["violates_converse"] for point in drawn), "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return figures, points


def over_seeds(distortion: np.ndarray) -> dict:
    """Returns the mean distortion, from (seeds, N), and that of each seed, with the 95 % interval over seeds by
    Student's t, which is None for one seed."""
    seeds = distortion.mean(axis=1)
    interval = seed_difference(seeds, np.zeros(len(seeds)))[1:] if len(seeds) > 1 else None
    return {"distortion": float(distortion.mean()), "distortions": seeds.tolist(), "seed_interval": interval}


def write_progress(line: dict) -> None:
    """Prints the figures of a measured curve."""
    ends = " .. ".join(f"({line['points'][k]['rate']:.2f}, {line['points'][k]['distortion']:.3f})" for k in (0, -1))
    flag = f"  BELOW THE CONVERSE at {line['violations']} points" if line["violations"] else ""
    write(
        f"  {line['target']:<8} layer {line['layer']:<2} {line['state']:<10} (R, D) {ends}  no bottleneck "
        f"{line['ceiling']['distortion']:.3f}  shuffled {line['shuffled']['distortion']:.3f}  H {line['entropy']:.3f}"
        f"  {'found' if line['found'] else 'nothing found'}  {line['seconds']:.0f} s{flag}\n"
    )


def compare_states(curves: list[tuple[dict, Points]]) -> list[dict]:
    """Returns lines that compare the first state with each other state, at every layer. They are only about the target
    `answer`, because other targets differ between states."""
    out, firsts = [], {}
    for line, points in curves:
        if line["target"] != "answer":
            continue
        first, theirs = firsts.setdefault(line["layer"], (line, points))
        if first is line:
            continue
        out.append({
            **{name: first[name] for name in ("layer", "target", "entropy", "n", "probe_seeds")},
            "kind": "comparison", "states": [first["state"], line["state"]],
            "claim": "less distortion at equal rates, of this checkpoint",
            **compared(theirs, points, list(RATES), first["entropy"], (first["found"], line["found"])),
        })  # fmt: skip
    return out


def judged_within_reach(lines: list[dict], claims: dict[str, str], effect: float, margin: float) -> list[dict]:
    """Adds verdicts on the claim that the first state has less distortion at equal rates by more than `effect`.
    Restricts a verdict to the compared rates, and withdraws it if the probe found nothing in either state."""
    for line in judged(lines, claims, effect, margin, sign=-1):
        if "verdict" not in line or line["n"] < DECIDES:
            continue
        nothing = [name for name, something in zip(line["states"], line["found"], strict=True) if not something]
        if line["up_to"] < line["entropy"]:
            line["verdict"] += f" up to R = {line['up_to']:.2f}"
        if nothing:
            line["verdict"] += f"; nothing found from {nothing[0]}"
        if len(nothing) == 2:
            line["verdict"] = "nothing found from either"
    return lines
