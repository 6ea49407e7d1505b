"""Scores a batch: the nats of each target, and whether the target is the model's most likely prediction."""

from typing import NamedTuple

import torch
import torch.nn as nn

from nanometa.layers.loss import gather_scored, token_scores


class Scores(NamedTuple):
    """The scores of a Batch's targets: three tensors (B, S), in the order of positions in each text."""

    targets: torch.Tensor  # IGNORE at padding, and at unscored positions if S is the whole length
    nats: torch.Tensor  # 0 where the target is IGNORE
    right: torch.Tensor  # whether the target is the most likely id; False where it is IGNORE


def score_hidden(model: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, scored_index: torch.Tensor) -> Scores:
    """Scores the targets (B, T) of a Batch from the model's final hidden states (B, T, C)."""
    B = len(targets)
    hidden, targets = gather_scored(hidden, targets, scored_index)
    # torch.compile would unroll the loop over the many small blocks of a CPU
    score = torch.compiler.disable(token_scores) if hidden.device.type == "cpu" else token_scores
    nats, right = score(hidden, model.wte.weight, targets, model.cfg.content_vocab_size)
    return Scores(*(values.view(B, -1) for values in (targets, nats, right)))


class Scorer(nn.Module):
    """A model and its scoring as one module, for torch.compile. Maps the fields of a Batch to Scores."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets, positions, meta_index, scored_index, reads_from=None, read_until=None) -> Scores:
        """Returns the Scores of the targets."""
        hidden = self.model(tokens, positions, meta_index, reads_from, read_until)
        return score_hidden(self.model, hidden, targets, scored_index)
