"""Finds positions in a task's text, reads the states there, and builds the questions and labels of a bottleneck.

    meta       the last meta-token before the question
    delimiter  the ordinary word that stands where meta-tokens could ("mark": placement none, or where others point)
    last       the last ordinary token before the question, which in every task is the end of a line
    random     an ordinary token before the question
    mean       the mean state of all positions before the question
    question   the last position that predicts the answer

All but `question` precede the question. They cannot know what will be asked, so a decoder that answers from one of them
is given the question, too."""

from typing import NamedTuple

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws, stable_key
from nanometa.evals.common import place_of
from nanometa.probes.marked_texts import batches
from nanometa.probes.residual_stream import record_states
from nanometa.tasks.example import POINT, Example, Maker
from nanometa.tasks.words import DELIMITER
from nanometa.training.checkpoint import Run

STATES = ("meta", "delimiter", "last", "random", "mean", "question")
MISSING = {"meta": "no meta-token before the question", "delimiter": f"no {DELIMITER!r} before the question"}


class LocatedText(NamedTuple):
    """One text: its ids, the starts of its question and its answer, and the position of each state that it has."""

    ids: np.ndarray
    start: int
    answer: int
    query: tuple[str, ...]  # the question's pieces
    at: dict[str, int]  # for mean, `start`: all positions before it


def locate(maker: Maker, example: Example, rule: str, reach: int, key: int) -> LocatedText:
    """Returns the located text. rule: the target rule; reach: least number of tokens before the random position, which
    is drawn by a generator with this `key`."""
    tokenizer, ids, (question, _) = maker.tokenizer, example.ids, example.draft.questions[0]
    answer = int(np.flatnonzero(example.answers)[0])
    content = np.flatnonzero(ids != tokenizer.meta)  # with placement background, meta-tokens stand between any of them
    before = content[: int((content < answer).sum()) - len(maker.ids(question))]  # the question
    start = int(before[-1]) + 1
    at = {
        "last": start - 1,
        "mean": start,
        "question": answer - 1 if rule == "ignore" else int(content[content < answer][-1]),
    }
    metas = np.flatnonzero(ids[:start] == tokenizer.meta)
    if len(metas):
        at["meta"] = int(metas[-1])
    if (end := delimiter_end(maker, example)) is not None:
        at["delimiter"] = end
    if len(far := before[before >= reach]):
        at["random"] = int(Draws(key).choice(far))
    return LocatedText(ids, start, answer, tuple(question), at)


def delimiter_end(maker: Maker, example: Example) -> int | None:
    """Returns the position where the last ordinary delimiter ends, or None if there is no delimiter. It is found in the
    draft, because its ids may also be part of other words."""
    meta, body = maker.tokenizer.meta, example.draft.body
    if POINT not in body or maker.ids([POINT]) in ([], [meta]):  # no piece points, or a meta-token does
        return None
    last = len(body) - 1 - body[::-1].index(POINT)
    content = [id for id in maker.ids(body[: last + 1]) if id != meta]
    return place_of(example.ids, meta, len(content))  # behind <|endoftext|>


def locate_all(maker: Maker, examples: list[Example], rule: str, reach: int, split: str) -> list[LocatedText]:
    return [
        locate(maker, example, rule, reach, stable_key("rate distortion", split, i))
        for i, example in enumerate(examples)
    ]


def missing(name: str, of: list[LocatedText]) -> str:
    """Returns the reason why some texts lack a state, or "" if none lacks it."""
    n = sum(name not in text.at for text in of)
    return f"{n} of {len(of)} texts have {MISSING.get(name, 'too few tokens before the question')}" if n else ""


@torch.no_grad()
def read_states(run: Run, examples: list[Example], of: list[LocatedText], names: list[str], layers) -> torch.Tensor:
    """Returns the states (layers, names, N, C) of the texts in float32, on the model's device. Raises UserError if they
    are not finite."""
    out = []
    with record_states(run.model) as read:
        for which, batch in batches(run, examples):
            run.model(batch.tokens, batch.positions, batch.meta_index)
            stream = torch.stack([read[layer].float() for layer in layers])  # (layers, B, T, C)
            B, T = batch.tokens.shape
            row, places, found = torch.arange(B, device=stream.device), torch.arange(T, device=stream.device), []
            for name in names:
                at = torch.tensor([text.at[name] for text in of[which]], device=stream.device)
                if name == "mean":
                    inside = (places < at[:, None])[..., None]  # (B, T, 1)
                    found.append((stream * inside).sum(dim=2) / at[:, None])
                else:
                    found.append(stream[:, row, at])
            out.append(torch.stack(found, dim=1))
    found = torch.cat(out, dim=2)
    if not found.isfinite().all():
        raise UserError(f"the weights in {run.folder} produce states that are not finite: take another checkpoint.")
    return found


def queries_of(splits: list[list[LocatedText]]) -> tuple[list[torch.Tensor], int]:
    """Returns the questions (N, q) of each split as numbers below Q, and Q itself. Only the q pieces of a question that
    differ between training texts count. The number 0 stands for a piece that no training text has."""
    seen = [dict.fromkeys(pieces) for pieces in zip(*(text.query for text in splits[0]), strict=True)]
    differ = [slot for slot, pieces in enumerate(seen) if len(pieces) > 1]
    entries = [(slot, piece) for slot in differ for piece in sorted(seen[slot])]
    number = {entry: i for i, entry in enumerate(entries, start=1)}
    out = [[[number.get((slot, text.query[slot]), 0) for slot in differ] for text in of] for of in splits]
    return [torch.tensor(rows, dtype=torch.long).view(len(rows), len(differ)) for rows in out], 1 + len(number)


def labels_of(target: str, state: str, splits: list[list[LocatedText]]) -> tuple[list[np.ndarray], int]:
    """Returns the labels (N, n) of each split as class numbers, and the number of classes. The classes are the ids that
    occur."""

    def ids(text: LocatedText) -> np.ndarray:
        kind, _, number = target.partition("_")
        if kind == "answer":
            return text.ids[[text.answer]]
        at, n = text.at[state], int(number)
        return text.ids[[at - n]] if kind == "back" else text.ids[at - n : at]

    found = [np.stack([ids(text) for text in of]) for of in splits]
    classes, number = np.unique(np.concatenate(found), return_inverse=True)
    number = number.reshape(-1, found[0].shape[1])
    return np.split(number, np.cumsum([len(of) for of in splits])[:-1]), len(classes)
