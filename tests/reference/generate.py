"""Reference for generation: follows the definition without a cache, and computes everything anew for every token."""

import numpy as np
import torch

from nanometa.data.layout import random_positions
from tests.reference import gpt


def next_logits(run, ids: list[int]) -> torch.Tensor:
    """Returns the logits (n_content,) of the content token that follows `ids`, the tokens of a window so far.

    With rotary positions the model must be in double precision, because the reference computes its angles in it.
    """
    m, meta, T = run.config.model, run.tokenizer.meta, len(ids)
    if m.second_attention == "random":
        drawn = random_positions(np.array([0]), m.block_size, m.random_fraction, run.config.seed, "generated")[0]
        members = [position in drawn for position in range(T)]
    else:
        members = [token == meta for token in ids]
    source = T - 1
    if run.config.target_rule == "skip":
        source = max((i for i, token in enumerate(ids) if token != meta), default=source)
    with torch.no_grad():
        hidden = gpt.hidden_states(run.model, torch.tensor([ids]), torch.arange(T)[None], torch.tensor([members]))
        return (hidden[0, source] @ run.model.wte.weight.T)[: run.tokenizer.n_content]


def generate(run, prompt: list[int], plan, max_new_tokens: int, choose):
    """Yields pairs (id, logits that it was chosen from), with None as the logits of a marker.

    choose: function that picks an id from logits."""
    T, ids, dropped = run.config.model.block_size, list(prompt), 0
    for _ in range(max_new_tokens):
        while dropped + len(ids) in plan:
            ids.append(run.tokenizer.meta)
            yield run.tokenizer.meta, None
        if len(ids) > T:
            drop = len(ids) - T // 2
            ids, dropped = ids[drop:], dropped + drop
        logits = next_logits(run, ids)
        ids.append(choose(logits))
        yield ids[-1], logits
