"""Tests probe.py paper_bottleneck: its probes equal a single one trained text by text, states of a repetition are
paired, and random features contain nothing."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nanometa import probe
from nanometa.common.errors import UserError
from nanometa.common.statistics import seed_difference
from nanometa.config import TaskConfig
from nanometa.probes import paper_bottleneck
from nanometa.probes.paper_bottleneck import (
    DRAWS,
    PaperBottleneckProbe,
    compared,
    first_state,
    fit_heads,
    initial_weights,
    measure_heads,
    random_features,
)
from nanometa.probes.text_positions import LocatedText
from nanometa.reports import drawing, probe_pictures
from nanometa.tasks.example import Maker
from tests.conftest import override, tree
from tests.reference.bottleneck import paper_head
from tests.runs import small_run
from tests.test_positions import MARKED, PLAIN, kept, lines_of, timeless

FAST = ("--n=12", "--lengths=48", "--repeats=3", "--train_texts=4", "--epochs=2", "--betas", "0.01", "1")


def states(n: int, seed: int, C: int = 6, V: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, C, generator=generator), torch.randint(V, (n,), generator=generator)


def test_probes_equal_single_ones_trained_text_by_text():
    cfg = PaperBottleneckProbe(betas=(0.01, 0.3, 2.0), z_dim=4, epochs=3, learning_rate=0.01)
    (h, y), (held, labels) = states(7, 1), states(5, 2)
    weights = fit_heads(h, y, 9, cfg, seed=11)
    nats, rates = measure_heads(weights, held, labels)
    start = initial_weights(6, 9, cfg, 11)
    # the order of draws is an order of all texts, and then one noise for each
    generator, order, noises = torch.Generator().manual_seed(11 + 1_000_003), [], []
    for _ in range(3):
        order += torch.randperm(7, generator=generator).tolist()
        noises += [torch.randn(1, 4, generator=generator)[0] for _ in range(7)]
    for i, beta in enumerate(cfg.betas):
        losses = paper_head(h, y, beta, start, order, noises, 0.01)
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(DRAWS):
            noise = torch.randn(5, 4, generator=generator)
            found += [losses(held[k], labels[k], noise[k]) for k in range(5)]
        slow = torch.tensor([[part.item() for part in pair] for pair in found]).mean(0)
        assert (nats[i], rates[i]) == pytest.approx(slow.tolist(), rel=1e-4)
    assert rates[0] > rates[2]  # a dearer rate is lower


def test_initial_weights_are_those_of_torchs_linear():
    cfg = PaperBottleneckProbe(z_dim=8)
    weights = initial_weights(25, 40, cfg, 0)
    for name, inputs in (("code", 25), ("code_bias", 25), ("out", 8), ("out_bias", 8)):
        most = inputs**-0.5
        assert 0.9 * most < weights[name].abs().max() <= most and abs(weights[name].mean()) < 0.2 * most
    assert weights["code"].shape == (25, 16) and weights["out"].shape == (8, 40)


def test_random_features_have_the_moments_of_the_states_and_differ_between_texts():
    like = torch.randn(500, 6) * torch.arange(1, 7) + torch.arange(6)
    pool, test = random_features(like, [4000, 3000])
    assert pool.shape == (4000, 6) and test.shape == (3000, 6) and not torch.equal(pool[:3000], test)
    for features in (pool, test):
        torch.testing.assert_close(features.mean(0), like.mean(0), atol=0.5, rtol=0)
        torch.testing.assert_close(features.std(0), like.std(0), rtol=0.1, atol=0)


def test_a_planted_state_is_told_from_random_features():
    """With enough texts the head finds a label that the state contains, and nothing in random features."""
    cfg = PaperBottleneckProbe(betas=(0.01,), epochs=10, z_dim=8, learning_rate=0.01)
    directions, y = 3 * torch.eye(6), torch.randint(6, (400,), generator=torch.Generator().manual_seed(1))
    h = directions[y] + 0.1 * torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    empty, _ = random_features(h, [400, 1])
    planted, nothing = (
        measure_heads(fit_heads(of[:300], y[:300], 6, cfg, 3), of[300:], y[300:])[0][0] for of in (h, empty)
    )
    assert planted < 0.3 and nothing > 1.7


def test_differences_are_paired_over_repetitions():
    ours, theirs = np.array([1.0, 2.0, 4.0]), np.array([1.5, 1.0, 5.0])
    found = compared("meta", ours, theirs)
    assert (found["difference"], *found["difference_interval"]) == seed_difference(ours, theirs)
    assert found["sd"] == pytest.approx(np.std([-0.5, 1, -1], ddof=1)) and found["below"] == pytest.approx(2 / 3)
    assert found["minus_from"] == "meta"


@pytest.mark.parametrize(("second", "data"), [("meta", MARKED), ("none", PLAIN)])
def test_the_command_writes_and_draws_all_states_and_prices(tokenizer, tmp_path, capsys, second, data):
    run = small_run(tokenizer, data, position="rope", second_attention=second)
    placement = "target" if second == "meta" else "none"
    folder = kept(run, tmp_path / "out/small", tasks=("list_recall",), placements=(placement,))
    args = ["paper_bottleneck", f"--run={folder}", f"--placements={placement}", *FAST]
    probe.main(args)
    lines, said = lines_of(folder / "paper_bottleneck.jsonl"), capsys.readouterr().out
    first = "meta" if second == "meta" else "delimiter"
    assert [(line["state"], line["beta"]) for line in lines] == [
        (state, beta) for state in (first, "last", "features") for beta in (0.01, 1.0)
    ]
    for line in lines:
        assert line["n"] == 12 and line["repeats"] == 3 and line["uniform"] == np.log(tokenizer.n_content)
        assert line["distortion_interval"][0] <= line["distortion"] <= line["distortion_interval"][1]
        mine = next(one for one in lines if (one["state"], one["beta"]) == (first, line["beta"]))
        if line["state"] != first:
            assert line["difference"] == pytest.approx(mine["distortion"] - line["distortion"])
        assert ("difference" in line) == (line["state"] != first)
    assert (folder / "paper_bottleneck.png").read_bytes().startswith(b"\x89PNG") and "There is no verdict" not in said
    probe_pictures.draw_paper_bottleneck(figure := Figure(layout="constrained"), lines)
    filled = [list(of.get_ydata()) for of in figure.axes[0].lines
              if of.get_marker() in drawing.MARKERS and of.get_fillstyle() == "full"]  # fmt: skip
    assert filled == [[line["distortion"] for line in lines if line["state"] == s] for s in (first, "last", "features")]
    probe.main(args)
    again = timeless(lines_of(folder / "paper_bottleneck.jsonl"))
    assert again[: len(lines)] == again[len(lines) :]


def test_states_of_a_repetition_share_texts_weights_order_and_noise(tokenizer, monkeypatch):
    """Each repetition has texts of its own, which all its states share."""
    run = small_run(tokenizer, MARKED, position="rope")
    cfg = PaperBottleneckProbe(n=4, repeats=3, train_texts=5, epochs=1, betas=(0.1,), lengths=(48,))
    calls, real = [], paper_bottleneck.fit_heads
    monkeypatch.setattr(
        paper_bottleneck, "fit_heads", lambda h, y, V, cfg, seed: calls.append((h, y, seed)) or real(h, y, V, cfg, seed)
    )
    ((maker, level, length),) = cfg.cells(run)
    paper_bottleneck.measure_cell(cfg, run, maker, level, length)
    assert [seed for *_, seed in calls] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for repeat in range(3):
        _, ys, _ = zip(*calls[3 * repeat : 3 * repeat + 3], strict=True)
        assert torch.equal(ys[0], ys[1]) and torch.equal(ys[0], ys[2]) and len(ys[0]) == 5
    assert not torch.equal(calls[0][0], calls[3][0]) and not torch.equal(calls[0][0], calls[1][0])


def test_texts_without_any_mark_are_refused(tokenizer):
    maker = Maker("list_recall", "none", TaskConfig(), tokenizer)
    text = LocatedText(np.zeros(3), 2, (), {"last": 1})
    assert first_state(maker, [text._replace(at={"delimiter": 1})]) == "delimiter"
    with pytest.raises(UserError, match="cannot be read, because 1 of 2 texts have no meta-token .* take other --pla"):
        first_state(maker, [text, text._replace(at={"meta": 1})])


REFUSED = {
    "margin": (("--margin=0.1",), "--margin has no effect on paper_bottleneck"),
    "repeats": (("--repeats=1",), "repeats=1 is out of range"),
    "betas": (("--betas", "-1"), "betas=(-1.0,) is out of range"),
    "too long": (("--lengths=80",), "80 positions do not fit into the learned position table"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(tokenizer, tmp_path, monkeypatch, case):
    args, sentence = REFUSED[case]
    run = small_run(tokenizer, MARKED, position="learned")
    kept(run, tmp_path / "out/small", tasks=("list_recall",), placements=("target",))
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    rest = override(FAST[:5], *args) + ([] if args[0] == "--betas" else list(FAST[5:]))
    with pytest.raises(UserError) as refused:
        probe.main(["paper_bottleneck", "--run=out/small", *rest])
    assert sentence in str(refused.value) and str(refused.value).endswith(".")
    assert tree(tmp_path) == before
