"""python probe.py rate_distortion: measures how much of a text can be read from one hidden state, at which rate.

The paper argues that a meta-token compresses what stands before it, and shows bottlenecks trained on 50 texts with a
distortion of 10.0 to 10.8 nats, close to ln 50257 = 10.8, which is guessing. Here the run is frozen and the states of
thousands of texts are read. On each state a variational bottleneck (probes/bottleneck.py) is trained at ten weights
beta of its rate, with early stopping on other texts. It is measured on texts that no probe has seen, those of eval.py
tasks. The states meta, delimiter, last, random and mean (probes/text_positions.py) precede the question, so their
decoder is given it; the state question follows it.

Targets (the classes are the ids that occur as this target in the texts, and distortions are in nats):
    answer    the first id of the answer
    back_D    the id D positions before the state's (--targets back --back D ..)
    bag_N     the N ids before the state's position in any order (--targets bag --bag N): one softmax over the classes,
              whose cross-entropy with the N is divided by N. This is the distortion of an id drawn at random from the
              N, so everything said about one label holds for it. The mean entropy of the N themselves, the `floor`, is
              unavoidable.

Beside each curve stand ln K; the entropy of the labels, both of all texts, with the correction of Miller and Madow, and
of the test texts, without it; the cross-entropy of the test texts by the frequencies of the training texts, which a
constant reaches; the same probe without noise or price (`ceiling` in the lines: it is no bound, because noise keeps a
probe from memorizing texts, and a bottleneck may do better); and the same with shuffled labels. The converse D + R >=
H(Y) must hold at every point within three standard errors, and a point below it is flagged. (H is the entropy of Y
given the question. They are independent in every task but for --question=after, whose question excludes one of 200
answers.) Something is found if a point has less distortion than both H(Y) and the constant.

A rate is an upper bound of the information in the code, and a distortion is an upper bound that depends on this decoder
and the number of texts: a high curve means that the probe did not find the target, not that the state lacks it. Planted
states of width 192 show what can be found (--known; 1000 texts, one seed). If a state holds one item of 200, 0.04 of
5.30 nats are left after 4000 + 1000 texts. If it holds seven and the question names one, 5.23 nats are left, and 5.17
after 16000 + 1000. So "nothing found" says next to nothing about a lookup among several items. With --z_dim 192
--hidden 512 --gates 8 --learning_rate 0.001 4.52 and 3.97 nats are left, but no probe reaches a rate below 17 nats.

States of one checkpoint are compared on the same texts, at equal rates, as far as both reach, unless nothing was found
from either. This says nothing about arms, which need five or more seeds of training."""

import dataclasses
import itertools
import math
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.statistics import DECIDES, decide, holm, seed_difference
from nanometa.common.terminal import BOLD, write
from nanometa.config import Placement, Task
from nanometa.config.checks import check
from nanometa.config.settings import SET, setting
from nanometa.evals.tasks import about, texts
from nanometa.probes import self_check
from nanometa.probes.bottleneck import Member, Source, Training, fit, measure_bottlenecks
from nanometa.probes.marked_texts import MarkedTextsProbe
from nanometa.probes.probe_command import read_earlier_lines, save, warn_if_unlearned
from nanometa.probes.rate_curves import Points, baselines, compared, constant_distortion, converse, found, intervals
from nanometa.probes.residual_stream import check_layer
from nanometa.probes.text_positions import STATES, LocatedText, labels_of, locate_all, missing, queries_of, read_states
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run

