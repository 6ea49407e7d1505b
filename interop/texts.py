"""Makes the texts of the lm-eval tasks, and scores the validation text with this project's own code."""

import math
from collections.abc import Iterator

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import Draws, stable_key
from nanometa.config.task_settings import TaskConfig
from nanometa.config.tasks import TASKS
from nanometa.data.inject import strip
from nanometa.data.tokenizer import META, Tokenizer
from nanometa.evals.passkey import keys_of, prompt_text
from nanometa.inference.generation import MarkerPlan
from nanometa.inference.scoring import score
from nanometa.tasks.example import Maker
from nanometa.training.checkpoint import Run

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the filler before the pass key
CANDIDATES = 20  # pass keys to choose from


def validation_pieces(tokenizer: Tokenizer, stream: np.ndarray, n: int, longest: int) -> list[dict]:
    """Returns n pieces of documents at equal distances in a stream of tokens (N,), or all if there are fewer.

    A piece consists of whole lines and has at most `longest` tokens, so that one window holds it. Its text is encoded
    anew, so any program with the same tokenizer reads the same tokens. Longer lines, and pieces that spell <|meta|>,
    are left out."""
    found = [{"text": piece} for piece in _pieces(tokenizer, strip(stream, tokenizer.meta), longest)]
    if len(found) <= n:
        return found
    return [found[i * len(found) // n] for i in range(n)]


def _pieces(tokenizer: Tokenizer, content: np.ndarray, longest: int) -> Iterator[str]:
    ends = np.flatnonzero(content == tokenizer.eot)
    for document in np.split(content, ends):
        try:
            text = tokenizer.text_bytes(document).decode()
        except UnicodeDecodeError:  # the stream is cut within a character
            continue
        piece, size = "", 0
        for line in [*text.splitlines(keepends=True), None]:
            cost = longest + 1 if line is None else len(tokenizer.encode(line))
            if piece and size + cost > longest:
                if piece.strip() and META not in piece and len(tokenizer.encode(piece)) <= longest:
                    yield piece
                piece, size = "", 0
            if cost <= longest:
                piece, size = piece + line, size + cost


def bits_per_byte(run: Run, pieces: list[dict], plan: MarkerPlan) -> float:
    """Returns the bits per byte of pieces, each read after <|endoftext|>, with markers as planned."""
    nats = sum(math.fsum(score(run, piece["text"], plan)[1]) for piece in pieces)
    return nats / math.log(2) / sum(len(piece["text"].encode()) for piece in pieces)


def task_texts(run: Run, task: str, n: int, longest: int) -> list[dict]:
    """Returns the first n test texts of a task with at most `longest` tokens: contexts and answers.

    Raises UserError if no text is as short."""
    trained = run.config.task
    level = trained.level if trained.tasks else "hard"
    maker, tokenizer, out = Maker(task, "none", TaskConfig(), run.tokenizer), run.tokenizer, []
    for index in range(n):
        example = maker.example("test", index, math.ceil(0.9 * longest), longest, (level,))
        first = int(np.flatnonzero(example.answers)[0])  # the texts begin and end with <|endoftext|>
        answer = tokenizer.decode(example.ids[example.answers])
        out.append({"context": tokenizer.decode(example.ids[1:first]), "answer": answer})
    return out


def passkey_texts(run: Run, n: int, longest: int) -> list[dict]:
    """Returns n texts with a hidden pass key, of nearly `longest` tokens, with the keys to choose from.

    Raises UserError if no text is as short."""
    tokenizer = run.tokenizer
    keys, width = keys_of(tokenizer)

    def fits(sentences: int, depth: float) -> bool:
        return len(tokenizer.encode(prompt_text(keys[0], sentences, depth))) + width <= longest

    if not all(fits(1, depth) for depth in DEPTHS):
        raise UserError(f"a text with a pass key does not fit into {longest} tokens: use a run with a longer window.")
    sizes = {}
    for depth in DEPTHS:
        sizes[depth] = 1
        while fits(sizes[depth] + 1, depth):
            sizes[depth] += 1
    out = []
    for index in range(n):
        draws, depth = Draws(stable_key("lm-eval passkey", index)), DEPTHS[index % len(DEPTHS)]
        choices = draws.sample(keys, CANDIDATES)
        answer = draws.below(CANDIDATES)
        text = prompt_text(choices[answer], sizes[depth], depth)
        out.append({"context": text, "choices": [f" {key}" for key in choices], "answer": answer})
    return out


def harness_texts(run: Run, stream: np.ndarray, n: int, longest: int) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Returns the texts of every lm-eval task by its name, and why a task has none.

    stream (N,): the validation tokens. longest: text tokens of a window."""
    found, missing = {"nanometa_bits_per_byte": validation_pieces(run.tokenizer, stream, n, longest)}, {}
    makers = {"passkey": lambda: passkey_texts(run, n, longest)}
    makers |= {task: lambda task=task: task_texts(run, task, n, longest) for task in TASKS}
    for name, make in makers.items():
        try:
            found[f"nanometa_{name}"] = make()
        except UserError as error:
            missing[f"nanometa_{name}"] = str(error)
    return found, missing
