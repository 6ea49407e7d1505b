"""The one decoding loop: content tokens are sampled, markers are inserted by a plan and never sampled.

from checkpoint import load_run
from generate import MarkerPlan, generate, lay_out

run = load_run("out/tiny_meta")
plan = MarkerPlan.of_run(run)
ids = lay_out(run, run.tokenizer.encode("def "), plan)
print(run.tokenizer.decode(generate(run, ids, plan, max_new_tokens=50)))
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from checkpoint import Run
from config import UserError
from data.inject import marker_places
from data.loader import random_positions
from loss import token_nats
from rng import stable_key


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
) -> Iterator[int]:
    """Continues `prompt` (ids, markers included) and yields ids as they come: max_new_tokens of content, and the
    markers that the plan puts between them.

    Under target rule "skip" a content token comes from the last content token's logits, under "ignore" from the last
    token's. When the window is full, its older half is dropped and positions start again at 0.
    Raises UserError if the prompt is empty or longer than the window, or the model's logits are not finite."""
    T = run.config.model.block_size
    if not prompt:
        raise UserError("the prompt is empty: give some text, or leave the prompt out to start a document.")
    if len(prompt) > T:
        raise UserError(
            f"the prompt has {len(prompt)} positions with its markers, and the model's window has {T}: shorten it."
        )
    return _generate(run, prompt, plan, max_new_tokens, temperature, top_k, top_p, seed, stop_at_endoftext)


def _generate(run, prompt, plan, max_new_tokens, temperature, top_k, top_p, seed, stop_at_endoftext) -> Iterator[int]:
    T = run.config.model.block_size
    generator = torch.Generator().manual_seed(stable_key(seed, "sample") >> 1)
    meta, ids, dropped = run.tokenizer.meta, list(prompt), 0
    for _ in range(max_new_tokens):
        while dropped + len(ids) in plan:
            ids.append(meta)
            yield meta
        if len(ids) > T:  # the token to come is predicted from at most T positions
            drop = len(ids) - T // 2
            ids, dropped = ids[drop:], dropped + drop
        logits = next_logits(run, ids)
        if not torch.isfinite(logits).all():
            raise UserError(f"the weights in {run.folder} give logits that are not finite: take another checkpoint.")
        token = pick(logits, temperature, top_k, top_p, generator)
        ids.append(token)
        yield token
        if stop_at_endoftext and token == run.tokenizer.eot:
            return


@torch.no_grad()
def hidden_states(run: Run, ids: list[int]) -> torch.Tensor:
    """ids (T,) -> final hidden states (T, C)."""
    tokens, m = torch.tensor([ids], device=run.model.wte.weight.device), run.config.model
    if m.second_attention == "random":  # a draw of its own, the same for a text however far it has come
        drawn = random_positions(np.array([0]), m.block_size, m.random_fraction, run.config.seed, "generated")
        meta_index = torch.from_numpy(drawn[drawn < len(ids)][None]).to(tokens.device)
    else:
        meta_index = (tokens[0] == run.tokenizer.meta).nonzero().T  # (1, M)
    return run.model(tokens, torch.arange(len(ids), device=tokens.device)[None], meta_index)[0]


@torch.no_grad()
def next_logits(run: Run, ids: list[int]) -> torch.Tensor:
    """Logits over the predictable ids (n_content,) of the content token that follows `ids`."""
    source = len(ids) - 1
    if run.config.target_rule == "skip":
        source = max((i for i, token in enumerate(ids) if token != run.tokenizer.meta), default=source)
    hidden = hidden_states(run, ids)[source]
    return run.model.logits(hidden)[: run.tokenizer.n_content].float().cpu()


def pick(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float, generator) -> int:
    """Draws an id from logits (V,). top_p keeps the smallest set of most likely ids whose probability reaches it
    (Holtzman et al., arXiv 1904.09751); the most likely id is always kept."""
    if temperature == 0:
        return int(logits.argmax())
    values, order = (logits / temperature).sort(descending=True, stable=True)
    probs = values[: top_k or len(values)].softmax(-1)
    probs[1:][probs.cumsum(-1)[:-1] >= top_p] = 0
    return int(order[torch.multinomial(probs, 1, generator=generator)])


@torch.no_grad()
def score(run: Run, text: str, plan: MarkerPlan) -> tuple[list[int], list[float]]:
    """Content ids of a text and the nats of each, given <|endoftext|> and the tokens before it.

    Raises UserError if it does not fit into one window."""
    ids = lay_out(run, run.tokenizer.encode_prompt(text), plan)
    if len(ids) > run.config.model.block_size:
        raise UserError(
            f"the text has {len(ids)} positions with its markers, more than the window of "
            f"{run.config.model.block_size}: score it in parts."
        )
    hidden, meta = hidden_states(run, ids), run.tokenizer.meta
    content = [i for i, token in enumerate(ids) if token != meta]
    # the position that predicts each content token but the first
    sources = content[:-1] if run.config.target_rule == "skip" else [i - 1 for i in content[1:]]
    targets = torch.tensor([ids[i] for i in content[1:]], device=hidden.device)
    nats = token_nats(hidden[sources], run.model.wte.weight, targets, run.tokenizer.n_content)
    return targets.tolist(), nats.tolist()