SPLITS = ("train/rate_distortion", "val", "test")  # no text is in two splits (tasks/example.py)


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
    val_texts: int = 1000
    states: tuple[Literal["meta", "delimiter", "last", "random", "mean", "question"], ...] = ()
    """states to read; by default meta, delimiter, last and question, as far as the texts have them"""
    layers: tuple[int, ...] = ()
    """layers to read, 0 for the embedding and i for the output of block i; by default the last"""
    targets: tuple[Literal["answer", "back", "bag"], ...] = ("answer",)
    back: tuple[int, ...] = setting((1,), only_with={"targets": ("back",)})
    bag: int = setting(8, only_with={"targets": ("bag",)})
    betas: int = 10
    """number of weights of the rate, from beta_min to beta_max by equal factors; above 1 a rate costs more than it can
    gain"""
    beta_min: float = 0.003
    beta_max: float = 2.0
    seeds: int = 3
    """number of probes of each kind, which differ in initial weights, noise and order of texts"""
    rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """rates in nats at which two curves are compared if both reach them, beside their mean difference"""
    z_dim: int = 32
    """dimensions of the code; several items of 5 nats each fit into 32 at low noise"""
    hidden: int = 64
    """width of the decoder's layer that the question gates; 0 for a linear decoder, as in the paper"""
    gates: float = setting(0.5, only_with={"hidden": SET})
    """initial standard deviation of the question's gates, beside the 1 that all questions share"""
    epochs: int = 30
    patience: int = 10
    """epochs without a better validation after which a probe stops"""
    batch: int = 200
    learning_rate: float = 0.01
    """initial learning rate, which falls to 0 at the last epoch"""
    weight_decay: float = 3.0
    """weight decay of AdamW; with less, a probe memorizes 20 texts per class, and its D at a rate of 0 is far above
    that of a constant"""
    effect: float = 0.0
    margin: float = 0.05
    """in nats: verdicts are about "less distortion by more than effect", and are "does not hold" if the whole interval
    lies within +- margin"""

    BELOW = math.inf

    def __post_init__(self):
        super().__post_init__()
        for name in ("n", "train_texts", "val_texts"):
            check(self, name, 20 <= getattr(self, name) <= 10**6, "be 20 texts or more, and 1000000 at most")
        for name, most in (
            ("bag", 10**4),
            ("betas", 100),
            ("seeds", 100),
            ("z_dim", 10**4),
            ("epochs", 10**5),
            ("patience", 10**5),
            ("batch", 10**6),
        ):
            check(self, name, 1 <= getattr(self, name) <= most, f"lie in 1 .. {most}")
        check(self, "targets", len(self.targets) > 0, "name a target")
        check(self, "back", self.back and min(self.back) >= 1, "be steps back, 1 or more")
        check(self, "hidden", 0 <= self.hidden <= 10**4, "lie in 0 .. 10000")
        check(self, "gates", 0 <= self.gates <= 100, "lie in 0 .. 100")
        check(self, "beta_min", 0 < self.beta_min <= self.beta_max, "be above 0 and at most beta_max")
        check(self, "rates", self.rates and min(self.rates) >= 0, "be 0 nats or more")
        check(self, "learning_rate", 0 < self.learning_rate <= 1, "lie above 0, and be 1 at most")
        check(self, "weight_decay", 0 <= self.weight_decay <= 100, "lie in 0 .. 100")

    @property
    def training(self) -> Training:
        return Training(
            self.z_dim, self.hidden, self.epochs, self.patience, self.batch, self.learning_rate, self.weight_decay,
            gates=self.gates,
        )  # fmt: skip

    @property
    def grid(self) -> list[float]:
        """Returns the betas, the largest first."""
        return np.geomspace(self.beta_max, self.beta_min, self.betas).tolist()

    @property
    def target_names(self) -> list[str]:
        """Returns the names of the targets, such as back_1."""
        names = {"answer": ["answer"], "back": [f"back_{d}" for d in self.back], "bag": [f"bag_{self.bag}"]}
        return [name for target in self.targets for name in names[target]]

    @property
    def reach(self) -> int:
        """Returns the number of tokens that the targets need before a state's position."""
        return max([0, *(int(name.partition("_")[2]) for name in self.target_names if name != "answer")])


def main(cfg: RateDistortionProbe) -> None:
    if cfg.known:
        write(self_check.report() + "\n")
        for items, times in self_check.PLANTED:
            sources = self_check.lookups(items, (times * cfg.train_texts, cfg.val_texts, cfg.n))
            line, _ = curve(dataclasses.replace(cfg, seeds=1), sources, self_check.POOL, items)
            write(self_check.lookup_report(items, line) + "\n")
        return
    run, facts = cfg.open()
    layers = list(cfg.layers or (run.model.cfg.n_layer,))
    for layer in layers:
        check_layer(run.model, layer)
    cells = cells_of(cfg, run)  # refuses texts, states and targets that the run lacks
    output = cfg.lines(run, "rate_distortion")
    how = dataclasses.asdict(cfg.training)  # curves of probes with other training settings belong in another picture
    before = [
        line
        for line in read_earlier_lines(output, "rate_distortion", facts)
        if line["kind"] == "curve" and all(line.get(name) == value for name, value in how.items())
    ]
    write(f"{facts['arm']}, {run.folder}\n", BOLD)
    curves, comparisons = [], []
    with cfg.autocast(run):
        answered_by_cell = warn_if_unlearned(run, cells, cfg.n)
    for (maker, level, length), answered in zip(cells, answered_by_cell, strict=True):
        cell = measure_cell(cfg, run, maker, level, length, layers)
        curves += [{**line, "answered": answered} for line, _ in cell]
        comparisons += compare_cell(cfg, cell)
    if not curves:
        raise UserError(
            f"targets={cfg.targets} leave nothing to measure at the states asked for, because mean has no position and "
            f"at the others the target is always the same id: ask for other targets or states."
        )
    judge(cfg, comparisons)
    lines = [{**facts, **line} for line in curves + comparisons]
    save(output, "rate_distortion", before, lines, [])


