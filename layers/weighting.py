"""The loss with a weight for each target. The rules that compute the weights are those of config/weight_settings.py.

d is the difference of a target's nats with the whole context and with a short one: d = log p_short - log p_long. It is
negative where the whole context helps. All weights are without gradient (arXiv 2503.09202, section 3).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanometa.config.weight_settings import WeightConfig
from nanometa.layers.loss import gather_scored, gather_values, head_of, summed_nats, token_scores
from nanometa.layers.short_contexts import short_contexts, short_states

KEY = 2.0  # nats by which the whole context must help a key token (arXiv 2410.23771, alpha)


class Seen(NamedTuple):
    """What the weights of the targets are computed from: tensors (B, S), in the order of Batch.scored_index."""

    long: torch.Tensor  # nats with the whole context
    short: torch.Tensor  # nats with a short context; equal to `long` where there is no other context
    scored: torch.Tensor  # bool, False at padding
    after_marker: torch.Tensor  # bool, whether a marker stands between the target and the content token before it
    ties: torch.Tensor  # int64, random numbers that order equal scores

    @property
    def d(self) -> torch.Tensor:
        """log p_short - log p_long of each target."""
        return self.long - self.short


# the scores of config.weight_settings.Weighting, none of them negative
SCORES: dict[str, Callable[[Seen, WeightConfig], torch.Tensor]] = {
    "absolute": lambda seen, cfg: seen.d.abs(),
    "positive": lambda seen, cfg: (-seen.d - math.log(cfg.weight_shift)).clamp(min=0),
    "negative": lambda seen, cfg: (seen.d - math.log(cfg.weight_shift)).clamp(min=0),
    "ratio": lambda seen, cfg: (-seen.d).exp(),
    "after_marker": lambda seen, cfg: 1 + seen.after_marker.to(seen.long.dtype),
}


def weights_of(seen: Seen, cfg: WeightConfig) -> torch.Tensor:
    """Returns the weight of every target (B, S), 0 at padding. cfg.weighting must not be uniform."""
    rule, scored = cfg.rule, seen.scored
    u = SCORES[rule.score](seen, cfg).masked_fill(~scored, 0)
    if rule.limited:
        u = u.clamp(max=cfg.weight_gamma)
    if rule.keeps:
        u = largest(u, seen, cfg.weight_kappa)
    if rule.normalized:
        total = u.sum(1, keepdim=True)
        u = torch.where(total > 0, u * scored.sum(1, keepdim=True) / total, 1)
    if rule.mixed:
        u = cfg.weight_lambda + (1 - cfg.weight_lambda) * u
    if rule.permuted:
        u = permuted(u, seen)
    return u.masked_fill(~scored, 0)


def largest(u: torch.Tensor, seen: Seen, share: float) -> torch.Tensor:
    """Returns 1 for the share of each row's targets with the largest scores u (B, S), at least one, and 0 for the rest.

    The random numbers of `seen` order equal scores, so that targets without a score fill the share if need be."""
    by_ties = seen.ties.argsort(dim=1)
    scores = torch.where(seen.scored, u, -1).gather(1, by_ties)
    order = by_ties.gather(1, scores.argsort(dim=1, descending=True, stable=True))
    # a share such as 0.29 of 100 is 28.999999999999996 in floating point
    n = (share * seen.scored.sum(1, keepdim=True) + 1e-6).floor().clamp(min=1)
    first = torch.arange(u.size(1), device=u.device) < n
    return torch.zeros_like(u).scatter_(1, order, first.to(u.dtype)) * seen.scored


def permuted(weights: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Returns each row's weights (B, S), dealt out to its targets in the order of the random numbers of `seen`."""
    places = (~seen.scored).to(torch.int8).argsort(dim=1, stable=True)  # the targets first, in the order of the text
    mixed = torch.where(seen.scored, seen.ties, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return torch.empty_like(weights).scatter_(1, places, weights.gather(1, mixed))


class ShortLengths(NamedTuple):
    """The short contexts of a run, in content tokens."""

    length: int
    stride: int
    content: int  # content tokens of a window
    positions: int  # positions of a window, which has markers if this is more

    def in_positions(self) -> tuple[int, int]:
        """Returns length and stride in positions, which hold the same content on average."""
        length = round(self.length * self.positions / self.content)
        return length, max(1, min(length, round(self.stride * self.positions / self.content)))


def short_nats(model, inputs, targets, length: int, stride: int, whole: bool) -> torch.Tensor:
    """Returns the nats (B, T) of the targets (B, T) with short contexts, 0 where nothing is scored.

    inputs: as for cut_windows. length, stride, whole: as for short_contexts; unless `whole`, the first `length`
    positions are 0."""
    contexts = short_contexts(targets.size(1), length, stride, whole)
    hidden = short_states(model, inputs, contexts)
    goals = targets[:, contexts.first :]
    nats, _ = token_scores(hidden.flatten(0, 1), model.wte.weight, goals.flatten(), model.cfg.content_vocab_size)
    return F.pad(nats.view(goals.shape), (contexts.first, 0))


def content_number(tokens: torch.Tensor, n_content: int) -> torch.Tensor:
    """Returns, for every position (B, T), the number of the last content token at or before it, counted from 0 in its
    text; -1 where there is none."""
    return (tokens < n_content).cumsum(1) - 1


def content_of(tokens, targets, n_content: int, content: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the content tokens of windows and their targets, (B, content) each, without the markers.

    tokens, targets (B, T): of a Batch, whose windows have so many content tokens. The target of a content token is the
    next one, whichever position predicts it; it is -100 where nothing is scored."""
    number = content_number(tokens, n_content)
    ids = tokens.gather(1, (tokens >= n_content).to(torch.int8).argsort(dim=1, stable=True)[:, :content])
    at = torch.where((targets >= 0) & (number >= 0), number, content).clamp(max=content)  # the last: an extra column
    goals = targets.new_full((len(targets), content + 1), -100).scatter(1, at, targets)
    return ids, goals[:, :content]


def content_scores(model, ids: torch.Tensor, goals: torch.Tensor, shorter: ShortLengths) -> torch.Tensor:
    """Returns the nats (B, content) of the targets `goals` of content tokens `ids` with short contexts, by a model that
    knows no markers; 0 where nothing is scored."""
    positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
    return short_nats(model, (ids, positions, None, None, None), goals, shorter.length, shorter.stride, whole=True)


class WeightedObjective(nn.Module):
    """A model and its weighted loss as one module, for DDP and torch.compile.

    Its forward takes the fields of a Batch and what the rule needs besides, and returns the weighted nats and their
    `measures`."""

    def __init__(self, model: nn.Module, cfg: WeightConfig, shorter: ShortLengths, scorer: nn.Module | None = None):
        """scorer: a model that knows no markers and is not trained; None = the model scores itself."""
        super().__init__()
        self.model, self.cfg, self.shorter = model, cfg, shorter
        self.frozen = (scorer,)  # in a tuple, so that its weights are not weights of this module

    def forward(
        self, tokens, targets, positions, meta_index, scored_index, reads_from=None, read_until=None, *,
        ties, column=None, weighted: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Returns the summed nats () of the scored targets, times their weights if `weighted`, and `measures` (6,).

        ties (B, T): random int64. column (B, content): nats of the target after each content token, with a short
        context, from a file; None = the scorer computes them."""
        inputs = (tokens, positions, meta_index, reads_from, read_until)
        hidden, goals = gather_scored(self.model(*inputs), targets, scored_index)
        head, n = head_of(self.model), self.model.cfg.content_vocab_size
        if not weighted:
            nats = summed_nats(hidden, head, goals, n)
            return nats, F.pad(nats.detach()[None], (0, 5))
        seen, weights = self.weigh(inputs, hidden, goals, targets, scored_index, ties, column)
        return summed_nats(hidden, head, goals, n, weights=weights.flatten()), measures(seen, weights)

    @torch.no_grad()
    def weigh(self, inputs, hidden, goals, targets, scored_index, ties, column=None) -> tuple[Seen, torch.Tensor]:
        """Returns what the weights of the targets depend on, and the weights (B, S).

        inputs: the arguments of the model. hidden, goals: as gather_scored returns them. The others: as in forward."""
        tokens, n = inputs[0], self.model.cfg.content_vocab_size
        long = token_scores(hidden, self.model.wte.weight, goals, n)[0].view(len(tokens), -1)
        short = self._short(inputs, targets, scored_index, long, column) if self.cfg.rule.compares else long
        marker = tokens >= n
        after = marker | F.pad(marker[:, 1:], (0, 1))
        seen = Seen(long, short, goals.view_as(long) >= 0, *(gather_values(x, scored_index) for x in (after, ties)))
        return seen, weights_of(seen, self.cfg)

    def _short(self, inputs, targets, scored_index, long, column) -> torch.Tensor:
        """Returns the nats (B, S) of the targets with short contexts, and `long` where there are none."""
        tokens = inputs[0]
        if column is None and self.frozen[0] is None:
            length, stride = self.shorter.in_positions()
            if length >= tokens.size(1):
                return long
            nats = short_nats(self.model, inputs, targets, length, stride, whole=False)
            known = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens) >= length
        else:
            if column is None:
                n, content = self.model.cfg.content_vocab_size, self.shorter.content
                column = content_scores(self.frozen[0], *content_of(tokens, targets, n, content), self.shorter)
            number = content_number(tokens, self.model.cfg.content_vocab_size)
            nats = column.to(long.dtype).gather(1, number.clamp(0, column.size(1) - 1))
            known = number >= 0
        return torch.where(gather_values(known, scored_index), gather_values(nats, scored_index), long)


def measures(seen: Seen, weights: torch.Tensor) -> torch.Tensor:
    """Returns (6,): the sums of the nats, of the weighted nats, of the weights and of their squares, the number of key
    tokens, and the largest weight. All but the last can be added up over batches."""
    sums = (seen.long, weights * seen.long, weights, weights.square(), (seen.d < -KEY) & seen.scored)
    return torch.stack([*(values.sum().to(weights.dtype) for values in sums), weights.max()])


class Figures(NamedTuple):
    """What the log says about the weights of a step."""

    weighted_loss: float  # nats per target, weighted
    weight_mean: float
    weight_sd: float
    weight_max: float
    effective_share: float  # (sum w)^2 / (n sum w^2): the share of targets that equal weights on them would have
    key_share: float  # share of targets whose nats the whole context lowers by more than KEY


def figures_of(totals: list[float], most: float, n: float) -> Figures:
    """Returns the figures of n targets from the added-up `measures` without the last, and the largest weight."""
    _, weighted, total, squares, keys = totals
    mean = total / n
    return Figures(
        weighted / n, mean, math.sqrt(max(0.0, squares / n - mean**2)), most, total**2 / (n * squares), keys / n
    )
