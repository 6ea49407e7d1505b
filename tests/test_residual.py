"""Tests probe.py residual: it reads the model's states, computes the floors, and decodes what was planted in a
state."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from nanometa import probe
from nanometa.common.errors import UserError
from nanometa.common.statistics import mcnemar, paired_difference
from nanometa.config import TaskConfig
from nanometa.probes import probe_command, residual
from nanometa.probes.marked_texts import judged, marked_texts
from nanometa.probes.residual import (
    CLAIMS,
    STRENGTHS,
    ResidualProbe,
    classify,
    decoded,
    measure_residual,
    places_of,
    read,
    similarity,
)
from nanometa.reports import drawing, probe_pictures
from nanometa.tasks.example import Draft, Example, Maker
from tests.conftest import override, tree
from tests.runs import small_run
from tests.test_attention_probe import hooks
from tests.test_positions import (
    APPLE,
    ASK,
    EARLY,
    FILL,
    FILLER,
    FIRST,
    LATE,
    LINE_END,
    MARK,
    MARKED,
    PEAR,
    PLAIN,
    QUESTION,
    SECOND,
    kept,
    lines_of,
    made_by_hand,
)

# ----------------------------------------------------------------------------- states


@torch.no_grad()
def test_states_are_read_at_the_marks_and_before_them(tokenizer):
    """Compares with reading one text at a time, without padding. The mean is over real positions only."""
    run = small_run(tokenizer, MARKED, position="rope", n_layer=1)
    maker = Maker("list_recall", "target", TaskConfig(), tokenizer)
    examples = marked_texts(maker, "easy", 52, 3)
    assert len({len(example.ids) for example in examples}) > 1
    distances = (1, 40)
    for read_in, at in places_of(maker, examples).values():
        place = read(run, read_in, at, distances)
        assert place.here.shape == (2, 3, 16) and place.past.shape == (2, 3, 2, 16)
        last, everywhere = [], []
        for i, (example, where) in enumerate(zip(read_in, at, strict=True)):
            tokens = torch.from_numpy(example.ids)[None]
            assert torch.allclose(place.here[0, i], run.model.wte(tokens)[0, where])
            index = torch.from_numpy(np.flatnonzero(example.ids == tokenizer.meta))[None]
            hidden = run.model(tokens, torch.arange(len(example.ids))[None], index)
            last.append(run.model.ln_f(place.here[1, i]) - hidden[0, where])
            everywhere.append(run.model.wte(tokens)[0])
            for k, d in enumerate(distances):
                if where - d >= 1:
                    assert place.tokens[i, k] == example.ids[where - d]
                    assert torch.allclose(place.past[0, i, k], run.model.wte(tokens)[0, where - d])
                else:
                    assert place.tokens[i, k] == -1
        assert torch.stack(last).abs().max() < 1e-4
        assert torch.allclose(place.mean[0], torch.cat(everywhere).mean(0), atol=1e-5)
    assert hooks(run.model) == 0


def test_the_word_replaces_the_mark_in_the_same_texts(tokenizer):
    maker = Maker("copying", "target", TaskConfig(), tokenizer)
    examples = marked_texts(maker, "easy", 48, 5)
    places = places_of(maker, examples)
    assert places["word"][1] == places["mark"][1] and places["ordinary"][0] is places["mark"][0] is examples
    (word,) = tokenizer.encode(" mark").tolist()
    for example, other, at in zip(examples, places["word"][0], places["word"][1], strict=True):
        changed = np.flatnonzero(example.ids != other.ids)
        assert at in changed and (example.ids[changed] == tokenizer.meta).all() and (other.ids[changed] == word).all()
        assert tokenizer.meta not in other.ids
    without = Maker("copying", "none", TaskConfig(), tokenizer)
    assert "word" not in places_of(without, marked_texts(without, "easy", 48, 2))


def test_splits_of_the_probe_share_no_text(tokenizer):
    maker = Maker("parity", "target", TaskConfig(), tokenizer)
    splits = ("train/probe", "val", "test")
    made = [{tuple(e.ids.tolist()) for e in marked_texts(maker, "easy", 24, 60, split)} for split in splits]
    assert not (made[0] & made[1] or made[0] & made[2] or made[1] & made[2]) and all(len(of) > 20 for of in made)


# ----------------------------------------------------------------------------- figures


def test_cosines_and_floors_equal_a_calculation_by_hand():
    here = torch.tensor([[1.0, 0, 2], [0, 2, 2], [3, 0, 2]])
    past = torch.tensor([[2.0, 0, 2], [0, 1, 2], [4, 0, 2]])
    found = similarity(here, past, torch.tensor([0.0, 0, 2]))
    assert found["cosine_centred"] == pytest.approx(1)
    assert found["floor_centred"] == pytest.approx(
        1 / 3
    )  # compared with the next text's token: 0 and 0; the last text is compared with the first: 1
    cosines = [(2 + 4) / (5**0.5 * 8**0.5), (2 + 4) / (8**0.5 * 5**0.5), 16 / (13**0.5 * 20**0.5)]
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["nearer"] == pytest.approx(2 / 3) and found["nearer_interval"][0] <= found["nearer"]


def planted(n: int, seed: int, noise: float, K: int = 12):
    torch.manual_seed(5)
    directions = torch.randn(K, 20)
    torch.manual_seed(seed)
    y = torch.randint(K, (n,))
    return directions[y] * 0.5 + 3 + noise * torch.randn(n, 20), y.numpy() * 10


def test_only_what_a_state_contains_is_decoded():
    sets = [planted(n, seed, 0.4) for n, seed in ((300, 1), (60, 2), (200, 3))]
    sets[2][1][:7] = -1  # no token at this distance
    found = decoded(sets)
    assert found["decoded"] > 0.9 and found["shuffled"] < 0.25 and found["majority"] < 0.2 and found["classes"] == 12
    assert found["outcomes"][:7] == "-" * 7 and found["outcomes"].count("1") == round(193 * found["decoded"])
    nothing = [(torch.randn(len(y), 20), y) for _, y in sets]
    found = decoded(nothing)
    assert found["decoded"] < 0.2 and found["decoded"] < found["majority"] + 0.08
    sets[2][1][7:] = 999  # a token that is not in the training texts
    assert decoded(sets)["decoded"] == 0


def test_the_classifier_reaches_the_regularized_optimum():
    """Plain gradient descent comes to the same."""
    x, y = planted(80, 1, 2.0, K=3)
    y = y // 10
    ((ours,),) = classify(x, y, 3, [x], (0.1,))
    z = (x - x.mean(0)) / x.std(0)
    weight, bias = torch.zeros(3, 20, requires_grad=True), torch.zeros(3, requires_grad=True)
    for _ in range(2000):
        loss = F.cross_entropy(z @ weight.T + bias, torch.from_numpy(y)) + 0.1 / 2 * weight.square().sum() / 3
        grads = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            weight -= 0.3 * grads[0]
            bias -= 0.3 * grads[1]
    assert (ours == (z @ weight.T + bias).argmax(1).numpy()).mean() > 0.98


def test_the_strength_is_the_one_that_validation_likes_best_and_of_equals_the_stronger(monkeypatch):
    x, y = torch.zeros(4, 3), np.array([0, 1, 1, 1])
    of_val = [np.array(named) for named in ([0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0])]
    monkeypatch.setattr(
        residual,
        "classify",
        lambda x, y, K, others, strengths: ([named] * len(others) for named in of_val[: len(strengths)]),
    )
    found = decoded([(x, y)] * 3)
    assert found["strength"] == STRENGTHS[1] and found["decoded"] == 0.75 and found["outcomes"] == "1110"


def test_a_mark_that_attends_to_a_token_contains_it(tokenizer, monkeypatch):
    """After the block, the mark's state determines the token two positions earlier. The word and the filler do not."""
    run = made_by_hand(tokenizer, "learned", [(0, MARK, 0.0, FIRST + SECOND), (1, ASK, 0.0, FILL)], {})
    run.model.wte.weight.data[tokenizer.encode(" mark").item()] = ASK  # the word attends to fillers
    attention = run.model.h[0].attn
    v = attention.c_attn.weight.data[32:]
    v.zero_()
    v += torch.outer(EARLY, FIRST) + torch.outer(LATE, SECOND)

    def made(maker, level, length, n, split):
        rng, out = np.random.default_rng(len(split)), []
        for _ in range(n):
            word = APPLE if rng.random() < 0.6 else PEAR
            ids = np.array([tokenizer.eot, FILLER, word, FILLER, tokenizer.meta, QUESTION, LINE_END, tokenizer.eot])
            out.append(Example(ids, np.arange(8) == 6, Draft()))
        return out

    monkeypatch.setattr(residual, "marked_texts", made)
    cfg = ResidualProbe(n=80, train=60, distances=(1, 2))
    lines = measure_residual(cfg, run, Maker("parity", "target", TaskConfig(), tokenizer), "easy", 8)
    by = {(one["place"], one["layer"], one["distance"]): one for one in lines}
    majority = by["mark", 1, 2]["majority"]
    assert by["mark", 1, 2]["decoded"] == 1 and 0.4 < majority < 0.75 and by["mark", 1, 2]["shuffled"] < 0.8
    for place, layer in (("mark", 0), ("word", 0), ("word", 1)):
        assert by[place, layer, 2]["decoded"] == majority, (place, layer)
    one = by["mark", 1, 2]
    hits = np.array([c == "1" for c in one["outcomes"]])
    others = np.array([c == "1" for c in by["word", 1, 2]["outcomes"]])
    assert (one["more"], *one["more_interval"]) == paired_difference(hits, others) and one["more_p"] == mcnemar(
        hits, others
    )
    assert by["mark", 1, 1]["decoded"] == by["mark", 1, 1]["majority"] == 1  # the token is always the filler
    assert all("more" not in other for key, other in by.items() if key[0] != "mark")
    judged(lines, CLAIMS, 0.0, 0.05)
    assert one["more_verdict"] == "undecided: n = 80, 1000 decide"


