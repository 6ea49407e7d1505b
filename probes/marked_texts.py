"""Finds the marks and the answer in the texts of a task, and holds the settings of all probes that read such texts.

Places are found in the draft of a text (tasks/example.py), a list of pieces. Each POINT in it became a meta-token, the
word "mark", or nothing. Meta-tokens that are spread over the text afterwards shift the other tokens, so positions are
counted in content tokens."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws, stable_key
from nanometa.common.statistics import decide, holm, mcnemar, paired_difference
from nanometa.common.terminal import write_line
from nanometa.config import Placement, Task, TaskConfig
from nanometa.config.checks import check
from nanometa.config.tasks import PLACEMENTS
from nanometa.data.layout import Batch
from nanometa.evals.common import POSITIONS, check_finite, fits, place_of
from nanometa.evals.tasks import TasksEval, batches_of, texts
from nanometa.inference.generation import knows_meta
from nanometa.inference.scoring import hidden_states
from nanometa.probes.residual_stream import record_states
from nanometa.tasks.example import POINT, Example, Maker
from nanometa.tasks.words import DELIMITER
from nanometa.training.checkpoint import Run

READ = 2048  # positions of one forward pass on a CPU, few enough to stay in the CPU's cache


@dataclass(frozen=True)
class MarkedTextsProbe(TasksEval):
    """Settings of the probes that read task texts in which a meta-token or a word marks a place."""

    READS = ()  # probes change attention in ways that limits to what positions may read would have to follow

    tasks: tuple[Task, ...] = ()
    """tasks to read: by default list_recall, because its answer is in the text, or, for a run that was not trained
    on list_recall, the tasks that the run was trained on"""
    lengths: tuple[int, ...] = (128,)
    """maximum positions of the texts of a cell; the shortest texts have nine tenths of that"""
    placements: tuple[Placement, ...] = ()
    """placements to read: by default those that the run was trained with; of these, probe.py positions reads those with
    meta-tokens, patching reads target and none, and residual reads target"""
    margin: float = 0.05
    """the verdict on a difference is "does not hold" if its whole interval lies within +- this share"""
    effect: float = 0.0
    """the verdict on a difference is "holds" if its interval lies above this value, in the unit of the difference;
    choose this value and the margin before you look at results"""

    BELOW = 1.0  # exclusive upper bound of margin and effect

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                check(self, field.name, len(set(value)) == len(value), "name each once")
        check(self, "margin", 0 < self.margin < self.BELOW, f"lie strictly between 0 and {self.BELOW:g}")
        check(self, "effect", 0 <= self.effect < self.BELOW, f"be at least 0 and below {self.BELOW:g}")
        check(self, "output", not self.output.endswith(".png"), "be a file of JSON lines; the picture is put beside it")

    def cells(self, run: Run) -> list[tuple[Maker, str, int]]:
        """Returns the Maker of each cell's texts, their level and length. Raises UserError if there are no such texts
        or the model cannot read texts of that length."""
        if run.config.task.visible == "marked":
            raise UserError(
                f"{run.folder} was trained with visible=marked and reads only a part of each text, where the places "
                f"that probes look at are missing: probe a run with visible=all."
            )
        for length in self.lengths:
            if why := fits(run, length):
                raise UserError(f"lengths={self.lengths} cannot all be read: {why}: leave longer ones out.")
        tasks = self.tasks or self.default_tasks(run.config.task.tasks)
        return TasksEval.cells(dataclasses.replace(self, tasks=tasks), run)

    def default_tasks(self, trained: tuple[Task, ...]) -> tuple[Task, ...]:
        """Returns the tasks to read if none are named. trained: the tasks that the run was trained on."""
        return ("list_recall",) if "list_recall" in trained or not trained else trained

    def marked_cells(
        self, run: Run, placements: tuple[str, ...] = (), only_meta: bool = False
    ) -> list[tuple[Maker, str, int]]:
        """Returns the cells whose texts have marks, by default for those of `placements` that the run was trained with.

        only_meta: a mark must be a meta-token. Placements without marks are left out, and a line says so. Raises
        UserError if none is left, or if one of them was named."""
        trained = run.config.task.placements if run.config.task.tasks else ()
        mine = tuple(placement for placement in placements if placement in trained)
        cells = (self if self.placements or not mine else dataclasses.replace(self, placements=mine)).cells(run)
        reasons: dict[str, str] = {}
        for maker, level, length in cells:
            if why := unmarked(run, maker, only_meta) or markless(maker, level, length):
                reasons.setdefault(maker.placement, why)
        kept = [cell for cell in cells if cell[0].placement not in reasons]
        if reasons and (self.placements or not kept):
            makers = [Maker("copying", placement, TaskConfig(), run.tokenizer) for placement in PLACEMENTS]
            others = [one.placement for one in makers if not (one.markers.scattered or unmarked(run, one, only_meta))]
            cure = f"--placements {' or '.join(others)}" if others else "a run that was trained with meta-tokens"
            raise UserError(f"{next(iter(reasons.values()))}: take {cure}.")
        for why in reasons.values():
            write_line(f"left out: {why}")
        return kept


def unmarked(run: Run, maker: Maker, only_meta: bool) -> str:
    """Returns the reason why a probe cannot read the marks of a placement in any text, or "" if it can.

    only_meta: a mark must be a meta-token."""
    if maker.markers.has_meta:
        if knows_meta(run):
            return ""
        return f"{run.folder} was trained without meta-tokens, and placement {maker.placement} has them"
    if only_meta:
        return f"texts of {maker.name} with placement {maker.placement} have no meta-tokens"
    if (tokens := maker.cost(f" {DELIMITER}")) > 1:
        return (
            f'placement {maker.placement} marks places with the word "{DELIMITER}", which is {tokens} tokens to the '
            f"tokenizer of {run.folder} and has no single position"
        )
    return ""


def markless(maker: Maker, level: str, length: int) -> str:
    """Returns the reason why the texts of a cell have no marks, or "" if the first one has some."""
    (first,) = texts(maker, level, length, 1)
    if len(marks(maker, first)):
        return ""
    return f"texts of {maker.name} with placement {maker.placement} and {length} positions have no meta-tokens"


def mark_id(maker: Maker) -> int:
    """Returns the id of the mark: <|meta|>, or in texts without meta-tokens the word "mark", which takes its place and
    is one token (see `unmarked`)."""
    (mark,) = [maker.tokenizer.meta] if maker.markers.has_meta else maker.ids([f" {DELIMITER}"])
    return mark


def mark_name(maker: Maker) -> str:
    return "meta-token" if maker.markers.has_meta else f'the word "{DELIMITER}"'


def marks(maker: Maker, example: Example) -> np.ndarray:
    """Returns the positions (M,) of the marks, in increasing order."""
    if maker.markers.has_meta:
        return np.flatnonzero(example.ids == maker.tokenizer.meta)
    return pointing_words(maker, example)


def pointing_words(maker: Maker, example: Example) -> np.ndarray:
    """Returns the position of the last token of each word "mark" that points, in increasing order. They are found in
    the draft, because their ids may also be part of other words ("market")."""
    body, meta = example.draft.body, maker.tokenizer.meta
    if maker.ids([POINT]) in ([], [meta]):
        return np.array([], dtype=int)
    ends = [content_before(maker, example, i + 1) for i, piece in enumerate(body) if piece == POINT]
    return np.flatnonzero(example.ids != meta)[ends]  # content token 0 is <|endoftext|>


def content_before(maker: Maker, example: Example, piece: int) -> int:
    """Returns the number of content tokens of the body's pieces before number `piece`."""
    return sum(id != maker.tokenizer.meta for id in maker.ids(example.draft.body[:piece]))


