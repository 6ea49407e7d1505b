"""python probe.py positions: tests whether a trained run needs the position and the embedding of its meta-tokens.

In the paper's Table 2, whose cells have about 18 texts, more answers are right if the position encoding of meta-tokens
is zeroed at inference only. The paper says that zeroing their token embedding instead hurts. Here the same weights read
the same texts under these conditions:

    full                as the run was trained
    no_position         with no position at meta-tokens: no row of the learned table, or with rope an angle of 0 for
                        their q and k, in both attentions
    no_position_first   with rope: in causal attention only
    no_position_second  with rope: in the second attention only (which changes nothing with one meta-token in a text)
    no_embedding        with zeros for the token embedding where the input is <|meta|>, but with its position; the
                        output head, which shares the table, is unchanged
    neither             with no position and no embedding

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
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run

# name -> (meta_position, where None means as trained; whether the embedding is kept)
CONDITIONS = {
    "full": (None, True),
    "no_position": ("none", True),
    "no_position_first": ("none_first", True),
    "no_position_second": ("none_second", True),
    "no_embedding": (None, False),
    "neither": ("none", False),
}
CLAIMS = {"difference": ""}  # as in marked_texts.judged


@dataclass(frozen=True)
class PositionsProbe(MarkedTextsProbe):
    """Measures exact answers to task texts whose meta-tokens have lost their position or embedding."""


def main(cfg: PositionsProbe) -> None:
    run, facts = cfg.open()
    if run.model.cfg.second.markers == "refused" or not knows_meta(run):
        raise UserError(f"{run.folder} was trained without meta-tokens: take a run that knows them.")
    placements = run.config.task.placements
    without = [name for name in placements if not PLACEMENTS[name].has_meta]
    cells = cfg.marked_cells(run, tuple(name for name in placements if name not in without), only_meta=True)
    left_out = [f"{name} is left out for a run {why}\n" for name in CONDITIONS if (why := useless(name, run.model.cfg))]
    if without and not cfg.placements:
        left_out.append(f"texts without meta-tokens are left out: placement {', '.join(without)}\n")
    run_probe(cfg, "positions", run, facts, cells, CLAIMS, measure_positions, preface="".join(left_out))


def useless(condition: str, m: GPTConfig) -> str:
    """Returns the reason why a condition would have no effect of its own in a model, or "" if it has one."""
    place, _ = CONDITIONS[condition]
    if place is not None and m.meta_position != "same":
        return f"whose meta-tokens had no position in training (meta_position={m.meta_position})"
    if place in ("none_first", "none_second") and m.position == "learned":
        return "whose learned positions are added before any attention"
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
    changed = dataclasses.replace(trained, meta_position=place or trained.meta_position)
    changed.check_position()

    def silenced(wte, inputs, rows):  # rows (B, T, C)
        return rows.masked_fill((inputs[0] == meta)[..., None], 0)

    with contextlib.nullcontext() if embedded else model.wte.register_forward_hook(silenced):
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
    for name in CONDITIONS:
        if useless(name, run.model.cfg):
            continue
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
