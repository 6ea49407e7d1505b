"""Generates text with a trained run: samples content tokens, and inserts markers by a plan.

Markers are never sampled. Example:

from nanometa.inference.generation import MarkerPlan, generate, lay_out
from nanometa.training.checkpoint import load_run

run = load_run("out/tiny_meta")
plan = MarkerPlan.of_run(run)
ids = lay_out(run, run.tokenizer.encode("def "), plan)
print(run.tokenizer.decode(generate(run, ids, plan, max_new_tokens=50)))
"""

import functools
import numbers
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.config import SampleConfig
from nanometa.config.tasks import PLACEMENTS
from nanometa.data.inject import marker_places
from nanometa.data.layout import random_positions
from nanometa.data.tokenizer import META
from nanometa.inference.cache import Decoder, DecodingWeights
from nanometa.training.checkpoint import Run


@dataclass(frozen=True)
class MarkerPlan:
    """The positions of a sequence that hold markers.

    As in a prepared dataset, a sequence consists of chunks of C content tokens and M markers. `position in plan` tells
    whether a position holds a marker."""

    injection: str
    """rule that places the markers in a chunk: uniform, periodic or none"""
    C: int
    """content tokens in a chunk"""
    M: int
    """markers in a chunk"""
    key: int
    """key of the random places, for injection uniform"""

    @classmethod
    def of_run(cls, run: Run, injection: str = "trained", seed: int = 1337) -> "MarkerPlan":
        """Returns the plan that the run's data was prepared with, or one with another injection rule at its density.

        Raises UserError if markers are asked for and the run was trained without."""
        data = run.state["data"]
        C, M = data["chunk_content"], data["chunk_markers"]
        if injection == "trained":
            injection = data["injection"]
        if injection == "none":
            M = 0
        elif M == 0:
            raise UserError(
                f"meta={injection} needs a run that was trained with markers, and {run.folder} was not: use "
                f"--meta=none."
            )
        return cls(injection, C, M, stable_key(seed, "generated markers"))

    def __contains__(self, position: int) -> bool:
        """Returns whether a position of the sequence holds a marker."""
        chunk, place = divmod(position, self.C + self.M)
        return bool(_chunk_places(self, chunk)[place])


@functools.lru_cache(maxsize=64)
def _chunk_places(plan: MarkerPlan, chunk: int) -> np.ndarray:
    """Returns which of the C + M positions of a chunk hold markers, as bools."""
    return marker_places(plan.injection, chunk, 1, plan.C, plan.M, plan.key)[0]


def lay_out(run: Run, content: np.ndarray, plan: MarkerPlan) -> list[int]:
    """Returns the ids of a prompt: <|endoftext|> and the content ids, with markers where the plan has them.

    If `content` already contains markers, placed by hand, no others are inserted."""
    meta, content = run.tokenizer.meta, [int(i) for i in content]
    if meta in content:
        return [run.tokenizer.eot, *content]
    ids: list[int] = []
    for token in [run.tokenizer.eot, *content]:
        while len(ids) in plan:
            ids.append(meta)
        ids.append(token)
    return ids


def knows_meta(run: Run) -> bool:
    """Returns whether the run saw markers in training, in its dataset or in the texts of its tasks."""
    task = run.config.task
    placed = task.tasks and any(PLACEMENTS[name].has_meta for name in task.placements)
    return bool(placed or run.state["data"]["chunk_markers"])


def check_ids(run: Run, ids: Iterable[int]) -> None:
    """Raises UserError if the run's model does not know one of the ids of a text, markers included."""
    meta, ids = run.tokenizer.meta, list(ids)
    for token in ids:
        if not (isinstance(token, numbers.Integral) and 0 <= token <= meta):
            raise UserError(
                f"{token!r} in the text is not an id of the tokenizer {run.tokenizer.name}, whose ids are 0 to {meta}: "
                f"encode the text with the run's tokenizer."
            )
    if meta in ids and not knows_meta(run):
        raise UserError(
            f"the text contains {META}, and {run.folder} was trained without markers, so its model does not know them: "
            f"leave them out, or take another run."
        )


def prepare_weights(run: Run, batch: int = 1) -> DecodingWeights:
    """Returns the run's weights prepared for fast decoding of batches of this size. The run's model is not changed.

    The weights are cast once to autocast's dtype if autocast is enabled, and packed where that is faster."""
    device = run.model.wte.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return DecodingWeights(run.model, dtype, batch)


def generate(
    run: Run,
    prompt: list[int],
    plan: MarkerPlan,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    seed: int = 1337,
    stop_at_endoftext: bool = False,
    weights: DecodingWeights | None = None,
) -> Iterator[int]:
    """Continues a prompt, given as ids with markers, and yields each new id as soon as it is sampled.

    Yields max_new_tokens content tokens, and the markers that the plan puts between them. Under target rule "skip" a
    content token is sampled from the logits of the last content token, under "ignore" from those of the last token.
    When the window is full, its older half is dropped and positions start again at 0.
    weights: the result of `prepare_weights(run)`, to share it between calls; prepared here by default.
    Raises UserError if the prompt is empty, is longer than the window or has ids that the model does not know, if an
    option is out of range, or if the model's logits are not finite."""
    options = (temperature, top_k, top_p, [seed], stop_at_endoftext, weights)
    return (token for _, token in generate_batch(run, [prompt], [plan], max_new_tokens, *options))


