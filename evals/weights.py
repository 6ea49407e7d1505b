"""Shows the weights that the loss would give to the targets of training windows, with the text in colours.

    python eval.py weights --run=out/tiny_meta --weighting=sparse
    python eval.py weights --run=out/tiny_meta --weighting=dense --scorer=out/tiny_gpt2 --windows 0 5 9

On a terminal, the background of a token shows its weight. The tokens with the largest weights are listed below.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from nanometa.common.errors import UserError, printable
from nanometa.common.terminal import MAGENTA, write
from nanometa.config import WeightConfig
from nanometa.data.layout import Batch
from nanometa.evals.common import Evaluation, check_finite, check_ranges
from nanometa.layers.loss import gather_scored
from nanometa.layers.weighting import KEY, WeightedObjective, content_number
from nanometa.training.checkpoint import Run
from nanometa.training.dataset import open_windows
from nanometa.training.weighted_loss import TokenWeights

SHADES = ("", "48;5;230;30", "48;5;222;30", "48;5;214;30", "48;5;202;97")  # ANSI codes, from no weight to the most
LIMITS = (0.05, 1.05, 2.0, 4.0)  # weights at which the shades change
TOP = 10


@dataclass(frozen=True)
class WeightsEval(Evaluation):
    """The weights that a weighted loss would give to the targets of training windows."""

    READS = ("drawn", "limited", "previous")

    weights: WeightConfig = field(default_factory=WeightConfig)
    scorer: str = "self"
    """model whose short contexts the weights depend on, as in training: self, the folder of a run without markers, or a
    folder that `python eval.py nats` wrote"""
    windows: tuple[int, ...] = (0,)
    """numbers of the training windows to show"""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, windows=(0, 2**40))


def main(cfg: WeightsEval) -> None:
    """Runs the evaluation: writes a JSON line about each window, and prints its text."""
    run, facts = cfg.open()
    if cfg.weights.rule is None:
        raise UserError(
            "weighting=uniform gives every target the weight 1: name another one, such as --weighting=dense."
        )
    if cfg.weights.weight_after:
        raise UserError(
            f"weight_after={cfg.weights.weight_after} has no effect, because no step is trained: leave --weight_after "
            f"out."
        )
    if run.config.task.tasks:
        raise UserError(
            f"{run.folder} was trained on tasks, whose texts are no windows of a dataset: give another run."
        )
    trained = dataclasses.replace(run.config, weights=cfg.weights, scorer=cfg.scorer)
    data = open_windows(trained, "train")
    if late := [number for number in cfg.windows if number >= data.n_windows]:
        raise UserError(f"window {late[0]} does not exist: the training split has {data.n_windows:,}, from 0 on.")
    weights, device = TokenWeights(trained, data), run.model.wte.weight.device
    objective = weights.objective(run.model, device)

    def measured() -> Iterator[dict]:
        for line in weights.describe():
            write(f"{line}\n")
        for number in cfg.windows:
            batch = data.batch(np.array([number]))
            beside = weights.beside(batch, np.array([number]), 0, device)
            found = window(run, objective, batch, data.content_per_window, beside, device)
            show(run, number, found)
            yield {
                "eval": "weights", "weighting": cfg.weights.label, "scorer": cfg.scorer, "window": number,
                "dataset": trained.dataset, **found,
            }  # fmt: skip

    cfg.record(run, facts, "weights", measured())


@torch.inference_mode()
def window(
    run: Run, objective: WeightedObjective, batch: Batch, content: int, beside: dict, device: torch.device
) -> dict:
    """Returns the tokens of a window as text, and for each token the weight and the nats with the whole context and
    with a short one. They are None for a token that is no target, and short is None if the rule compares nothing.

    content: number of content tokens in the window; pads follow them."""
    batch = batch.to(device)
    hidden, goals = gather_scored(run.model(*batch.inputs), batch.targets, batch.scored_index)
    column = beside["column"]
    seen, weights = objective.weigh(
        batch.inputs, hidden, goals, batch.targets, batch.scored_index, beside["ties"], column
    )
    n_content, T = run.model.cfg.content_vocab_size, batch.tokens.size(1)
    is_content = batch.tokens[0] < n_content
    stands = is_content.nonzero().flatten().tolist()[:content]  # the places of the content tokens
    number = content_number(batch.tokens, n_content)[0].tolist()
    columns = {name: [None] * T for name in ("weights", "long", "short")}
    values = {"weights": weights[0].tolist(), "long": seen.long[0].tolist(), "short": seen.short[0].tolist()}
    check_finite(run, np.array(values["long"]))
    for i, (place, scored) in enumerate(zip(batch.scored_index[0].tolist(), seen.scored[0].tolist(), strict=True)):
        # the target is the next content token, which for the last one is the first of the next window
        if scored and number[place] + 1 < content:
            for name, column in columns.items():
                column[stands[number[place] + 1]] = round(values[name][i], 4)
    if not objective.cfg.rule.compares:
        columns["short"] = [None] * T
    texts = [run.tokenizer.decode([token]) for token in batch.tokens[0].tolist()]
    return {"tokens": texts, "markers": (~is_content).tolist(), **columns}


def show(run: Run, number: int, found: dict) -> None:
    """Prints a window with its weights as colours, and the targets with the largest weights."""
    write(f"window {number}: the background shows the weight, below {' / '.join(f'{x:g}' for x in LIMITS)} / more\n")
    for text, marker, weight in zip(found["tokens"], found["markers"], found["weights"], strict=True):
        shade = SHADES[int(np.searchsorted(LIMITS, weight, "right"))] if weight is not None else ""
        write(text, MAGENTA if marker else shade)
    write("\n")
    ranked = sorted((w, at) for at, w in enumerate(found["weights"]) if w is not None)
    for weight, at in ranked[: -TOP - 1 : -1]:
        long, short = found["long"][at], found["short"][at]
        beside = "" if short is None else f", {short:.2f} with a short context"
        key = "  (a key token)" if short is not None and short - long > KEY else ""
        text = printable("".join(found["tokens"][max(0, at - 6) : at]))
        write(f"{weight:8.3f}  {printable(found['tokens'][at])!r} after {text!r}: {long:.2f} nats{beside}{key}\n")
