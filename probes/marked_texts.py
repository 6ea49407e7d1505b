"""Finds the marks and the answer in the texts of a task, and holds the settings of all probes that read such texts.

Places are found in the draft of a text (tasks/example.py), a list of pieces. Each POINT in it became a meta-token, the
word "mark", or nothing. Meta-tokens that are spread over the text afterwards shift the other tokens, so positions are
counted in content tokens."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws, stable_key
from nanometa.common.statistics import decide, holm
from nanometa.config import Placement, Task
from nanometa.config.checks import check
from nanometa.config.tasks import PLACEMENTS
from nanometa.data.layout import Batch
from nanometa.evals.common import POSITIONS, fits, place_of
from nanometa.evals.tasks import TasksEval, batches_of, texts
from nanometa.tasks.example import POINT, Example, Maker
from nanometa.tasks.words import DELIMITER
from nanometa.training.checkpoint import Run

READ = 2048  # positions of one forward pass on a CPU, few enough to stay in the CPU's cache


@dataclass(frozen=True)
class MarkedTextsProbe(TasksEval):
    """Settings of the probes that read task texts in which a meta-token or a word marks a place."""

    tasks: tuple[Task, ...] = ()
    """tasks to read: by default list_recall, because its answer stands in the text, or, for a run that was not trained
    on list_recall, the tasks that the run was trained on"""
    lengths: tuple[int, ...] = (128,)
    """maximum positions of the texts of a cell; the shortest texts have nine tenths of that"""
    placements: tuple[Placement, ...] = ()
    """placements to read: by default those that the run was trained with, restricted for probe.py positions to those
    with meta-tokens, for patching to target and none, and for residual to target"""
    margin: float = 0.05
    """the verdict on a difference is "does not hold" if its whole interval lies within +- this share"""
    effect: float = 0.0
    """the verdict on a difference is "holds" if its interval lies above this share; choose this value and the margin
    before you look at results"""

    BELOW = 1.0  # exclusive upper bound of margin and effect

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                check(self, field.name, len(set(value)) == len(value), "name each once")
        check(self, "margin", 0 < self.margin < self.BELOW, f"lie strictly between 0 and {self.BELOW:g}")
        check(self, "effect", 0 <= self.effect < self.BELOW, f"be at least 0 and below {self.BELOW:g}")
        check(self, "output", not self.output.endswith(".png"), "be a file of JSON lines; the picture lies beside it")

    def cells(self, run: Run):
        trained = run.config.task.tasks
        tasks = self.tasks or (("list_recall",) if "list_recall" in trained or not trained else trained)
        return TasksEval.cells(dataclasses.replace(self, tasks=tasks), run)

    def readable(self, run: Run) -> Iterator[tuple[Maker, str, int]]:
        """Yields the Maker of each cell's texts, their level and length. Raises UserError if the model cannot read
        texts of that length."""
        for name, placement, settings, level, length in self.cells(run):
            if why := fits(run, length):
                raise UserError(f"lengths={self.lengths} cannot all be read: {why}: leave longer ones out.")
            yield Maker(name, placement, settings, run.tokenizer), level, length

    def makers(self, run: Run, placements: tuple[str, ...] = ()) -> list[tuple[Maker, str, int]]:
        """Returns the Maker of each cell's texts, their level and length, by default for those of `placements` that the
        run was trained with. Raises UserError if there are no such texts, if they are too long for the model or have no
        mark, or if they have meta-tokens and the run was trained without any."""
        trained = run.config.task.placements if run.config.task.tasks else ()
        mine = tuple(placement for placement in placements if placement in trained)
        settings = self if self.placements or not mine else dataclasses.replace(self, placements=mine)
        out = []
        for maker, level, length in settings.readable(run):
            if maker.markers.has_meta and not knows_meta(run):
                others = " or ".join(name for name, of in PLACEMENTS.items() if not of.has_meta)
                raise UserError(
                    f"{run.folder} was trained without meta-tokens, and placement {maker.placement} has them: take "
                    f"--placements {others}, whose mark is a word, or another run."
                )
            (first,) = texts(maker, level, length, 1)
            if len(marks(maker, first)) == 0:
                others = " or ".join(name for name, of in PLACEMENTS.items() if not of.scattered)
                raise UserError(
                    f"texts of {maker.name} with placement {maker.placement} and {length} positions have no "
                    f"meta-tokens: take --placements {others}."
                )
            out.append((maker, level, length))
        return out


def knows_meta(run: Run) -> bool:
    """Returns whether the run met meta-tokens in training, in its dataset or in the texts of its tasks."""
    task = run.config.task
    placed = task.tasks and any(PLACEMENTS[name].has_meta for name in task.placements)
    return bool(placed or run.state["data"]["chunk_markers"])


def mark_id(maker: Maker) -> int:
    """Returns the id of the mark: <|meta|>, or in texts without meta-tokens the word "mark", which takes its place.
    Raises UserError if that word is several tokens."""
    if maker.markers.has_meta:
        return maker.tokenizer.meta
    ids = maker.ids([f" {DELIMITER}"])
    if len(ids) > 1:
        raise UserError(
            f'placement {maker.placement} marks places with the word "{DELIMITER}", which is {len(ids)} tokens to this '
            f"tokenizer and has no single position: take another placement."
        )
    return ids[0]


def mark_name(maker: Maker) -> str:
    return "meta-token" if maker.markers.has_meta else f'the word "{DELIMITER}"'


def marks(maker: Maker, example: Example) -> np.ndarray:
    """Returns the positions (M,) of the marks, in increasing order."""
    if maker.markers.has_meta:
        return np.flatnonzero(example.ids == maker.tokenizer.meta)
    mark_id(maker)  # raises
    body = example.draft.body  # the id alone may be a part of another word ("market")
    return np.array([1 + len(maker.ids(body[:i])) for i, piece in enumerate(body) if piece == POINT])


def answer_query_position(run: Run, example: Example) -> int:
    """Returns the position that predicts the first id of the answer: the position before it, which may be a mark, or
    under target_rule skip the last position before it that is not a mark."""
    before = int(np.flatnonzero(example.answers)[0])
    skips = run.config.target_rule == "skip"
    return int(np.flatnonzero(example.ids[:before] != run.tokenizer.meta)[-1]) if skips else before - 1


def answer_position(maker: Maker, example: Example) -> int | None:
    """Returns the position in the body of the first id of the answer, or None if the span that the question is about
    does not contain the answer."""
    if not maker.task.ANSWER_IN_TEXT:
        return None
    start, end = span(maker, example)
    found = example.draft.body.index(example.draft.questions[0][1][0], start, end)
    content = [id for id in maker.ids(example.draft.body[:found]) if id != maker.tokenizer.meta]
    return place_of(example.ids, maker.tokenizer.meta, 1 + len(content))  # after <|endoftext|>


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
    the one behind the list, span or group in which the span ends; otherwise it is the last mark of the text."""
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


