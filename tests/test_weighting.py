"""Tests the weights of targets against the formulas, and the weighted loss against texts that are read one by one."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.config import WeightConfig
from nanometa.config.weight_settings import COMPARING, WEIGHTINGS
from nanometa.data.layout import IGNORE, Batch
from nanometa.layers.loss import Objective, summed_nats
from nanometa.layers.weighting import (
    Seen,
    ShortLengths,
    WeightedObjective,
    content_of,
    content_scores,
    figures_of,
    measures,
    short_nats,
    weights_of,
)
from tests.reference import weighting as reference
from tests.test_model import ARMS, build, wake

NAMES = tuple(WEIGHTINGS)
RULES = {"lambda_": 0.6, "kappa": 0.3, "shift": 1.3, "gamma": 2.5}
EOT, META = 0, 61


def config(name: str, **changes) -> WeightConfig:
    values = {"weight_lambda": 0.6, "weight_kappa": 0.3, "weight_shift": 1.3, "weight_gamma": 2.5, **changes}
    return WeightConfig(weighting=name, **values)


def seen(seed: int, B=3, S=9, equal: float = 0.3) -> Seen:
    """Returns random losses, of which a share is equal with both contexts, and of which some are padding."""
    g = torch.Generator().manual_seed(seed)
    long, short = (torch.rand(B, S, generator=g, dtype=torch.float64) * 4 for _ in range(2))
    short = torch.where(torch.rand(B, S, generator=g) < equal, long, short)
    scored = torch.rand(B, S, generator=g) < 0.8
    scored[:, 2] = True
    after = torch.rand(B, S, generator=g) < 0.2
    ties = torch.randint(0, 2**62, (B, S), generator=g)
    return Seen(torch.where(scored, long, 0), torch.where(scored, short, 0), scored, after, ties)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_the_weights_are_those_of_the_formulas(name, seed, equal):
    given = seen(seed, equal=equal)
    found = weights_of(given, config(name))
    for row in range(len(found)):
        here = given.scored[row]
        columns = [values[row][here].tolist() for values in (given.long, given.short, given.ties, given.after_marker)]
        expected = reference.weights(name, *columns, **RULES)
        assert found[row][here].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert not found[row][~here].any()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.floats(0, 1), st.floats(0.01, 1))
def test_the_weights_of_a_window_sum_to_its_targets(name, seed, lambda_, kappa):
    given, cfg = seen(seed), config(name, weight_lambda=lambda_, weight_kappa=kappa)
    if cfg.rule.normalized:
        torch.testing.assert_close(weights_of(given, cfg).sum(1), given.scored.sum(1).double())


def test_the_permuted_weights_are_those_of_dense_on_other_targets():
    given = seen(0, B=1, S=40)
    dense, mixed = (weights_of(given, config(name))[0] for name in ("dense", "permuted"))
    assert sorted(dense.tolist()) == pytest.approx(sorted(mixed.tolist()))
    assert (dense - mixed).abs().max() > 0.1
    other = weights_of(given._replace(ties=given.ties.flip(1)), config("permuted"))[0]
    assert (other - mixed).abs().max() > 0.1


def test_a_share_that_rounds_to_no_target_keeps_one():
    """The slice -0: of the authors' release would keep all of them."""
    given = seen(1, B=2, S=9)
    found = weights_of(given, config("sparse", weight_kappa=0.01))
    assert (found > 0).sum(1).tolist() == [1, 1]
    top = (given.long - given.short).abs().masked_fill(~given.scored, -1).argmax(1)
    assert torch.equal(found.argmax(1), top)


def test_the_share_of_targets_that_are_kept_does_not_suffer_from_rounding():
    given = seen(2, B=1, S=100)._replace(scored=torch.ones(1, 100, dtype=torch.bool))
    for kappa, kept in ((0.29, 29), (0.2, 20), (1.0, 100), (0.019, 1)):  # 0.29 * 100 is 28.999999999999996
        assert int((weights_of(given, config("sparse", weight_kappa=kappa)) > 0).sum()) == kept


