"""Scores given texts with a trained run: the nats of each target of a Batch, or of each content token of a text."""

import numpy as np
import torch

from nanometa.common.errors import UserError
from nanometa.data.layout import Batch, batch_of, targets_of
from nanometa.inference.generation import MarkerPlan, check_ids, lay_out, takes_part
from nanometa.layers.scores import Scores, score_hidden
from nanometa.model import GPT
from nanometa.training.checkpoint import Run


@torch.no_grad()
def hidden_states(model: GPT, batch: Batch) -> torch.Tensor:
    """Returns the final hidden states (B, T, C) of a Batch on the model's device."""
    return model(*batch.inputs)


@torch.no_grad()
def score_batch(model: GPT, batch: Batch) -> Scores:
    """Scores every target of a Batch on the model's device, given the tokens before it."""
    return score_hidden(model, hidden_states(model, batch), batch.targets, batch.scored_index)


def text_batch(run: Run, ids: list[int], plan: MarkerPlan | None = None) -> Batch:
    """Builds the Batch of one text, ids (T,) with markers, as generation reads it, on the model's device.

    plan: how its markers were placed; None = as in training. Raises UserError if the model does not know an id."""
    check_ids(run, ids)
    plan = plan or MarkerPlan.of_run(run)
    if plan.scheme.places_markers:
        ids = [token for token in ids if token < run.tokenizer.n_content]
    layout, member = plan.stream(run).scheme.lay_out(np.array(ids)), takes_part(run)
    meta_index = [[place for place, token in enumerate(layout.tokens.tolist()) if member(token, place)]]
    targets = targets_of(layout, run.config.target_rule)
    batch = batch_of([layout], [targets], np.array(meta_index, dtype=np.int64), hides=plan.scheme.hides)
    return batch.to(run.model.wte.weight.device)


def score(run: Run, text: str, plan: MarkerPlan) -> tuple[list[int], list[float]]:
    """Returns the content ids of a text, and the nats of each given <|endoftext|> and the tokens before it.

    Markers are placed by the plan. Raises UserError if the text does not fit into one window."""
    return score_content(run, run.tokenizer.encode_prompt(text), plan)


def score_content(run: Run, content: np.ndarray, plan: MarkerPlan) -> tuple[list[int], list[float]]:
    """Returns what `score` returns, for a text that is given as content ids."""
    ids = lay_out(run, content, plan)
    if len(ids) > run.config.model.block_size:
        raise UserError(
            f"the text has {len(ids)} positions with its markers, more than the model's window of "
            f"{run.config.model.block_size}: score it in parts."
        )
    scores = score_batch(run.model, text_batch(run, ids, plan))
    return scores.targets[0].tolist(), scores.nats[0].tolist()