def generate_batch(
    run: Run,
    prompts: list[list[int]],
    plans: list[MarkerPlan],
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    seeds: list[int] | None = None,
    stop_at_endoftext: bool = False,
    weights: DecodingWeights | None = None,
) -> Iterator[tuple[int, int]]:
    """Continues several prompts as one batch, each with its own plan and seed (1337 by default).

    Yields pairs (number of the prompt, id) as soon as they are sampled. For each prompt the ids are those that
    `generate` yields, except for floating-point rounding."""
    SampleConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)  # checks the ranges
    T = run.config.model.block_size
    for prompt in prompts:
        check_ids(run, prompt)
        if not prompt:
            raise UserError(
                "the prompt is empty, so there is nothing to continue: give some text, or leave the prompt out to "
                "start a document."
            )
        if len(prompt) > T:
            raise UserError(
                f"the prompt has {len(prompt)} positions with its markers, but the model's window has {T}: shorten it."
            )
    seeds = [1337] * len(prompts) if seeds is None else seeds
    parts = zip(prompts, plans, seeds, strict=True)
    texts = [_Text(number, list(prompt), plan, seed) for number, (prompt, plan, seed) in enumerate(parts)]
    weights = weights or prepare_weights(run, len(prompts))
    return _generate(run, weights, texts, max_new_tokens, (temperature, top_k, top_p), stop_at_endoftext)


class _Text:
    """One sequence that is being generated."""

    def __init__(self, number: int, ids: list[int], plan: MarkerPlan, seed: int):
        self.number, self.ids, self.plan = number, ids, plan  # ids: only those in the current window
        self.dropped = 0  # number of ids that have left the window
        self.read = 0  # number of ids in the window that the cache already holds
        self.generator = torch.Generator().manual_seed(stable_key(seed, "sample") >> 1)


def _generate(run, weights, texts, max_new_tokens, sampling, stop_at_endoftext) -> Iterator[tuple[int, int]]:
    """Yields the pairs of `generate_batch`. sampling: (temperature, top_k, top_p)."""
    T, meta, skip = run.config.model.block_size, run.tokenizer.meta, run.config.target_rule == "skip"
    decoder = Decoder(weights, len(texts), *_slots(run, texts, max_new_tokens), takes_part(run))
    for _ in range(max_new_tokens):
        new, sources = [], []
        for row, text in enumerate(texts):
            while text.dropped + len(text.ids) in text.plan:
                text.ids.append(meta)
                yield text.number, meta
            if len(text.ids) > T:  # the next token can be predicted from at most T positions
                drop = len(text.ids) - T // 2
                text.ids, text.dropped, text.read = text.ids[drop:], text.dropped + drop, 0
                decoder.forget(row)
            unread = text.ids[text.read :]
            last = source = len(unread) - 1
            while skip and source and unread[source] == meta:
                source -= 1
            # a window of markers only has no content token to predict from: use its last marker
            sources.append(last if unread[source] == meta else source)
            new.append(unread)
            text.read = len(text.ids)
        logits = decoder.read(new, sources)
        if not torch.stack(torch.aminmax(logits)).isfinite().all():
            raise UserError(
                f"the logits of {run.folder} are not finite, so no token can be drawn: use another checkpoint."
            )
        for text, token in zip(texts, _pick_all(logits, *sampling, [text.generator for text in texts]), strict=True):
            text.ids.append(token)
            yield text.number, token
        if stop_at_endoftext:
            unfinished = [row for row, text in enumerate(texts) if text.ids[-1] != run.tokenizer.eot]
            if not unfinished:
                return
            if len(unfinished) < len(texts):
                texts = [texts[row] for row in unfinished]
                decoder.keep(unfinished)


def takes_part(run: Run) -> Callable[[int, int], bool]:
    """Returns a function of (id, position in the window) that tells whether the second attention connects the token.

    If the second attention connects all tokens, or there is none, the function tells whether the token is a marker,
    since markers may have no position."""
    m, meta = run.config.model, run.tokenizer.meta
    if m.second.connects != "random":
        return lambda token, position: token == meta
    # generated text has its own draw of positions, which does not change while the text grows
    drawn = random_positions(np.array([0]), m.block_size, m.random_fraction, run.config.seed, "generated")
    drawn = frozenset(drawn[0].tolist())
    return lambda token, position: position in drawn


def _slots(run: Run, texts: list[_Text], max_new_tokens: int) -> tuple[int, int]:
    """Returns upper bounds on the used positions of a window, and on those that the second attention connects."""
    T, member, meta = run.config.model.block_size, takes_part(run), run.tokenizer.meta
    # the new content fills, or one window spans, at most this many chunks: the whole ones, and one cut at each end
    chunks = [min(max_new_tokens // text.plan.C, T // (text.plan.C + text.plan.M)) + 2 for text in texts]
    planned = [text.plan.M * n for text, n in zip(texts, chunks, strict=True)]
    slots = max(len(text.ids) + max_new_tokens + n for text, n in zip(texts, planned, strict=True))
    if run.config.model.second.connects == "random":
        return min(T, slots), sum(member(meta, position) for position in range(T))
    return min(T, slots), min(T, max(text.ids.count(meta) + n for text, n in zip(texts, planned, strict=True)))


def pick(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float, generator) -> int:
    """Draws an id from logits (V,); temperature 0 takes the most likely one.

    top_k keeps the k most likely ids. top_p keeps the smallest set of most likely ids whose total probability reaches
    top_p (Holtzman et al., arXiv 1904.09751); the most likely id is always kept."""
    if temperature == 0:
        return int(logits.argmax())
    V = len(logits)
    values, order = (logits / temperature).topk(min(top_k or V, V))  # sorted
    probs = values.softmax(-1)
    probs[1:][probs.cumsum(-1)[:-1] >= top_p] = 0
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def _pick_all(logits, temperature, top_k, top_p, generators) -> list[int]:
    """Draws one id from each row of logits (B, V), with that row's own generator."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    rows = logits.cpu()
    return [pick(row, temperature, top_k, top_p, generator) for row, generator in zip(rows, generators, strict=True)]