def batches(run: Run, examples: list[Example], most: int | None = None) -> Iterator[tuple[slice, Batch]]:
    """Yields the texts as Batches of at most `most` texts on the model's device. Before each Batch stands the slice of
    the texts that it holds."""
    device, longest = run.model.wte.weight.device, max(len(example.ids) for example in examples)
    size = max(1, (READ if device.type == "cpu" else POSITIONS) // longest)
    return batches_of(run, examples, size if most is None else max(1, min(size, most)))


# ----------------------------------------------------------------------------- verdicts


def judged(lines: list[dict], claims: tuple[str, ...], effect: float, margin: float) -> list[dict]:
    """Adds Holm's p and a verdict to the lines for each of their claims. A claim says that a figure is more than
    `effect` above 0. Holm's family is all claims of the lines."""
    pairs = [(line, claim) for line in lines for claim in claims if claim in line]
    adjusted = holm([line[f"{claim}_p"] for line, claim in pairs])
    for (line, claim), p in zip(pairs, adjusted, strict=True):
        verdict = decide(*line[f"{claim}_interval"], p, effect, margin, line["n"])
        line |= {f"{claim}_holm": p, f"{claim}_verdict": verdict}
        line |= {"comparisons": len(pairs), "effect": effect, "margin": margin}
    return lines


def cell_name(line: dict) -> str:
    return f"{line['task']:<16} {line['placement']:<10} {line['level']:<10} {line['length']:>5}"
