"""Tests probes/bottleneck.py and probes/rate_curves.py: sources with known answers, and the curves made of points."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanometa.probes import rate_distortion, self_check
from nanometa.probes.bottleneck import Member, Source, Training, fit, measure_bottlenecks
from nanometa.probes.rate_curves import (
    Points,
    at_rates,
    baselines,
    compared,
    constant_distortion,
    converse,
    entropy,
    found,
)
from nanometa.probes.rate_distortion import RateDistortionProbe, curve
from tests.reference import bottleneck as reference

SMALL = RateDistortionProbe(
    seeds=2,
    training=Training(z_dim=4, hidden=32, patience=30, batch=50, learning_rate=0.03, weight_decay=0.1),
)


@pytest.fixture(autouse=True)
def few_betas(monkeypatch):
    monkeypatch.setattr(rate_distortion, "BETAS", (4.0, 0.2, 0.01))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(n: int, K: int, seed: int = 0, of: int = 1) -> torch.Tensor:
    return torch.randint(K, (n, of), generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- the bottleneck


@pytest.mark.parametrize(("hidden", "q"), [(5, 2), (0, 1), (5, 0)])
def test_probes_trained_together_equal_probes_trained_alone(hidden, q):
    """Also when one probe stops early and others continue."""
    how = Training(2, hidden, epochs=6, patience=1, batch=4, learning_rate=0.1, weight_decay=0.3, gates=1.5)
    sources = [Source(normal(N, 6, seed=s), uniform(N, 4, s + 5, q), uniform(N, 3, s)) for s, N in ((1, 10), (2, 6))]
    members = [
        Member(beta, seed, kind)
        for seed in (0, 4)
        for beta, kind in ((0.5, "bottleneck"), (0.01, "bottleneck"), (0.0, "ceiling"), (0.0, "shuffled"))
    ]
    weights = fit(*sources, 3, 4, members, how)
    names = {f"{name}_bias": f"b_{name}" for name in ("code", "inner", "out")}
    epochs = []
    for i, member in enumerate(members):
        alone, epoch = reference.trained(*sources, 3, 4, *member, how)
        epochs.append(epoch)
        assert {names.get(name, name) for name in weights} == set(alone)
        for name in weights.keys() - ({"question"} if q == 0 else set()):  # without a query, its weights are not used
            torch.testing.assert_close(weights[name][i], alone[names.get(name, name)], rtol=1e-3, atol=1e-4)
    assert min(epochs) < how.epochs - how.patience  # at least one probe stopped early
    D, R = measure_bottlenecks(weights, sources[1], members, dataclasses.replace(how, draws=1))
    for i in (2, 3, 6):  # the ceilings, which have no noise
        w = {names.get(name, name): p[i] for name, p in weights.items()}
        for text in range(6):
            d, r = reference.text_loss(w, *(x[text] for x in sources[1]), torch.zeros(2))
            assert (float(D[i, text]), float(R[i, text])) == pytest.approx((float(d), float(r)), rel=1e-4, abs=1e-5)


def test_the_probe_reaches_the_curve_of_a_gaussian():
    how = dataclasses.replace(self_check.GAUSSIAN, draws=16)
    found = self_check.points(self_check.gaussian, 1, self_check.GAUSSIAN_BETAS[::2], how, self_check.GAUSSIAN_TEXTS)
    for beta, R, D in found:
        assert abs(R - 0.5 * math.log(self_check.VARIANCE / D)) < self_check.NEAR
        assert abs(D / (beta / 2) - 1) < 0.1  # the point lies where its beta says


def test_the_curve_of_classes_respects_the_converse_and_meets_it_at_its_ends():
    how = dataclasses.replace(self_check.CATEGORICAL, draws=16)
    H = math.log(self_check.CLASSES)
    found = self_check.points(
        self_check.categorical, self_check.CLASSES, self_check.CLASS_BETAS, how, self_check.CLASS_TEXTS
    )
    assert all(D + R >= H - self_check.SLACK for _, R, D in found)
    (_, R, D), (_, R1, D1) = found[0], found[-1]
    assert D < 0.05 and H < R < H + 6  # a Gaussian code for the class costs a few nats more than H
    assert R1 < 0.1 and abs(D1 + R1 - H) < self_check.SLACK
    assert sorted(R for _, R, _ in found) == [R for _, R, _ in reversed(found)]


def planted(state, K: int = 12, sizes=(600, 200, 300)) -> list[Source]:
    """Returns sources whose texts have one of K classes, and whose states are state(labels (N,), seed)."""
    labels = [uniform(N, K, seed) for seed, N in enumerate(sizes)]
    return [Source(state(y[:, 0], seed), torch.zeros(len(y), 0, dtype=torch.long), y) for seed, y in enumerate(labels)]


@pytest.mark.parametrize("kind", ["all of it", "nothing", "one bit"])
def test_the_probe_finds_what_was_planted_in_a_state(kind):
    K = 12
    make = {
        "all of it": lambda y, seed: torch.nn.functional.one_hot(y, K).float(),
        "nothing": lambda y, seed: torch.ones(len(y), 5),
        "one bit": lambda y, seed: torch.stack([(y < 6).float(), normal(len(y), seed=seed)], dim=1),
    }[kind]
    line, points = curve(SMALL, planted(make), K, 0)
    knowable = {"all of it": math.log(K), "nothing": 0.0, "one bit": math.log(2)}[kind]
    assert line["ceiling"]["distortion"] == pytest.approx(math.log(K) - knowable, abs=0.06)
    assert line["points"][-1]["distortion"] == pytest.approx(math.log(K) - knowable, abs=0.12)
    first = line["points"][0]  # at the largest beta, any rate costs more than it gains
    assert first["rate"] < 0.1 and first["above_converse"] == pytest.approx(0, abs=0.15)
    # from shuffled labels a probe learns only their frequencies
    assert line["shuffled"]["distortion"] == pytest.approx(line["cross_entropy"], abs=0.03)
    assert line["violations"] == 0 and points.rate.shape == (3, 2, 300)
    assert line["uniform"] == pytest.approx(math.log(K)) and line["classes"] == K
    if kind == "all of it":
        assert line["points"][-1]["rate"] > math.log(K) - 0.1
    if kind == "nothing":
        assert all(abs(point["distortion"] - math.log(K)) < 0.1 for point in line["points"])


def test_a_query_selects_one_of_two_classes():
    """The state holds two classes, and the query asks for one. Without the query, the probe cannot know which."""

    def texts(N: int, seed: int, told: bool) -> Source:
        both, asked = uniform(N, 4, seed, of=2), uniform(N, 2, seed + 50)
        query = asked if told else asked[:, :0]
        return Source(torch.nn.functional.one_hot(both, 4).flatten(1).float(), query, both.gather(1, asked))

    found = {}
    for told in (True, False):
        line, _ = curve(SMALL, [texts(N, seed, told) for seed, N in enumerate((800, 200, 300))], 4, 2)
        found[told] = line["ceiling"]["distortion"]
    # Without the query, one of two known classes is the label. With probability 1/4 they are the same, so 3/4 ln 2
    # remains.
    assert found[True] < 0.1 and found[False] == pytest.approx(0.75 * math.log(2), abs=0.1)


# ----------------------------------------------------------------------------- curves made of points


def test_baselines_equal_a_calculation_by_hand():
    labels = np.array([0, 0, 1, 2])
    facts = baselines(labels, labels[:1], labels[2:], 3)
    assert facts["uniform"] == math.log(3) and facts["entropy_test"] == pytest.approx(math.log(2))
    counts = np.array([3, 2, 2]) / 7  # one text is added to each class
    assert facts["cross_entropy"] == pytest.approx(-math.log(counts[1]))
    p = np.array([3, 2, 2]) / 7  # frequencies in all seven texts
    assert facts["entropy"] == pytest.approx(min(math.log(3), -(p * np.log(p)).sum() + 2 / 14)) and facts["floor"] == 0


def test_entropies_are_corrected_for_small_samples():
    labels = uniform(1000, 200).numpy()[:, 0]
    parts = labels[:600], labels[600:700], labels[700:]
    facts = baselines(*parts, 200)
    assert facts["entropy"] == pytest.approx(math.log(200), abs=0.03) and entropy(labels, 200) < math.log(200) - 0.07
    assert facts["entropy_test"] < facts["entropy"] < facts["cross_entropy"]


def test_a_point_below_the_converse_is_flagged():
    N, H = 1000, {"entropy": 3.0, "entropy_error": 0.0}
    rng = np.random.default_rng(0)
    for total, flagged in ((3.5, False), (3.0, False), (2.97, False), (2.8, True)):
        R = np.full((2, N), 1.0)
        of_texts = rng.normal(0, 0.6, (1, N))
        D = total - R + (of_texts - of_texts.mean()).repeat(2, axis=0)
        found = converse(D, R, H)
        assert found["violates_converse"] == flagged
        assert found["converse_tolerance"] == pytest.approx(3 * 0.6 / math.sqrt(N), rel=0.1)
        assert found["above_converse"] == pytest.approx(total - 3, abs=1e-6)


RATE = st.floats(0, 50).map(lambda rate: round(rate, 9))  # the slope to a rate of 1e-308 nats would be infinite
POINT = st.tuples(RATE, st.floats(0, 6))


@settings(max_examples=60, deadline=None)
@given(st.lists(POINT, min_size=1, max_size=8), st.lists(st.floats(0, 60), min_size=1, max_size=4))
def test_the_lower_hull_is_the_best_mixture(points, wanted):
    r, d = np.array(points).T
    expected = [reference.envelope([(0.0, 5.0), *points], rate) for rate in wanted]
    np.testing.assert_allclose(at_rates(r, d, 5.0, np.array(wanted)), expected, rtol=1e-6, atol=1e-6)


def test_a_difference_is_found_with_its_interval():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 1, 1500)  # difficulty of each text, the same for both states
    betas = np.array([0.5, 2.0, 6.0])[:, None, None]
    rate = np.broadcast_to(betas, (3, 2, 1500))

    def state(shift: float, seed: int) -> Points:
        noise = np.random.default_rng(seed).normal(0, 0.3, (3, 2, 1500))
        return Points(4 - 0.5 * betas + shift + hard + noise, rate, 4 + hard)

    both = (True, True)
    nothing = compared(state(0, 1), state(0, 1), [1.0, 4.0], 4.0, both)
    assert nothing["difference"] == 0 and nothing["difference_interval"] == (0, 0) and nothing["p"] == 1
    less = compared(state(-0.2, 2), state(0, 3), [1.0, 6.0], 4.0, both)
    low, high = less["difference_interval"]
    assert low < less["difference"] < high < 0 and high - low < 0.06 and less["p"] <= 0.001 and less["up_to"] == 4
    assert [row[0] for row in less["differences"]] == pytest.approx([-0.2, -0.2], abs=0.05)
    chance = compared(state(0, 4), state(0, 5), [1.0], 4.0, both)
    assert chance["difference_interval"][0] < 0 < chance["difference_interval"][1] and chance["p"] > 0.01


def line_of_points(rates: tuple[float, ...], distortions: tuple[float, ...], N: int = 1200, seeds: int = 2) -> Points:
    """Returns points with these rates and distortions for all seeds, plus noise of each text. The constant has 4
    nats."""
    hard = np.random.default_rng(0).normal(0, 0.5, N)
    shape = (len(rates), seeds, N)
    R, D = (np.broadcast_to(np.array(x)[:, None, None], shape) for x in (rates, distortions))
    return Points(D + hard - hard.mean(), R.copy(), 4 + hard - hard.mean())


def test_curves_are_compared_up_to_the_end_of_the_shorter_one():
    """The curves are equal up to a rate of 2, where one ends and the other continues to fall."""
    short, long = line_of_points((1.0, 2.0), (3.5, 3.0)), line_of_points((1.0, 2.0, 6.0), (3.5, 3.0, 2.0))
    for pair in ((short, long), (long, short)):
        of = compared(*pair, [0.5, 2.0, 2.1, 6.0], 4.0, (True, True))
        assert of["up_to"] == 2 and of["differences"][2:] == [None, None]
        assert of["difference"] == pytest.approx(0, abs=1e-9) and of["difference_interval"] == pytest.approx(
            (0, 0), abs=1e-9
        )
        assert [row[0] for row in of["differences"][:2]] == pytest.approx([0, 0], abs=1e-9)
    # a curve ends where the first of its seeds ends
    early = short._replace(rate=np.stack([short.rate[:, 0], short.rate[:, 1] * 0.75], axis=1))
    assert compared(early, long, [1.0], 4.0, (True, True))["up_to"] == 1.5
    # a curve that found nothing is compared up to the end of the other one, but at most up to H(Y)
    none = line_of_points((0.1, 0.3), (4.5, 4.1))
    of = compared(none, long, [0.5, 2.0, 6.0, 8.0], 3.0, (False, True))
    assert of["up_to"] == 3 and [row[0] for row in of["differences"][:3]] == pytest.approx([0.25, 1.0, 2.0])
    assert of["differences"][3] is None and compared(none, short, [1.0], 3.0, (False, True))["up_to"] == 2
    assert compared(none, none, [9.0], 3.0, (False, False))["differences"] == [(0, 0, 0)]


def test_frequencies_alone_do_not_count_as_found():
    K, rng = 50, np.random.default_rng(2)
    train, test = rng.integers(K, size=500), rng.integers(K, size=2000)
    constant = constant_distortion(train, test, K)
    known = baselines(train, train[:20], test, K)
    assert known["cross_entropy"] > math.log(K) + 0.03  # because there are few training texts

    def says(gain: np.ndarray) -> bool:
        """Returns whether something is found in ten points, one of which lies below ln K by `gain`."""
        D = np.repeat(np.stack([constant + 0.2] * 9 + [math.log(K) - gain])[:, None], 2, axis=1)
        return found(Points(D, np.ones_like(D), constant), known["entropy"])

    assert not says(
        np.zeros(2000)
    )  # the probe has learned that all classes are equally frequent, which beats the constant
    assert says(np.full(2000, 0.1))
    lucky = rng.normal(0, 1, 2000)
    lucky += 2.2 / math.sqrt(2000) - lucky.mean()  # among ten points, one has this gain by chance
    assert not says(lucky) and says(lucky + 0.1)


def test_noise_in_a_state_does_not_count_as_found():
    K = 12
    make = {
        True: lambda y, seed: torch.stack([(y < 6).float(), normal(len(y), seed=seed)], dim=1),
        False: lambda y, seed: normal(len(y), 5, seed=seed),
    }
    for something, state in make.items():
        assert curve(SMALL, planted(state), K, 0)[0]["found"] == something