def line(**other) -> dict:
    interval = {"nearer_interval": (0.1, 0.2), "nearer_p": 1e-9, "more_interval": (-0.01, 0.02), "more_p": 0.4}
    return {"n": 1000, "nearer": 0.15, "more": 0.0, **interval, **other}


def test_verdicts_follow_the_intervals_and_holms_correction():
    alone = {name: value for name, value in line().items() if not name.startswith("more")}
    lines = judged([line(), alone, line(more_interval=(0.1, 0.3), more_p=0.012)], CLAIMS, 0.0, 0.05)
    assert [one["nearer_verdict"] for one in lines] == ["holds"] * 3
    assert lines[0]["more_verdict"] == "does not hold" and lines[2]["more_verdict"] == "holds"
    assert "more_verdict" not in lines[1] and all(one["comparisons"] == 5 for one in lines)
    many = judged([line(more_interval=(0.1, 0.3), more_p=0.012) for _ in range(5)], CLAIMS, 0.0, 0.05)
    assert many[0]["more_verdict"] == "undecided after Holm"


# ----------------------------------------------------------------------------- the command


@pytest.mark.parametrize(("second", "data"), [("meta", MARKED), ("causal", PLAIN)])
def test_the_command_writes_and_draws_all_cells(tokenizer, tmp_path, monkeypatch, capsys, second, data):
    if second == "causal":
        monkeypatch.setattr(probe_command, "draw_picture", lambda name, lines: b"\x89PNG")
    run = small_run(tokenizer, data, position="rope", second_attention=second, n_layer=1)
    placements = ("target", "every") if second == "meta" else ("none",)
    folder = kept(run, tmp_path / "out/small", tasks=("list_recall",), placements=placements)
    probe.main(["residual", f"--run={folder}", "--n=10", "--train=16", "--lengths=48", "--distances", "1", "3"])
    lines, said = lines_of(folder / "residual.jsonl"), capsys.readouterr().out
    names = ("mark", "ordinary", "word") if second == "meta" else ("mark", "ordinary")
    where = [(one["placement"], one["layer"], one["distance"], one["place"]) for one in lines]
    assert where == [(placements[0], layer, d, name) for layer in (0, 1) for d in (1, 3) for name in names]
    assert (folder / "residual.png").read_bytes().startswith(b"\x89PNG") and "frequent," in said
    shares = [f"{100 * one['decoded']:.1f}" for one in lines if (one["place"], one["distance"]) == ("mark", 1)]
    assert re.search(rf"the mark +1  +{shares[0]} {shares[1]} ", said)
    for one in lines:
        assert (
            one["run"] == "small"
            and 8 <= one["n"] <= 10
            and one["outcomes"].count("1") == round(one["decoded"] * one["n"])
        )
        assert ("more_verdict" in one) == (one["place"] == "mark" and second == "meta")
        assert one["floor_interval"][0] <= one["floor"] <= one["floor_interval"][1]
    if second == "meta":
        figure = Figure(layout="constrained")
        probe_pictures.draw_residual(figure, lines)
        drawn = [list(of.get_ydata()) for of in figure.axes[0].lines if of.get_marker() in drawing.MARKERS]
        assert drawn == [[one["cosine_centred"] for one in lines if (one["place"], one["distance"]) == (name, 1)]
                         for name in probe_pictures.PLACE_NAMES]  # fmt: skip


REFUSED = {
    "too far": (("--distances", "45"), "reach beyond the start of all texts"),
    "distances": (("--distances", "0"), "distances=(0,) is out of range"),
    "twice": (("--distances", "2", "2"), "name each once"),
    "train": (("--train=2",), "train=2 is out of range"),
    "no meta-tokens": (("--placements=target",), "and placement target has them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(tokenizer, tmp_path, monkeypatch, case):
    args, sentence = REFUSED[case]
    run = small_run(tokenizer, PLAIN, second_attention="none")
    kept(run, tmp_path / "out/small", tasks=("parity",), placements=("none",))
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        probe.main(["residual", "--run=out/small", *override(("--n=5", "--lengths=40", "--train=8"), *args)])
    assert sentence in str(refused.value) and str(refused.value).endswith(".")
    assert tree(tmp_path) == before