def test_equal_scores_are_ordered_by_the_given_numbers_and_not_by_the_state_of_a_generator():
    """The authors' release fills the quota from torch's global generator, so its runs cannot be repeated."""
    given = seen(3, B=1, S=30, equal=1.0)  # no target has a score
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(weights_of(given, config("sparse")))
    assert torch.equal(*results)
    shuffled = weights_of(given._replace(ties=given.ties.roll(7, 1)), config("sparse"))
    assert not torch.equal(shuffled, results[0])


# ----------------------------------------------------------------------------- the loss


def batch_of(marked: bool = True, T: int = 24, B: int = 3, seed: int = 1) -> Batch:
    """Returns random texts of T positions, a sixth of them markers, under the target rule `ignore`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 60, (B, T))
    index = np.sort(np.stack([rng.permutation(T)[: T // 6] for _ in range(B)]), axis=1)
    if marked:
        np.put_along_axis(tokens, index, META, axis=1)
    tokens = torch.from_numpy(tokens)
    following = torch.cat((tokens[:, 1:], torch.full((B, 1), 5)), 1)
    targets = torch.where(following >= 60, IGNORE, following)
    n = int((targets >= 0).sum(1).max())
    order = (targets < 0).int().argsort(dim=1, stable=True)[:, :n]
    scored = torch.where(torch.arange(n) < (targets >= 0).sum(1, keepdim=True), order, T)
    positions = torch.arange(T).expand(B, T)
    return Batch(tokens, targets, positions, torch.from_numpy(index), scored)


def ties_of(batch: Batch) -> torch.Tensor:
    return torch.randint(0, 2**62, batch.tokens.shape, generator=torch.Generator().manual_seed(0))


def lengths(batch: Batch, length: int = 6, stride: int = 4) -> ShortLengths:
    T = batch.tokens.size(1)
    return ShortLengths(length, stride, T, T)


def gradients(module, *args, **more):
    for p in module.parameters():
        p.grad = None
    result = module(*args, **more)
    nats = result[0] if isinstance(result, tuple) else result
    (nats / 7).backward()
    return nats.item(), {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dense", {"weight_lambda": 1.0}),
        ("permuted", {"weight_lambda": 1.0}),
        ("sparse", {"weight_kappa": 1.0}),
        ("ppmi", {"weight_kappa": 1.0}),
        ("dense", {"unweighted": True}),
    ],
)
def test_weights_of_one_leave_the_gradients_of_the_usual_loss_to_the_bit(name, changes):
    batch, weighted = batch_of(), not changes.pop("unweighted", False)
    model = wake(build(block_size=24, position="rope", second_attention="meta"))
    plain, expected = gradients(Objective(model), *batch)
    objective = WeightedObjective(model, config(name, **changes), lengths(batch))
    nats, found = gradients(objective, *batch, ties=ties_of(batch), weighted=weighted)
    assert nats == plain and found.keys() == expected.keys()
    for key, grad in expected.items():
        assert torch.equal(found[key], grad), key
    _, other = gradients(WeightedObjective(model, config(name), lengths(batch)), *batch, ties=ties_of(batch))
    assert any(not torch.equal(other[key], grad) for key, grad in expected.items())


def test_the_weighted_sum_and_its_gradients_equal_those_of_autograd():
    g = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(*size, generator=g, dtype=torch.float64, requires_grad=True) for size in ((7, 4), (9, 4))
    )
    targets = torch.tensor([0, 3, -100, 5, 1, -100, 2])
    weights = torch.rand(7, generator=g, dtype=torch.float64) * 3
    slow = F.cross_entropy((hidden @ head.T)[:, :6], targets, reduction="none", ignore_index=-100) @ weights
    for chunk in (2, 3, 7):
        fast = summed_nats(hidden, head, targets, 6, chunk=chunk, weights=weights)
        torch.testing.assert_close(fast, slow)
        expected = torch.autograd.grad(slow, (hidden, head), retain_graph=True)
        for found, of in zip(torch.autograd.grad(fast * 1.5, (hidden, head)), expected, strict=True):
            torch.testing.assert_close(found, 1.5 * of)


def alone(model, batch: Batch, row: int, position: int, start: int) -> float:
    """Returns the nats of a target, from a text of its own: the positions start .. position of a row."""
    tokens = batch.tokens[row : row + 1, start : position + 1]
    index = [i - start for i in batch.meta_index[row].tolist() if start <= i <= position]
    hidden = model(tokens, torch.arange(tokens.size(1))[None], torch.tensor([index], dtype=torch.long))
    return F.cross_entropy(model.logits(hidden)[0, -1:], batch.targets[row, position : position + 1]).item()


@torch.no_grad()
@pytest.mark.parametrize("arm", ARMS)
def test_every_target_behind_the_first_window_has_the_loss_of_its_own_short_text(arm):
    """Among them the first target that each later window serves, which the authors' release overwrites."""
    batch, (K, S) = batch_of(), (6, 4)
    model = wake(build(block_size=24, position="rope", second_attention=arm))
    found = short_nats(model, batch.inputs, batch.targets, K, S, whole=True)
    assert torch.equal(found[:, K:], short_nats(model, batch.inputs, batch.targets, K, S, whole=False)[:, K:])
    differs = 0
    for row in range(len(found)):
        for position in range(24):
            start = 0 if position < K else min(S * ((position - K) // S + 1), 24 - K)
            if batch.targets[row, position] < 0:
                assert found[row, position] == 0
                continue
            assert found[row, position].item() == pytest.approx(alone(model, batch, row, position, start), abs=1e-4)
            differs += abs(found[row, position].item() - alone(model, batch, row, position, 0)) > 1e-3
    assert differs > 20  # so the context matters to this model


@torch.no_grad()
def test_the_objective_scores_itself_and_reports_what_it_used():
    batch = batch_of()
    model = wake(build(block_size=24, position="rope", second_attention="meta"))
    cfg, ties = config("dense"), ties_of(batch)
    total, found = WeightedObjective(model, cfg, lengths(batch))(*batch, ties=ties)
    short = short_nats(model, batch.inputs, batch.targets, 6, 4, whole=False)
    sums, most, n = np.zeros(5), 0.0, 0
    for row in range(len(batch.tokens)):
        places = [q for q in range(24) if batch.targets[row, q] >= 0]
        long = [alone(model, batch, row, q, 0) for q in places]
        short_of = [short[row, q].item() if q >= 6 else nats for q, nats in zip(places, long, strict=True)]
        w = reference.weights("dense", long, short_of, places, places, **RULES)
        keys = sum(s - nats > 2 for s, nats in zip(short_of, long, strict=True))
        sums += [sum(long), np.dot(w, long), sum(w), np.dot(w, w), keys]
        most, n = max(most, *w), n + len(places)
    assert found.tolist() == pytest.approx([*sums, most], rel=1e-4)
    assert total.item() == pytest.approx(sums[1], rel=1e-4)
    figures = figures_of(found[:-1].tolist(), most, n)
    assert figures.weighted_loss == pytest.approx(sums[1] / n, rel=1e-4) and figures.weight_mean == pytest.approx(1)
    assert figures.weight_sd == pytest.approx(np.sqrt(sums[3] / n - 1), rel=1e-3)
    assert figures.effective_share == pytest.approx(n / sums[3], rel=1e-4) and 0 < figures.effective_share < 1


def test_a_text_that_is_shorter_than_the_short_contexts_has_equal_weights():
    batch = batch_of(T=12)
    model = build(block_size=24, position="rope", second_attention="none")
    objective = WeightedObjective(model, config("dense"), ShortLengths(12, 4, 24, 24))
    _, found = objective(*batch, ties=ties_of(batch))
    assert found[1].item() == pytest.approx(found[0].item()) and found[5] == 1


def test_padding_has_no_weight_and_the_largest_weight_is_found():
    given = seen(5)
    found = measures(given, weights_of(given, config("longce")))
    assert found[5] <= 2.5 and found[4] == ((given.short - given.long > 2) & given.scored).sum()


# ----------------------------------------------------------------------------- scorers that know no markers


@torch.no_grad()
def test_a_scorer_without_markers_reads_the_content_alone():
    batch, n = batch_of(), 24 - 4
    scorer = build(seed=9, block_size=24, position="rope", second_attention="none")
    found = content_scores(scorer, *content_of(batch.tokens, batch.targets, 60, n), ShortLengths(6, 4, n, 24))
    for row in range(len(found)):
        content = batch.tokens[row][batch.tokens[row] != META]
        goals = torch.cat((content[1:], torch.tensor([5])))  # 5 follows the window
        for number in range(n):
            start = 0 if number < 6 else min(4 * ((number - 6) // 4 + 1), n - 6)
            read = content[start : number + 1][None]
            logits = scorer.logits(scorer(read, torch.arange(read.size(1))[None], None))[0, -1]
            unscored = number == n - 1 and batch.targets[row, -1] < 0
            nats = 0 if unscored else F.cross_entropy(logits, goals[number]).item()
            assert found[row, number].item() == pytest.approx(nats, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", COMPARING)
def test_stored_nats_give_the_weights_of_the_scorer_that_computed_them(name):
    batch, n = batch_of(), 24 - 4
    model = wake(build(block_size=24, position="rope", second_attention="meta"))
    scorer = build(seed=9, block_size=24, position="rope", second_attention="none")
    size, cfg = ShortLengths(6, 4, n, 24), config(name, weight_shift=1.0)
    column = content_scores(scorer, *content_of(batch.tokens, batch.targets, 60, n), size)
    ties = ties_of(batch)
    frozen = WeightedObjective(model, cfg, size, scorer)(*batch, ties=ties)
    stored = WeightedObjective(model, cfg, size)(*batch, ties=ties, column=column)
    itself = WeightedObjective(model, cfg, size)(*batch, ties=ties)
    assert torch.equal(frozen[0], stored[0]) and torch.equal(frozen[1], stored[1])
    assert not torch.equal(itself[1], frozen[1])


def test_the_weights_of_a_scorer_are_no_weights_of_the_objective():
    model = build(block_size=24, position="rope", second_attention="none")
    objective = WeightedObjective(model, config("dense"), ShortLengths(6, 4, 24, 24), build(seed=9))
    assert len(list(objective.parameters())) == len(list(model.parameters()))


def test_the_target_behind_a_marker_counts_under_both_rules():
    """Under `skip` the content token before a marker predicts past it, and under `ignore` the marker itself does."""
    model = build(block_size=8, position="rope", second_attention="none")
    tokens = torch.tensor([[1, 2, META, 3, 4, META, META, 5]])
    positions = torch.arange(8)[None]
    for targets, after in (
        ([2, IGNORE, 3, 4, IGNORE, IGNORE, 5, 6], {2, 6}),
        ([2, 3, IGNORE, 4, 5, IGNORE, IGNORE, 6], {1, 4}),
    ):
        batch = Batch(tokens, torch.tensor([targets]), positions, torch.tensor([[2, 5, 6]]), positions)
        nats = {q: alone(model, batch, 0, q, 0) for q in range(8) if targets[q] >= 0}
        w = {q: (2 if q in after else 1) * len(nats) / (len(nats) + 2) for q in nats}
        total, _ = WeightedObjective(model, config("after_markers"), None)(*batch, ties=positions)
        assert total.item() == pytest.approx(sum(w[q] * nats[q] for q in nats), rel=1e-4)


@pytest.mark.parametrize(("T", "expected"), [(461, (115, 86)), (512, (128, 96))])
def test_short_lengths_in_positions_hold_the_same_content_on_average(T, expected):
    assert ShortLengths(115, 86, 461, T).in_positions() == expected


def test_labels_name_what_differs_from_the_usual_loss():
    assert WeightConfig().label == ""
    labels = {name: WeightConfig(weighting=name).label for name in NAMES}
    assert labels == {
        "dense": "dense 0.75", "sparse": "sparse 0.2", "ppmi": "ppmi 0.2", "npmi": "npmi 0.2", "longce": "longce 5",
        "permuted": "permuted 0.75", "after_markers": "after_markers",
    }  # fmt: skip
    assert dataclasses.replace(WeightConfig(weighting="longce"), weight_norm="batch").label == "longce 5 normed"
    assert WeightConfig(weighting="ppmi", weight_shift=2.0).label == "ppmi 0.2 shift 2"
