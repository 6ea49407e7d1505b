"""Finds positions in a task's text, reads the states there, and builds the questions and labels of a bottleneck.

    meta       the last meta-token before the question
    delimiter  the last word "mark" that marks a place, in texts of placements that use this word
    last       the last ordinary token before the question, which in every task is the end of a line
    random     an ordinary token before the question
    mean       the mean state of all positions before the question
    question   the last position that predicts the answer

All but `question` precede the question. They cannot know what will be asked, so a decoder that answers from one of them
is given the question, too."""

from typing import NamedTuple

import numpy as np
import torch

from nanometa.common.keyed_random import Draws, stable_key
from nanometa.probes.marked_texts import answer_query_position, at_places, pointing_words, read_states
from nanometa.tasks.example import Example, Maker
from nanometa.tasks.words import DELIMITER
from nanometa.training.checkpoint import Run

STATES = ("meta", "delimiter", "last", "random", "mean", "question")
MISSING = {"meta": "no meta-token before the question", "delimiter": f"no {DELIMITER!r} before the question"}


class LocatedText(NamedTuple):
    """One text: its ids, the position of its answer, and the position of each state that it has."""

    ids: np.ndarray
    answer: int
    query: tuple[str, ...]  # the question's pieces
    at: dict[str, int]  # for mean, the start of the question: all positions before it


def locate(run: Run, maker: Maker, example: Example, reach: int, key: int) -> LocatedText:
    """Returns the located text. reach: least number of tokens before the random position, which is drawn by a generator
    with this `key`."""
    meta, ids, (question, _) = maker.tokenizer.meta, example.ids, example.draft.questions[0]
    answer = int(np.flatnonzero(example.answers)[0])
    content = np.flatnonzero(ids != meta)  # with placement background, meta-tokens are spread among them
    before = content[: int((content < answer).sum()) - len(maker.ids(question))]
    start = int(before[-1]) + 1
    at = {"last": start - 1, "mean": start, "question": answer_query_position(run, example)}
    candidates = {"meta": np.flatnonzero(ids[:start] == meta), "delimiter": pointing_words(maker, example)}
    at |= {name: int(places[-1]) for name, places in candidates.items() if len(places)}
    if len(far := before[before >= reach]):
        at["random"] = int(Draws(key).choice(far))
    return LocatedText(ids, answer, tuple(question), at)


def locate_all(run: Run, maker: Maker, examples: list[Example], reach: int, split: str) -> list[LocatedText]:
    return [
        locate(run, maker, example, reach, stable_key("rate distortion", split, i))
        for i, example in enumerate(examples)
    ]


def missing(name: str, of: list[LocatedText]) -> str:
    """Returns the reason why some texts lack a state, or "" if none lacks it."""
    n = sum(name not in text.at for text in of)
    return f"{n} of {len(of)} texts have {MISSING.get(name, 'too few tokens before the question')}" if n else ""


@torch.no_grad()
def states_of_texts(
    run: Run, examples: list[Example], of: list[LocatedText], names: list[str], layers: list[int]
) -> torch.Tensor:
    """Returns the states (layers, names, N, C) of the texts in float32, on the model's device."""
    out = []
    for rows, _, _, every in read_states(run, examples):
        states = [every[layer].float() for layer in layers]
        at = np.array([[text.at[name] for name in names] for text in of[rows]])  # (B, names)
        found = at_places(states, at)
        if "mean" in names:
            start = torch.from_numpy(at[:, names.index("mean"), None]).to(found.device)
            inside = (torch.arange(states[0].size(1), device=found.device) < start)[..., None]  # (B, T, 1)
            found[:, :, names.index("mean")] = (torch.stack(states) * inside).sum(dim=2) / start
        out.append(found.transpose(1, 2))
    return torch.cat(out, dim=2)


def queries_of(splits: list[list[LocatedText]]) -> tuple[list[torch.Tensor], int]:
    """Returns the questions (N, q) of each split as numbers below Q, and Q itself. Only the q pieces of a question that
    differ between training texts count. The number 0 stands for a piece that no training text has."""
    seen = [dict.fromkeys(pieces) for pieces in zip(*(text.query for text in splits[0]), strict=True)]
    differ = [slot for slot, pieces in enumerate(seen) if len(pieces) > 1]
    entries = [(slot, piece) for slot in differ for piece in sorted(seen[slot])]
    number = {entry: i for i, entry in enumerate(entries, start=1)}
    out = [[[number.get((slot, text.query[slot]), 0) for slot in differ] for text in of] for of in splits]
    return [torch.tensor(rows, dtype=torch.long).view(len(rows), len(differ)) for rows in out], 1 + len(number)


def labels_of(back: int, state: str, splits: list[list[LocatedText]]) -> tuple[list[torch.Tensor], int]:
    """Returns the labels (N, 1) of each split as class numbers, and the number of classes. The classes are the ids that
    occur `back` positions before the state, or, if `back` is 0, as the first id of an answer."""
    ids = [text.ids[text.at[state] - back if back else text.answer] for of in splits for text in of]
    classes, number = np.unique(ids, return_inverse=True)
    return list(torch.from_numpy(number)[:, None].split([len(of) for of in splits])), len(classes)
