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
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.config import MarkerConfig, SampleConfig
from nanometa.config.tasks import PLACEMENTS
from nanometa.data.inject import marker_places
from nanometa.data.layout import random_positions
from nanometa.data.markers import NAMES, MarkerScheme, Placing, Row, Stream, closing_marker
from nanometa.inference.decoder import Decoder, DecodingWeights
from nanometa.training.checkpoint import Run


class Held(NamedTuple):
    """What a limited cache holds of a text at its end."""

    number: int
    """number of the prompt"""
    ids: list[int]
    """the ids of the window that were read"""
    places: list[int]
    """the places of those that the cache still holds"""
    position_bytes: int
    """bytes of the cache for one position"""


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
    """key of the random places, for injection uniform and for the scheme"""
    scheme: MarkerConfig = field(default_factory=MarkerConfig)
    """markers that depend on the text, and what positions may read"""

    @classmethod
    def of_run(cls, run: Run, injection: str = "trained", seed: int = 1337, ratio: float | None = None) -> "MarkerPlan":
        """Returns the plan that the run's data was prepared with, or one with another injection rule at its density.

        ratio: share of the context to save in place of those of training; None = those of training.
        Raises UserError if markers or a ratio are asked for and the run was trained without."""
        data, scheme = run.state["data"], run.config.markers
        C, M = data["chunk_content"], data["chunk_markers"]
        if injection == "trained":
            injection = data["injection"]
        elif scheme.places_markers:
            scheme = MarkerConfig()
        if injection == "none":
            M = 0
        elif M == 0:
            raise UserError(
                f"meta={injection} needs a run that was trained with markers, and {run.folder} was not: use "
                f"--meta=none."
            )
        if ratio is not None:
            if not scheme.has_ratio:
                raise UserError(
                    f"compression_ratio={ratio:g} needs a run that was trained to save a share of its context, and "
                    f"{run.folder} was not: leave --compression_ratio out."
                )
            scheme = replace(scheme, compression_ratio=(ratio,))
        return cls(injection, C, M, stable_key(seed, "generated markers"), scheme)

    def __contains__(self, position: int) -> bool:
        """Returns whether a position of the sequence holds a marker."""
        chunk, place = divmod(position, self.C + self.M)
        return bool(_chunk_places(self, chunk)[place])

    def stream(self, run: Run, first: int = 0) -> Stream:
        """Returns a stream that lays out a text of the run. first: number of its first content token."""
        m, chunks = run.config.model, max(1, run.config.model.block_size // (self.C + self.M))
        placing = Placing(self.scheme, self.key, m.meta_position == "previous")
        return MarkerScheme(placing, run.tokenizer, chunks * self.C, chunks * self.M).stream(first)


@functools.lru_cache(maxsize=64)
def _chunk_places(plan: MarkerPlan, chunk: int) -> np.ndarray:
    """Returns which of the C + M positions of a chunk hold markers, as bools."""
    return marker_places(plan.injection, chunk, 1, plan.C, plan.M, plan.key)[0]


def lay_out(run: Run, content: np.ndarray, plan: MarkerPlan) -> list[int]:
    """Returns the ids of a prompt: <|endoftext|> and the content ids, with markers where the plan has them.

    If `content` already contains markers, placed by hand, no others are inserted by an injection rule. Raises UserError
    if the scheme of the run places markers itself, and `content` contains some."""
    meta, content = run.tokenizer.meta, [int(i) for i in content]
    if plan.scheme.places_markers:
        if max(content, default=0) >= run.tokenizer.n_content:
            raise UserError(
                f"the prompt contains a marker, but {run.folder} places its markers itself (marker_place="
                f"{plan.scheme.marker_place}): leave them out of the prompt."
            )
        stream = plan.stream(run)
        return [row.token for token in [run.tokenizer.eot, *content] for row in stream.extend(token)[0]]
    if meta in content:
        return [run.tokenizer.eot, *content]
    ids: list[int] = []
    for token in [run.tokenizer.eot, *content]:
        while len(ids) in plan:
            ids.append(meta)
        ids.append(token)
    return ids


def knows_meta(run: Run) -> bool:
    """Returns whether the run saw meta-tokens in training, in its dataset or in the texts of its tasks."""
    task, markers = run.config.task, run.config.markers
    placed = task.tasks and any(PLACEMENTS[name].has_meta for name in task.placements)
    drawn = markers.places_markers and markers.marks == "meta"
    return bool(placed or drawn or run.state["data"]["chunk_markers"])


def known_markers(run: Run) -> set[int]:
    """Returns the ids of the markers that the run saw in training."""
    tokenizer, markers = run.tokenizer, run.config.markers
    own = {tokenizer.markers[name] for name in NAMES[markers.marks]} if markers.places_markers else set()
    return own | ({tokenizer.meta} if knows_meta(run) else set())


def check_ids(run: Run, ids: Iterable[int]) -> None:
    """Raises UserError if the run's model does not know one of the ids of a text, markers included."""
    tokenizer, ids = run.tokenizer, list(ids)
    last = tokenizer.eot + len(tokenizer.markers)
    for token in ids:
        if not (isinstance(token, numbers.Integral) and 0 <= token <= last):
            raise UserError(
                f"{token!r} in the text is not an id of the tokenizer {tokenizer.name}, whose ids are 0 to {last}: "
                f"encode the text with the run's tokenizer."
            )
    unknown = {token for token in ids if token >= tokenizer.n_content} - known_markers(run)
    if unknown:
        raise UserError(
            f"the text contains {tokenizer.decode([min(unknown)])}, and {run.folder} was trained without such markers, "
            f"so its model does not know them: leave them out, or take another run."
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

    Yields max_new_tokens content tokens, and the markers that the plan and its scheme put between them. Under target
    rule "skip" a content token is sampled from the logits of the last content token, under "ignore" from those of the
    last token.
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
    on_end: Callable[[Held], None] = lambda held: None,
) -> Iterator[tuple[int, int]]:
    """Continues several prompts as one batch, each with its own plan and seed (1337 by default).

    Yields pairs (number of the prompt, id) as soon as they are sampled. For each prompt the ids are those that
    `generate` yields, except for floating-point rounding.
    on_end: called at the end of each text whose positions may be forgotten."""
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
    texts = [_Text(run, number, list(prompt), plan, seed) for number, (prompt, plan, seed) in enumerate(parts)]
    weights = weights or prepare_weights(run, len(prompts))
    return _generate(run, weights, texts, max_new_tokens, (temperature, top_k, top_p), stop_at_endoftext, on_end)


class _Text:
    """One sequence that is being generated."""

    def __init__(self, run: Run, number: int, ids: list[int], plan: MarkerPlan, seed: int):
        """Raises UserError if the scheme of the plan places markers, and `ids` has others."""
        self.run, self.number, self.plan = run, number, plan
        self.dropped = 0  # number of positions that have left the window
        self.content = 0  # number of content tokens that have left the window
        self.generator = torch.Generator().manual_seed(stable_key(seed, "sample") >> 1)
        self._begin(ids)
        if self.ids != ids:
            raise UserError(
                f"the prompt has markers in other places than those in which {run.folder} places them (marker_place="
                f"{plan.scheme.marker_place}): leave them out of the prompt."
            )

    def _begin(self, ids: list[int]) -> None:
        """Starts a window with these ids."""
        if self.plan.scheme.places_markers and max(ids) >= self.run.tokenizer.n_content:
            ids = [token for token in ids if token < self.run.tokenizer.n_content]
        self.stream = self.plan.stream(self.run, self.content)
        self.ids: list[int] = []  # those in the current window
        self.unread: list[Row] = []  # rows that the cache does not hold yet
        self.forgotten: list[tuple[int, int]] = []  # pairs (place, read_until) that it does not know yet
        for token in ids:
            self.add(token)

    def add(self, token: int) -> list[int]:
        """Adds a token. Returns its id, with those of the markers that the scheme places before and after it."""
        rows, forgotten = self.stream.extend(token)
        new = [row.token for row in rows]
        self.ids += new
        self.unread += rows
        self.forgotten += forgotten
        return new

    def is_full(self) -> bool:
        """Returns whether the next token cannot be predicted from one window any more."""
        return len(self.ids) > self.run.config.model.block_size

    def drop_half(self) -> None:
        """Drops the older half of the window, and starts a new one with the rest."""
        drop = len(self.ids) - self.run.config.model.block_size // 2
        self.dropped += drop
        self.content += sum(token < self.run.tokenizer.n_content for token in self.ids[:drop])
        self._begin(self.ids[drop:])

    def take(self) -> tuple[list[Row], list[tuple[int, int]]]:
        """Returns the rows that the cache does not hold yet, and what it does not know yet of earlier ones."""
        taken = self.unread, self.forgotten
        self.unread, self.forgotten = [], []
        return taken


def _generate(run, weights, texts, max_new_tokens, sampling, stop_at_endoftext, on_end) -> Iterator[tuple[int, int]]:
    """Yields the pairs of `generate_batch`. sampling: (temperature, top_k, top_p)."""
    n_content, skip = run.tokenizer.n_content, run.config.target_rule == "skip"
    limited = any(text.plan.scheme.places_markers or text.plan.scheme.restricts for text in texts)
    decoder = Decoder(weights, len(texts), *_slots(run, texts, max_new_tokens), takes_part(run), limited)

    def end(rows: Iterable[int]) -> None:
        for row in rows if limited else ():
            text = texts[row]
            ids, places = text.ids[: decoder.places[row]], decoder.causal.kept(row)
            on_end(Held(text.number, ids, places, decoder.position_bytes))

    for _ in range(max_new_tokens):
        new, sources, forgotten = [], [], []
        for row, text in enumerate(texts):
            while text.dropped + len(text.ids) in text.plan:
                yield from ((text.number, token) for token in text.add(run.tokenizer.meta))
            if text.is_full():
                text.drop_half()
                decoder.forget(row)
            rows, known = text.take()
            last = source = len(rows) - 1
            while skip and source and rows[source].token >= n_content:
                source -= 1
            # a window of markers only has no content token to predict from: use its last marker
            sources.append(last if rows[source].token >= n_content else source)
            new.append(rows)
            forgotten.append(known)
        logits = decoder.read(new, sources, forgotten)
        if not torch.stack(torch.aminmax(logits)).isfinite().all():
            raise UserError(
                f"the logits of {run.folder} are not finite, so no token can be drawn: use another checkpoint."
            )
        for text, token in zip(texts, _pick_all(logits, *sampling, [text.generator for text in texts]), strict=True):
            yield from ((text.number, added) for added in text.add(token))
            text.last = token
        if stop_at_endoftext:
            unfinished = [row for row, text in enumerate(texts) if text.last != run.tokenizer.eot]
            end(row for row in range(len(texts)) if row not in unfinished)
            if not unfinished:
                return
            if len(unfinished) < len(texts):
                texts = [texts[row] for row in unfinished]
                decoder.keep(unfinished)
    end(range(len(texts)))


def takes_part(run: Run) -> Callable[[int, int], bool]:
    """Returns a function of (id, place in the window) that tells whether the second attention connects the token.

    If the second attention connects all tokens, or there is none, the function tells whether the token is a marker that
    closes a segment, since such markers may have no position."""
    m = run.config.model
    if m.second.connects != "random":
        closing = closing_marker(run.config.markers, run.tokenizer)
        return lambda token, place: token == closing
    # generated text has its own draw of positions, which does not change while the text grows
    drawn = random_positions(np.array([0]), m.block_size, m.random_fraction, run.config.seed, "generated")
    drawn = frozenset(drawn[0].tolist())
    return lambda token, place: place in drawn


def _slots(run: Run, texts: list[_Text], max_new_tokens: int) -> tuple[int, int]:
    """Returns upper bounds on the used positions of a window, and on those that the second attention connects."""
    if texts[0].plan.scheme.places_markers:  # at least one token lies between two closing markers, mostly many
        T = run.config.model.block_size
        return T, T
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