def print_epoch(epoch: int, training: int) -> None:
    """Shows on a terminal how far the training of a curve's probes is; prints nothing elsewhere."""
    if sys.stdout.isatty():
        write(f"\repoch {epoch}, {training} probes still train \r")


def progress(line: dict) -> str:
    """Returns one line of text about a measured curve, to show the progress."""
    ends = " .. ".join(f"({line['points'][k]['rate']:.2f}, {line['points'][k]['distortion']:.3f})" for k in (0, -1))
    flag = f"  BELOW THE CONVERSE at {line['violations']} points" if line["violations"] else ""
    return (
        f"{line['target']:<8} layer {line['layer']:<2} {line['state']:<10} (R, D) {ends}  no bottleneck "
        f"{line['ceiling']['distortion']:.3f}  shuffled {line['shuffled']['distortion']:.3f}  H {line['entropy']:.3f}"
        f"  {'found' if line['found'] else 'nothing found'}  {line['seconds']:.0f} s{flag}"
    )


def cells_of(cfg: RateDistortionProbe, run: Run) -> list[tuple[Maker, str, int]]:
    """Returns the Maker of each cell's texts, their level and length. Raises UserError if there are no such texts, if
    they are too long for the model, or if the first ones lack a named state or target."""
    out = []
    for maker, level, length in cfg.readable(run):
        first = texts(maker, level, length, 20)
        states_of(cfg, maker, locate_all(maker, first, run.config.target_rule, cfg.reach, "test"))
        out.append((maker, level, length))
    return out


def states_of(cfg: RateDistortionProbe, maker: Maker, of: list[LocatedText]) -> list[str]:
    """Returns the states to read. Raises UserError if some texts lack a state that was named."""
    where = f"{maker.name} with placement {maker.placement}"
    for name in cfg.states:
        if why := missing(name, of):
            raise UserError(
                f"states={name} does not exist in {where}, because {why}: leave it out, or take other --placements."
            )
    names = [name for name in STATES if name in (cfg.states or ("meta", "delimiter", "last", "question"))]
    names = [name for name in names if not missing(name, of)]
    for name in names if cfg.reach else ():
        least = min(text.at[name] for text in of)
        if least < cfg.reach:
            raise UserError(
                f"targets={cfg.target_names} ask for {cfg.reach} tokens before the state {name}, and a text of {where} "
                f"has {least}: lower --back and --bag, or take other --states."
            )
    return names


def measure_cell(cfg: RateDistortionProbe, run: Run, maker: Maker, level: str, length: int, layers: list[int]):
    """Returns all curves of a cell: their lines, each with its Points."""
    started = time.perf_counter()
    sizes = (cfg.train_texts, cfg.val_texts, cfg.n)
    examples = [texts(maker, level, length, n, split) for split, n in zip(SPLITS, sizes, strict=True)]
    rule = run.config.target_rule
    splits = [locate_all(maker, of, rule, cfg.reach, split) for of, split in zip(examples, SPLITS, strict=True)]
    names = states_of(cfg, maker, [text for of in splits for text in of])
    with cfg.autocast(run):
        read = [read_states(run, of, at, names, layers) for of, at in zip(examples, splits, strict=True)]
    queries, Q = queries_of(splits)
    reading = time.perf_counter() - started
    write(
        f"{maker.name}, {maker.placement}, {length} positions: {sum(sizes)} texts read in {reading:.0f} s, states "
        f"{', '.join(names)}\n"
    )
    out = []
    for target, (i, layer), (j, name) in itertools.product(cfg.target_names, enumerate(layers), enumerate(names)):
        if name == "mean" and target != "answer":  # a mean has no position
            continue
        labels, K = labels_of(target, name, splits)
        if K < 2:
            write(f"without {target} at the state {name}, which is always the same id\n")
            continue
        here = [part[i, j] for part in read]
        mean, deviation = here[0].mean(dim=0), here[0].std(dim=0).clamp(min=1e-6)
        source_queries = queries if target == "answer" else [query[:, :0] for query in queries]
        sources = [
            Source((x - mean) / deviation, q.to(x.device), torch.from_numpy(y).to(x.device))
            for x, q, y in zip(here, source_queries, labels, strict=True)
        ]
        line = {
            "probe": "rate_distortion", "kind": "curve", **about(maker, level, length), "layer": layer, "state": name,
            "told_the_question": target == "answer", "target": target,
        }  # fmt: skip
        figures, points = curve(cfg, sources, K, Q)
        out.append(({**line, **figures, "seconds_reading": reading}, points))
        write(progress(out[-1][0]) + "\n")
    return out


