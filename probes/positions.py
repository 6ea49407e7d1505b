"""python probe.py positions: tests whether a trained run needs the position and the embedding of its meta-tokens.

In the paper's Table 2, whose cells have about 18 texts, more answers are right if the position encoding of meta-tokens
is zeroed at inference only. The paper says that zeroing their token embedding instead hurts. Here the same weights read
the same texts under these conditions:

    full                as the run was trained
    no_position         with no position at meta-tokens: no row of the learned table, or with rope an angle of 0 for
                        their q and k, in both attentions
    no_position_first   with rope: in causal attention only
    no_position_second  with rope: in the second attention only (which changes nothing with one meta-token in a text)
    no_position_pairs   with rope and --every_reading: neither q nor k is rotated in a product of a meta-token with any
                        token
    no_position_zeros   with rope and --every_reading: cos = sin = 0 at meta-tokens, so that their q and k are zero
    no_embedding        with zeros for the token embedding where the input is <|meta|>, but with its position; the
                        output head, which shares the table, is unchanged
    neither             with no position and no embedding

The paper does not say what zeroing a rotary position means. An angle of 0 (no_position) still leaves the other token's
position in each product with a meta-token; pairs and zeros are two other readings (probes/rotations.py).

Each is compared with `full`, text by text. The verdicts are about this checkpoint; verdicts about its arm need several
seeds."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

from nanometa.common.errors import UserError
from nanometa.common.statistics import bits
from nanometa.common.terminal import write
from nanometa.config import GPTConfig
from nanometa.config.tasks import PLACEMENTS
from nanometa.evals.tasks import read, texts
from nanometa.inference.generation import knows_meta
from nanometa.model import GPT
from nanometa.probes.marked_texts import MarkedTextsProbe, paired_claim
from nanometa.probes.probe_command import run_probe
from nanometa.probes.rotations import READINGS, without_rotation
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run

# name -> (meta_position, None as trained, or a reading of probes/rotations.py; whether the embedding is kept)
CONDITIONS = {
    "full": (None, True),
    "no_position": ("none", True),
    "no_position_first": ("none_first", True),
    "no_position_second": ("none_second", True),
    "no_position_pairs": ("pairs", True),
    "no_position_zeros": ("zeros", True),
    "no_embedding": (None, False),
    "neither": ("none", False),
}
CLAIMS = {"difference": ""}  # as in marked_texts.judged


@dataclass(frozen=True)
class PositionsProbe(MarkedTextsProbe):
    """Measures exact answers to task texts whose meta-tokens have lost their position or embedding."""

    every_reading: bool = False
    """with rope, also measure no_position_pairs and no_position_zeros, two other readings of "no position\""""

    def conditions(self, m: GPTConfig) -> list[str]:
        """Returns the conditions to measure in a model. Those that would have no effect of their own are left out."""
        return [name for name in CONDITIONS if self.asks_for(name) and not useless(name, m)]

    def asks_for(self, condition: str) -> bool:
        return self.every_reading or CONDITIONS[condition][0] not in READINGS


def main(cfg: PositionsProbe) -> None:
    run, facts = cfg.open()
    if run.model.cfg.second.markers == "refused" or not knows_meta(run):
        raise UserError(f"{run.folder} was trained without meta-tokens: take a run that knows them.")
    placements = run.config.task.placements
    without = [name for name in placements if not PLACEMENTS[name].has_meta]
    cells = cfg.marked_cells(run, tuple(name for name in placements if name not in without), only_meta=True)
    reasons = {name: why for name in CONDITIONS if cfg.asks_for(name) and (why := useless(name, run.model.cfg))}
    if cfg.every_reading and (why := reasons.get(f"no_position_{READINGS[0]}")):
        raise UserError(f"--every_reading has no effect on {run.folder}, a run {why}: leave it out.")
    left_out = [f"{name} is left out for a run {why}\n" for name, why in reasons.items()]
    if without and not cfg.placements:
        left_out.append(f"texts without meta-tokens are left out: placement {', '.join(without)}\n")
    run_probe(cfg, "positions", run, facts, cells, CLAIMS, measure_positions, preface="".join(left_out))


def useless(condition: str, m: GPTConfig) -> str:
    """Returns the reason why a condition would have no effect of its own in a model, or "" if it has one."""
    place, _ = CONDITIONS[condition]
    if place is not None and m.meta_position != "same":
        return f"whose meta-tokens had no position in training (meta_position={m.meta_position})"
    if place in ("none_first", "none_second", *READINGS) and m.position == "learned":
        return "whose learned positions are added before any attention"
    if place in READINGS and m.rope_dynamic:
        return "whose dynamic rotary scale rotates each key differently for each query"
    if place in ("none_first", "none_second") and not m.second.has_layer:
        return "which has one attention"
    if place in ("none_first", "none_second") and m.second.window == 1:
        return "whose second attention reads one position at a time, so that no distance matters in it"
    return ""


@contextlib.contextmanager
def under(model: GPT, meta: int, condition: str) -> Iterator[None]:
    """Lets the model read under a condition within the context, and restores it afterwards, also after an error. `meta`
    is the id of <|meta|>. Raises UserError for a condition that does not exist for the model's kind of positions."""
    place, embedded = CONDITIONS[condition]
    trained = model.cfg
    if place in READINGS and (why := useless(condition, trained)):
        raise UserError(f"condition {condition} does not exist for a run {why}: leave it out.")
    changed = dataclasses.replace(trained, meta_position=trained.meta_position if place in (None, *READINGS) else place)
    changed.check_position()

    def silenced(wte, inputs, rows):  # rows (B, T, C)
        return rows.masked_fill((inputs[0] == meta)[..., None], 0)

    with contextlib.ExitStack() as hooks:
        if not embedded:
            hooks.enter_context(model.wte.register_forward_hook(silenced))
        if place in READINGS:
            hooks.enter_context(without_rotation(model, meta, place))
        model.cfg = changed
        try:
            yield
        finally:
            model.cfg = trained


def measure_positions(cfg: PositionsProbe, run: Run, maker: Maker, level: str, length: int) -> list[dict]:
    """Returns one line for each condition about n texts of the test split. These are the texts of eval.py tasks, and
    they are generated only once. Every line but that of `full` has its difference from `full`. Prints the cell's
    figures."""
    examples, lines = texts(maker, level, length, cfg.n), []
    for name in cfg.conditions(run.model.cfg):
        started = time.perf_counter()
        with under(run.model, run.tokenizer.meta, name):
            figures = read(run, examples, length)
        lines.append({
            "condition": name, **figures, "chance": maker.task.CHANCE, "seconds": time.perf_counter() - started,
        })  # fmt: skip
    for line in lines[1:]:
        right = bits(line["outcomes"]), bits(lines[0]["outcomes"])
        line |= {**paired_claim("difference", CLAIMS["difference"], *right), "claim": "better than full"}
    exact = "  ".join(f"{line['condition']} {line['exact']:.1%}" for line in lines)
    write(f"  {exact}  {sum(line['seconds'] for line in lines):.1f} s\n")
    return lines
