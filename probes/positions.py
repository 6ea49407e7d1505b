"""python probe.py positions: tests whether a trained run needs the position and the embedding of its meta-tokens.

In the paper's Table 2, more answers are right if the position encoding at meta-tokens is zeroed, only at inference, in
cells of about 18 texts. The paper says that zeroing their token embedding instead hurts. Here the same weights read the
same texts under these conditions:

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nanometa.common.errors import UserError
from nanometa.common.statistics import bits, decide, holm, mcnemar, paired_difference
from nanometa.common.terminal import write
from nanometa.config import GPTConfig
from nanometa.config.tasks import PLACEMENTS
from nanometa.evals.tasks import about, read, texts
from nanometa.model import GPT
from nanometa.probes.marked_texts import MarkedTextsProbe, knows_meta
from nanometa.probes.probe_command import measure_cells
from nanometa.tasks.example import Example, Maker
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


@dataclass(frozen=True)
class PositionsProbe(MarkedTextsProbe):
    """Measures exact answers to task texts whose meta-tokens have lost their position or embedding."""

    conditions: tuple[
        Literal["full", "no_position", "no_position_first", "no_position_second", "no_embedding", "neither"], ...
    ] = ()
    """conditions under which texts are read, by default all that the run allows; full is always included"""


def main(cfg: PositionsProbe) -> None:
    run, facts = cfg.open()
    names, unavailable = conditions_of(cfg, run)
    cells = cells_of(cfg, run)  # refuses texts that the run cannot read
    left_out = [f"without {', '.join(of)}, for a run {why}\n" for why, of in unavailable.items()]
    without = [name for name in run.config.task.placements if not PLACEMENTS[name].has_meta]
    if without and not cfg.placements:
        left_out.append(f"without placement {', '.join(without)}, whose texts have no meta-tokens\n")

    def measure(*cell) -> list[dict]:
        lines = measure_positions(*cell, cfg.n, names)
        write(progress(lines) + "\n")
        return lines

    def judge(measured: list[list[dict]]) -> list[dict]:
        return compared(measured, cfg.effect, cfg.margin)

    measure_cells(cfg, "positions", run, facts, cells, measure, judge, preface="".join(left_out))


def conditions_of(cfg: PositionsProbe, run: Run) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the conditions to read under, and the conditions that the run does not allow, by reason. Raises UserError
    if the settings name one of the latter, or if the run was trained without meta-tokens."""
    m = run.model.cfg
    if m.second.markers == "refused" or not knows_meta(run):
        raise UserError(f"{run.folder} was trained without meta-tokens: take a run that knows them.")
    unavailable: dict[str, list[str]] = {}
    for name in CONDITIONS:
        if why := useless(name, m):
            unavailable.setdefault(why, []).append(name)
            if name in cfg.conditions:
                raise UserError(f"conditions={name} has no effect of its own on {run.folder}, {why}: leave it out.")
    left_out = [name for of in unavailable.values() for name in of]
    names = [name for name in CONDITIONS if name in (cfg.conditions or CONDITIONS) or name == "full"]
    names = [name for name in names if name not in left_out]
    if names == ["full"]:
        raise UserError(
            "conditions=full leaves nothing to compare it with: name another condition, too, or leave --conditions out."
        )
    return names, {} if cfg.conditions else unavailable


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


def cells_of(cfg: PositionsProbe, run: Run) -> list[tuple[Maker, str, int]]:
    """Returns the Maker of each cell's texts, their level and length. Raises UserError if there are no such texts, if
    they are too long for the model, or if they have no meta-tokens."""
    out = []
    for maker, level, length in cfg.readable(run):
        if not (cfg.placements or maker.markers.has_meta) and with_meta(run.config.task.placements):
            continue  # the run was trained with other placements, too
        (first,) = texts(maker, level, length, 1)
        if run.tokenizer.meta not in first.ids:
            raise UserError(
                f"texts of {maker.name} with placement {maker.placement} and {length} positions have no meta-tokens, "
                f"so that no condition changes anything: take --placements {' or '.join(with_meta(PLACEMENTS))}."
            )
        out.append((maker, level, length))
    return out


def with_meta(placements: Iterable[str]) -> list[str]:
    """Returns those of the placements whose texts contain meta-tokens."""
    return [name for name in placements if PLACEMENTS[name].has_meta]


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


def measure_positions(run: Run, maker: Maker, level: str, length: int, n: int, names: list[str]) -> list[dict]:
    """Returns one line for each condition about n texts of the test split. These are the texts of eval.py tasks, and
    they are generated only once."""
    examples: list[Example] = texts(maker, level, length, n)
    lines = []
    for name in names:
        started = time.perf_counter()
        with under(run.model, run.tokenizer.meta, name):
            figures = read(run, examples, length)
        lines.append({
            "probe": "positions", **about(maker, level, length), "condition": name, **figures,
            "chance": maker.task.CHANCE, "seconds": time.perf_counter() - started,
        })  # fmt: skip
    return lines


def compared(cells: list[list[dict]], effect: float, margin: float) -> list[dict]:
    """Returns the lines of all cells. The first line of a cell is `full`; each other line gets its difference from it
    and a verdict on "better than full by more than `effect`". Holm's family is all comparisons. Its p-values are those
    of McNemar's test of no difference at all."""
    pairs = [(line, cell[0]) for cell in cells for line in cell[1:]]
    rights = [(bits(line["outcomes"]), bits(full["outcomes"])) for line, full in pairs]
    ps = [mcnemar(*right) for right in rights]
    for (line, _), right, p, adjusted in zip(pairs, rights, ps, holm(ps), strict=True):
        difference, low, high = paired_difference(*right)
        verdict = decide(low, high, adjusted, effect, margin, line["n"])
        line |= {
            "difference": difference, "difference_interval": (low, high), "p": p, "holm": adjusted,
            "comparisons": len(pairs), "effect": effect, "margin": margin, "claim": "better than full",
            "verdict": verdict,
        }  # fmt: skip
    return [line for cell in cells for line in cell]


def progress(cell: list[dict]) -> str:
    """Returns one line of text about a measured cell, to show the progress."""
    first = cell[0]
    name = f"{first['task']:<16} {first['placement']:<10} {first['level']:<10} {first['length']:>5}"
    exact = "  ".join(f"{line['condition']} {line['exact']:.1%}" for line in cell)
    return f"{name}  {exact}  {sum(line['seconds'] for line in cell):.1f} s"