def marked_texts(maker: Maker, level: str, length: int, n: int, split: str = "test") -> list[Example]:
    """Returns the texts with a mark among the first n texts of a split. No text is in two splits."""
    return [example for example in texts(maker, level, length, n, split) if len(marks(maker, example))]


def answer_query_position(run: Run, example: Example) -> int:
    """Returns the position that predicts the first id of the answer. This is the position before it, which may be a
    mark; under target_rule skip it is the last position before it that is not a mark."""
    before = int(np.flatnonzero(example.answers)[0])
    skips = run.config.target_rule == "skip"
    return int(np.flatnonzero(example.ids[:before] != run.tokenizer.meta)[-1]) if skips else before - 1


def answer_position(maker: Maker, example: Example) -> int | None:
    """Returns the position in the body of the first id of the answer, or None if the span that the question is about
    does not contain the answer."""
    if not maker.task.ANSWER_IN_TEXT:
        return None
    found = example.draft.body.index(example.draft.questions[0][1][0], *span(maker, example))
    return place_of(example.ids, maker.tokenizer.meta, 1 + content_before(maker, example, found))


def span(maker: Maker, example: Example) -> tuple[int, int]:
    """Returns the first and the last piece of the span that the question is about. The span reaches from POINT to
    POINT, or in parity from the start to POINT."""
    body = example.draft.body
    if not maker.has_pointer:  # the list that the question names
        start = body.index(example.draft.questions[0][0][1])
        return start, body.index("\n", start)
    points = [i for i, piece in enumerate(body) if piece == POINT]
    return (0, *points)[-2:]