def curve(cfg: RateDistortionProbe, sources: list[Source], K: int, Q: int) -> tuple[dict, Points]:
    """Trains probes on the first source, stops them early by their figures on the second, and returns their figures on
    the third."""
    started = time.perf_counter()
    train, val, test = (source.labels.cpu().numpy() for source in sources)
    kinds = [(beta, "bottleneck") for beta in cfg.grid] + [(0.0, "ceiling"), (0.0, "shuffled")]
    members = [Member(beta, seed, kind) for beta, kind in kinds for seed in range(cfg.seeds)]
    weights = fit(sources[0], sources[1], K, Q, members, cfg.training, print_epoch)
    D, R = (
        x.double().numpy().reshape(len(kinds), cfg.seeds, -1)
        for x in measure_bottlenecks(weights, sources[2], members, cfg.training)
    )
    facts = baselines(train, val, test, K)
    points = Points(D[: cfg.betas], R[: cfg.betas], constant_distortion(train, test, K))
    low, high = intervals(points)
    something = found(points, facts["entropy"])
    drawn = [
        {
            "beta": beta, "rate": float(R[k].mean()), "distortion": float(D[k].mean()),
            "rates": R[k].mean(axis=1).tolist(), "distortions": D[k].mean(axis=1).tolist(),
            "rate_interval": (low[0, k], high[0, k]), "distortion_interval": (low[1, k], high[1, k]),
            "seed_interval": over_seeds(D[k].mean(axis=1)), **converse(D[k], R[k], facts),
        }
        for k, beta in enumerate(cfg.grid)
    ]  # fmt: skip
    ends = {
        kinds[k][1]: {
            "distortion": float(D[k].mean()),
            "distortions": D[k].mean(axis=1).tolist(),
            "seed_interval": over_seeds(D[k].mean(axis=1)),
        }
        for k in (cfg.betas, cfg.betas + 1)
    }
    sizes = {"n": len(test), "train_texts": len(train), "val_texts": len(val), "probe_seeds": cfg.seeds}
    figures = {
        **sizes, **dataclasses.asdict(cfg.training), "classes": K, **facts, "points": drawn, **ends, "found": something,
        "violations": sum(point["violates_converse"] for point in drawn), "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return figures, points


def over_seeds(values: np.ndarray) -> tuple[float, float] | None:
    """Returns the 95 % interval of a mean over probe seeds by Student's t, None for one seed."""
    return seed_difference(values, np.zeros(len(values)))[1:] if len(values) > 1 else None


def compare_cell(cfg: RateDistortionProbe, cell: list[tuple[dict, Points]]) -> list[dict]:
    """Returns lines that compare the first state with each other state, at every layer. They are only about the target
    `answer`, because other targets differ between states."""
    out = []
    for layer in dict.fromkeys(line["layer"] for line, _ in cell):
        here = [(line, points) for line, points in cell if line["target"] == "answer" and line["layer"] == layer]
        for (first, points), (second, others) in ((here[0], other) for other in here[1:]):
            same = ("probe", "task", "placement", "level", "question", "length", "layer", "target", "entropy")
            out.append({
                **{name: first[name] for name in same}, "kind": "comparison",
                "states": [first["state"], second["state"]], "n": first["n"], "probe_seeds": cfg.seeds,
                **compared(points, others, list(cfg.rates), first["entropy"], (first["found"], second["found"])),
            })  # fmt: skip
    return out


def judge(cfg: RateDistortionProbe, comparisons: list[dict]) -> None:
    """Adds verdicts on "the first has less distortion at equal rates by more than `effect`". Holm's family is all
    lines."""
    for line, adjusted in zip(comparisons, holm([line["p"] for line in comparisons]), strict=True):
        low, high = line["difference_interval"]
        verdict = decide(-high, -low, adjusted, cfg.effect, cfg.margin, line["n"])
        if line["n"] >= DECIDES:
            verdict = within_reach(line, verdict)
        line |= {
            "holm": adjusted, "comparisons": len(comparisons), "effect": cfg.effect, "margin": cfg.margin,
            "claim": "less distortion at equal rates, of this checkpoint", "verdict": verdict,
        }  # fmt: skip


def within_reach(line: dict, verdict: str) -> str:
    """Restricts a verdict to the rates that were compared, and withdraws it where nothing was found from either
    state."""
    nothing = [name for name, something in zip(line["states"], line["found"], strict=True) if not something]
    if len(nothing) == 2:
        return "nothing found from either"
    if line["up_to"] < line["entropy"]:
        verdict += f" up to R = {line['up_to']:.2f}"
    return f"{verdict}; nothing found from {nothing[0]}" if nothing else verdict
