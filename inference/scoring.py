"""Scores a text with a run: the nats of each content token, markers placed as in sampling."""

import torch

from nanometa.common.errors import UserError
from nanometa.inference.generation import MarkerPlan, lay_out, takes_part
from nanometa.layers.loss import token_scores
from nanometa.training.checkpoint import Run


@torch.no_grad()
def hidden_states(run: Run, ids: list[int]) -> torch.Tensor:
    """ids (T,) -> final hidden states (T, C), of a whole text at once."""
    member, device = takes_part(run), run.model.wte.weight.device
    inputs = (ids, range(len(ids)), [position for position, token in enumerate(ids) if member(token, position)])
    return run.model(*(torch.tensor([list(part)], dtype=torch.long, device=device) for part in inputs))[0]


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
    nats, _ = token_scores(hidden[sources], run.model.wte.weight, targets, run.tokenizer.n_content)
    return targets.tolist(), nats.tolist()