def span_end_mark(maker: Maker, example: Example) -> int:
    """Returns the position of the mark that ends the span of the question. Where meta-tokens follow every list, it is
    the one after the list, span or group in which the span ends; otherwise it is the last mark of the text."""
    found = marks(maker, example)
    if not maker.markers.after_lists:
        return int(found[-1])
    end = 1 + len(maker.ids(example.draft.body[: span(maker, example)[1]]))
    return int(found[found >= end - 1][0])


def random_ordinary_position(maker: Maker, example: Example, number: int) -> int:
    """Returns a random position of the body that is not a mark, drawn by a generator keyed by the text's number."""
    body = np.arange(1, int(np.flatnonzero(example.answers)[0]))
    free = np.setdiff1d(body, marks(maker, example))
    return int(free[Draws(stable_key("ordinary", number)).below(len(free))])


def batch_size(run: Run, length: int) -> int:
    """Returns how many texts of `length` positions to read in one forward pass."""
    return max(1, (READ if run.model.wte.weight.device.type == "cpu" else POSITIONS) // length)


def batches(run: Run, examples: list[Example], most: int | None = None) -> Iterator[tuple[slice, Batch]]:
    """Yields Batches of at most `most` texts on the model's device, each with the slice of the texts that it holds."""
    size = batch_size(run, max(len(example.ids) for example in examples))
    return batches_of(run, examples, size if most is None else max(1, min(size, most)))


def read_hidden(run: Run, batch: Batch) -> torch.Tensor:
    """Returns the final hidden states (B, T, C) of a Batch. Raises UserError if they are not finite."""
    hidden = hidden_states(run.model, batch)
    check_finite(run, hidden.sum().float().cpu().numpy())
    return hidden


def read_states(run: Run, examples: list[Example]) -> Iterator[tuple[slice, Batch, torch.Tensor, list[torch.Tensor]]]:
    """Yields the slice and the Batch of some texts, their final hidden states, and the n_layer + 1 states (B, T, C) of
    the residual stream."""
    with record_states(run.model) as states:
        for rows, batch in batches(run, examples):
            hidden = read_hidden(run, batch)
            yield rows, batch, hidden, states


def at_places(states: list[torch.Tensor], places: np.ndarray) -> torch.Tensor:
    """Returns the vectors (L, B, k, C) of L states (B, T, C) at the places (B, k)."""
    at = torch.from_numpy(places).to(states[0].device)
    text = torch.arange(len(at), device=at.device)[:, None]
    return torch.stack([state[text, at] for state in states])


# ----------------------------------------------------------------------------- verdicts


def paired_claim(figure: str, prefix: str, first: np.ndarray, second: np.ndarray) -> dict:
    """Returns the fields of the claim that more texts are right under a first condition than under a second. first,
    second: whether each of the same texts (N,) is right. The p-value is that of McNemar's test that there is no
    difference."""
    difference, low, high = paired_difference(first, second)
    return {figure: difference, f"{figure}_interval": (low, high), f"{prefix}p": mcnemar(first, second)}


def judged(lines: list[dict], claims: dict[str, str], effect: float, margin: float, sign: int = 1) -> list[dict]:
    """Adds Holm's p and a verdict to the lines for each of their claims. Holm's family is all claims of the lines.

    claims: for each figure, the prefix of the fields with its p, Holm's p and verdict. A claim says that `sign` times
    the figure is larger than `effect`."""
    pairs = [(line, figure, prefix) for line in lines for figure, prefix in claims.items() if figure in line]
    adjusted = holm([line[f"{prefix}p"] for line, _, prefix in pairs])
    for (line, figure, prefix), p in zip(pairs, adjusted, strict=True):
        low, high = sorted(sign * end for end in line[f"{figure}_interval"])
        verdict = decide(low, high, p, effect, margin, line["n"])
        line |= {f"{prefix}holm": p, f"{prefix}verdict": verdict}
        line |= {"comparisons": len(pairs), "effect": effect, "margin": margin}
    return lines
