"""The one decoding loop: content tokens are sampled, markers are inserted by a plan and never sampled.

from nanometa.inference.generation import MarkerPlan, generate, lay_out
from nanometa.training.checkpoint import load_run

run = load_run("out/tiny_meta")
plan = MarkerPlan.of_run(run)
ids = lay_out(run, run.tokenizer.encode("def "), plan)
print(run.tokenizer.decode(generate(run, ids, plan, max_new_tokens=50)))
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.common.keyed_random import stable_key
from nanometa.data.inject import marker_places
from nanometa.data.layout import random_positions
from nanometa.inference.cache import Decoder, DecodingWeights
from nanometa.training.checkpoint import Run


@dataclass(frozen=True)
class MarkerPlan:
    """Which positions of a sequence hold markers: chunks of C content tokens and M markers, as in preparation."""

    injection: str
    C: int
    M: int
    key: int

    @classmethod
    def of_run(cls, run: Run, injection: str = "trained", seed: int = 1337) -> "MarkerPlan":
        """The rule that the run's data was prepared with, or another one at the same density.

        Raises UserError for markers in a run that has none."""
        data = run.state["data"]
        C, M = data["chunk_content"], data["chunk_markers"]
        if injection == "trained":
            injection = data["injection"]
        if injection == "none":
            M = 0
        elif M == 0:
            raise UserError(f"meta={injection} needs a run that was trained with markers, and {run.folder} was not.")
        return cls(injection, C, M, stable_key(seed, "generated markers"))

    def __contains__(self, position: int) -> bool:
        chunk, place = divmod(position, self.C + self.M)
        return bool(_chunk_places(self, chunk)[place])


@functools.lru_cache(maxsize=64)
def _chunk_places(plan: MarkerPlan, chunk: int) -> np.ndarray:
    return marker_places(plan.injection, chunk, 1, plan.C, plan.M, plan.key)[0]


def lay_out(run: Run, content: np.ndarray, plan: MarkerPlan) -> list[int]:
    """<|endoftext|> and a text's ids, with markers where the plan has them -> the ids of a prompt.

    If `content` has markers already (placed by hand), it is left as it is."""
    meta, content = run.tokenizer.meta, [int(i) for i in content]
    if meta in content:
        return [run.tokenizer.eot, *content]
    ids: list[int] = []
    for token in [run.tokenizer.eot, *content]:
        while len(ids) in plan:
            ids.append(meta)
        ids.append(token)
    return ids


def prepare_weights(run: Run, batch: int = 1) -> DecodingWeights:
    """The run's weights as decoding reads them fastest for batches of this size: cast once if autocast is on, packed
    where that helps. The run's model stays as it is."""
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
    """Continues `prompt` (ids, markers included) and yields ids as they come: max_new_tokens of content, and the
    markers that the plan puts between them.

    Under target rule "skip" a content token comes from the last content token's logits, under "ignore" from the last
    token's. When the window is full, its older half is dropped and positions start again at 0. weights: what
    `prepare_weights(run)` gave, to share it between calls; by default it is made here.
    Raises UserError if the prompt is empty or longer than the window, or the model's logits are not finite."""
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
    """Continues several prompts at once, each with its plan and its seed (1337 by default): what `generate` yields for
    each, floating-point rounding apart, as pairs (number of the prompt, id) in the order of their coming."""
    T = run.config.model.block_size
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty: give some text, or leave the prompt out to start a document.")
        if len(prompt) > T:
            raise UserError(
                f"the prompt has {len(prompt)} positions with its markers, and the model's window has {T}: shorten it."
            )
    seeds = [1337] * len(prompts) if seeds is None else seeds
    parts = zip(prompts, plans, seeds, strict=True)
    texts = [_Text(number, list(prompt), plan, seed) for number, (prompt, plan, seed) in enumerate(parts)]
    weights = weights or prepare_weights(run, len(prompts))
    return _generate(run, weights, texts, max_new_tokens, (temperature, top_k, top_p), stop_at_endoftext)


class _Text:
    """One sequence as it grows."""

    def __init__(self, number: int, ids: list[int], plan: MarkerPlan, seed: int):
        self.number, self.ids, self.plan = number, ids, plan  # ids: those in the window
        self.dropped = self.read = 0  # ids before the window, and those in it that the cache has
        self.generator = torch.Generator().manual_seed(stable_key(seed, "sample") >> 1)


def _generate(run, weights, texts, max_new_tokens, how, stop_at_endoftext) -> Iterator[tuple[int, int]]:
    T, meta, skip = run.config.model.block_size, run.tokenizer.meta, run.config.target_rule == "skip"
    decoder = Decoder(weights, len(texts), *_slots(run, texts, max_new_tokens), takes_part(run))
    for _ in range(max_new_tokens):
        new, sources = [], []
        for row, text in enumerate(texts):
            while text.dropped + len(text.ids) in text.plan:
                text.ids.append(meta)
                yield text.number, meta
            if len(text.ids) > T:  # the token to come is predicted from at most T positions
                drop = len(text.ids) - T // 2
                text.ids, text.dropped, text.read = text.ids[drop:], text.dropped + drop, 0
                decoder.forget(row)
            unread = text.ids[text.read :]
            last = source = len(unread) - 1
            while skip and source and unread[source] == meta:
                source -= 1
            # a window of markers alone has no content token to predict from: the last marker does
            sources.append(last if unread[source] == meta else source)
            new.append(unread)
            text.read = len(text.ids)
        logits = decoder.read(new, sources)
        if not torch.stack(torch.aminmax(logits)).isfinite().all():
            raise UserError(f"the weights in {run.folder} give logits that are not finite: take another checkpoint.")
        for text, token in zip(texts, _pick_all(logits, *how, [text.generator for text in texts]), strict=True):
            text.ids.append(token)
            yield text.number, token
        if stop_at_endoftext:
            going = [row for row, text in enumerate(texts) if text.ids[-1] != run.tokenizer.eot]
            if not going:
                return
            if len(going) < len(texts):
                texts = [texts[row] for row in going]
                decoder.keep(going)


def takes_part(run: Run) -> Callable[[int, int], bool]:
    """(id, position in the window) -> does the second attention connect it? If it is causal or there is none, it
    connects nothing by choice, and the markers are named, which may have no position."""
    m, meta = run.config.model, run.tokenizer.meta
    if m.second.connects != "random":
        return lambda token, position: token == meta
    # a draw of its own, the same for a text however far it has come
    drawn = random_positions(np.array([0]), m.block_size, m.random_fraction, run.config.seed, "generated")
    drawn = frozenset(drawn[0].tolist())
    return lambda token, position: position in drawn


def _slots(run: Run, texts: list[_Text], max_new_tokens: int) -> tuple[int, int]:
    """How many positions of a window will be used at most, and how many of them the second attention connects."""
    T, member, meta = run.config.model.block_size, takes_part(run), run.tokenizer.meta
    # so many chunks hold markers that the content falls into, or that a window touches: two more than are whole
    chunks = [min(max_new_tokens // text.plan.C, T // (text.plan.C + text.plan.M)) + 2 for text in texts]
    planned = [text.plan.M * n for text, n in zip(texts, chunks, strict=True)]
    slots = max(len(text.ids) + max_new_tokens + n for text, n in zip(texts, planned, strict=True))
    if run.config.model.second.connects == "random":
        return min(T, slots), sum(member(meta, position) for position in range(T))
    return min(T, slots), min(T, max(text.ids.count(meta) + n for text, n in zip(texts, planned, strict=True)))


def pick(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float, generator) -> int:
    """Draws an id from logits (V,). top_p keeps the smallest set of most likely ids whose probability reaches it
    (Holtzman et al., arXiv 1904.09751); the most likely id is always kept."""
    if temperature == 0:
        return int(logits.argmax())
    V = len(logits)
    values, order = (logits / temperature).topk(min(top_k or V, V))  # sorted
    probs = values.softmax(-1)
    probs[1:][probs.cumsum(-1)[:-1] >= top_p] = 0
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def _pick_all(logits, temperature, top_k, top_p, generators) -> list[int]:
    """logits (B, V) -> an id for each row, drawn by its own generator."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    rows = logits.cpu()
    return [pick(row, temperature, top_k, top_p, generator) for row, generator in zip(rows, generators, strict=True)]
