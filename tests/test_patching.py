"""Tests probe.py patching: which states it replaces, how it counts, and whether it recognizes a mark that carries the
answer."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nanometa import probe
from nanometa.common.errors import UserError
from nanometa.common.statistics import mcnemar, paired_difference
from nanometa.config import TaskConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.tasks import PLACEMENTS
from nanometa.evals.tasks import texts
from nanometa.probes import marked_texts as marked_texts_module
from nanometa.probes import patching, probe_command
from nanometa.probes.keys_values import record_keys_values, replace_keys_values
from nanometa.probes.marked_texts import answer_position, judged, marks, random_ordinary_position
from nanometa.probes.patching import (
    CLAIMS,
    EXCHANGES,
    SITES,
    PatchingProbe,
    check_own,
    compare,
    donors_of,
    exchanged,
    keys_values,
    measure_patching,
    patched,
    read,
    sites_of,
    with_keys_values,
)
from nanometa.reports import drawing, probe_pictures
from nanometa.tasks.example import Draft, Example, Maker
from tests.conftest import tree
from tests.runs import small_run
from tests.test_attention_probe import hooks
from tests.test_model import WITH_MARKERS
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

# ----------------------------------------------------------------------------- replaced states


@pytest.mark.parametrize("second", ["meta", "random"])
def test_replacing_an_embedding_equals_replacing_the_token(tokenizer, second):
    """With rope, state 0 is the token's embedding. The patched text must answer like the text that contains the donor's
    token."""
    run = small_run(tokenizer, MARKED, position="rope", second_attention=second)
    maker = Maker("list_recall", "target", TaskConfig(), tokenizer)
    examples = texts(maker, "easy", 60, 7)
    sites = sites_of(run, maker, examples)
    base, entering = read(run, examples, sites)
    donors = np.array([1, 2, 3, 4, 5, 6, 0])
    found = patched(run, examples, 0, sites["answer"], entering["answer"][0][donors], sites["asked"])
    others = []
    for i, example in enumerate(examples):
        ids = example.ids.copy()
        donor = examples[donors[i]]
        ids[answer_position(maker, example)] = donor.ids[answer_position(maker, donor)]
        others.append(example._replace(ids=ids))
    expected, _ = read(run, others, {"asked": sites["asked"]})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 0.01
    assert hooks(run.model) == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_patching_a_texts_own_state_changes_no_bit(tokenizer, monkeypatch, placement):
    run = small_run(tokenizer, MARKED, position="learned")
    maker = Maker("copying", placement, TaskConfig(), tokenizer)
    examples = texts(maker, "easy", 56, 4)
    sites = sites_of(run, maker, examples)
    check_own(run, examples, sites["mark"])
    base, entering = read(run, examples, sites)
    for site, places in sites.items():  # includes several marks per text, and marks that are repeated
        assert torch.equal(patched(run, examples, 1, places, entering[site][1], sites["asked"]), base), site
    assert sites["marks"].shape[1] == max(len(marks(maker, example)) for example in examples)
    real = patching.replace_state
    monkeypatch.setattr(
        patching, "replace_state", lambda model, layer, rows, values: real(model, layer, rows, values + 1e-3)
    )
    with pytest.raises(AssertionError, match="layer 0: a text's own state"):
        check_own(run, examples, sites["mark"])
    assert hooks(run.model) == 0


def test_ordinary_positions_are_in_the_body_and_are_not_marks(tokenizer):
    for placement in PLACEMENTS:
        maker = Maker("parity", placement, TaskConfig(), tokenizer)
        places = []
        for i, example in enumerate(texts(maker, "easy", 40, 30)):
            at = random_ordinary_position(maker, example, i)
            assert 0 < at < np.flatnonzero(example.answers)[0] and at not in marks(maker, example)
            places.append(at)
        assert len(set(places)) > 8


def test_donors_have_another_answer_and_if_possible_the_same_place():
    firsts = np.array([1, 1, 2, 1, 3, 3, 2])
    places = np.array([9, 9, 9, 4, 5, 5, 9])
    counts = np.array([2, 2, 2, 2, 2, 2, 1])
    # 3 has no other text at 4 and takes the next one, 4; texts 4 and 5 have the same answer and take the next texts, at
    # 9
    assert donors_of(firsts, places, counts).tolist() == [2, 2, 0, 4, 0, 0, 3]
    rng = np.random.default_rng(0)
    firsts, places, counts = (rng.integers(2, size=200), rng.integers(20, size=200), np.ones(200, dtype=int))
    donors = donors_of(firsts, places, counts)
    assert (firsts[donors] != firsts).all()
    for i, donor in enumerate(donors):
        alike = (places == places[i]) & (firsts != firsts[i])
        assert places[donor] == places[i] or not alike.any()
    with pytest.raises(
        UserError, match=r"all \d+ texts have the same answer, so none can be a donor: take a larger --n"
    ):
        donors_of(np.ones(5), places[:5], counts[:5])


# ----------------------------------------------------------------------------- keys and values


def marked_run(tokenizer, second: str, **shape):
    """Returns a run, its task texts with several marks, their marks and the positions that predict the answer."""
    placement = "target" if second in WITH_MARKERS else "none"
    run = small_run(tokenizer, MARKED, position="rope", second_attention=second, **shape)
    maker = Maker("copying", placement, TaskConfig(), tokenizer)
    examples = texts(maker, "easy", 56, 5)
    return run, maker, examples, sites_of(run, maker, examples)


@pytest.mark.parametrize("site", EXCHANGES)
@pytest.mark.parametrize("second", SECOND_ATTENTIONS)
def test_exchanging_a_texts_own_keys_and_values_changes_no_bit(tokenizer, second, site):
    run, maker, examples, sites = marked_run(tokenizer, second)
    if not exchanged(run, maker, site):
        assert "second_attn" in EXCHANGES[site] and second in ("none", "random")
        return
    base, _ = read(run, examples, sites)
    where = EXCHANGES[site], sites["marks"]
    own = keys_values(run, examples, *where)
    assert len(own) == 2 * len(EXCHANGES[site]) and own[0].shape == (5, sites["marks"].shape[1], 32)
    assert torch.equal(with_keys_values(run, examples, *where, own, sites["asked"]), base)
    changed = with_keys_values(run, examples, *where, [of + 1 for of in own], sites["asked"])
    assert (changed - base).abs().max() > 1e-3
    assert hooks(run.model) == 0


@pytest.mark.parametrize("second", [name for name in SECOND_ATTENTIONS if name in WITH_MARKERS])
def test_every_layer_sees_the_donors_keys_and_values_at_the_marks(tokenizer, second):
    """Reads the projections again while they are replaced. In the first layer all other rows stay the same."""
    run, maker, examples, sites = marked_run(tokenizer, second)
    names, donors = EXCHANGES["kv_both" if exchanged(run, maker, "kv_both") else "kv_causal"], np.array([1, 2, 3, 4, 0])
    own = keys_values(run, examples, names, sites["marks"])
    values = [of[donors] for of in own]
    ((_, batch),) = marked_texts_module.batches(run, examples)
    at = torch.from_numpy(sites["marks"])
    outputs = {}
    for name in ("before", "after"):
        replaced = values if name == "after" else own
        with replace_keys_values(run.model, names, at, batch, replaced):
            seen = outputs[name] = []
            handles = [block.attn.c_attn.register_forward_hook(lambda layer, args, qkv, seen=seen: seen.append(qkv))
                       for block in run.model.h]  # fmt: skip
            with record_keys_values(run.model, names, at, batch) as recorded:
                hidden = marked_texts_module.read_hidden(run, batch)
            for handle in handles:
                handle.remove()
        seen.append(hidden)
        assert all(map(torch.equal, recorded, replaced))
    first, then = outputs["before"][0], outputs["after"][0]
    others = torch.ones_like(batch.tokens, dtype=torch.bool).scatter(1, at, False)
    assert torch.equal(first[others], then[others]) and torch.equal(first[..., :16], then[..., :16])
    # in the first layer all marks have the same keys and values, so the others change after the second
    assert not torch.equal(outputs["before"][2][others], outputs["after"][2][others])


def test_in_one_layer_keys_and_values_are_all_that_others_see_of_a_state(tokenizer):
    """The answer is predicted at another token, which sees nothing else of the marks than their keys and values."""
    run, _, examples, sites = marked_run(tokenizer, "none", n_layer=1)
    assert not (sites["marks"] == sites["asked"]).any()
    _, entering = read(run, examples, sites)
    donors = np.array([1, 2, 3, 4, 0])
    states = patched(run, examples, 0, sites["marks"], entering["marks"][0][donors], sites["asked"])
    values = [of[donors] for of in keys_values(run, examples, ("attn",), sites["marks"])]
    found = with_keys_values(run, examples, ("attn",), sites["marks"], values, sites["asked"])
    torch.testing.assert_close(found, states, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- what the probe finds in a model


def by_hand(tokenizer, monkeypatch, position: str, looks: list, brings: dict, table=None) -> dict:
    """Measures texts of ten positions, one of them a mark and the others filler, and a question.

    The answer is the first word if the mark is early and the second word if it is late. Returns site -> line.
    """
    run, examples = made_by_hand(tokenizer, position, looks, brings), []
    if table is not None:
        run.model.wpe.weight.data[1:6], run.model.wpe.weight.data[6:11] = table
    for place in [*range(1, 11)] * 4:
        ids = np.array([tokenizer.eot, *[FILLER] * 10, QUESTION, APPLE if place < 6 else PEAR, LINE_END, tokenizer.eot])
        ids[place] = tokenizer.meta
        examples.append(Example(ids, np.isin(np.arange(15), (12, 13)), Draft()))
    monkeypatch.setattr(patching, "marked_texts", lambda *_: examples)
    lines = measure_patching(PatchingProbe(n=40), run, Maker("parity", "target", TaskConfig(), tokenizer), "easy", 15)
    assert [line["site"] for line in lines] == ["mark", "marks", "after", "ordinary", "asked", *EXCHANGES]
    return {line["site"]: line for line in lines}


def test_patching_recognizes_a_mark_that_carries_the_answer(tokenizer, monkeypatch, capsys):
    """The mark's state contains its position, so the donor's state brings the donor's answer."""
    lines = by_hand(
        tokenizer, monkeypatch, "learned", [(0, ASK, 0.0, MARK)], {EARLY: FIRST, LATE: SECOND}, (EARLY, LATE)
    )
    for site in ("mark", "marks", "kv_causal", "kv_both"):
        assert (lines[site]["kept_unpatched"], lines[site]["kept"], lines[site]["donor"]) == (1, 0, 1)
        assert lines[site]["outcomes"] == "d" * 40 and lines[site]["carried"] == lines[site]["needed"] == 1
        assert lines[site]["logit_difference"] == pytest.approx(-lines[site]["logit_difference_unpatched"]) != 0
        assert lines[site]["same_place"] == 0  # each position has one answer
    assert_others_keep(lines)
    said = capsys.readouterr().out
    assert "kept / donor by layer: 0.0% / 100.0%" in said
    assert "kv_causal kept / donor in all layers at once: 0.0% / 100.0%" in said


def test_patching_recognizes_a_mark_of_which_only_the_position_is_read(tokenizer, monkeypatch):
    """With rope, the answer depends on the distance. A donor's state is read at the text's own position."""
    looks = [(1, ASK, np.pi / 2 - 5.5 * 0.316, MARK)]
    lines = by_hand(tokenizer, monkeypatch, "rope", looks, {MARK: SECOND, FILL: FIRST})
    for site in ("mark", "marks", *EXCHANGES):
        assert lines[site]["outcomes"] == "k" * 40
    assert_others_keep(lines)


def assert_others_keep(lines: dict) -> None:
    """After a mark at position 10 comes the question, and an ordinary position may be the question's. Patching it
    removes the question."""
    assert lines["asked"]["outcomes"] == lines["kv_second"]["outcomes"] == "k" * 40
    assert lines["ordinary"]["kept"] >= 0.9
    assert all(outcome == "k" for i, outcome in enumerate(lines["after"]["outcomes"]) if i % 10 != 9)


# ----------------------------------------------------------------------------- counting


def logits_of(named: list[int]) -> torch.Tensor:
    return 4.0 * torch.nn.functional.one_hot(torch.tensor(named), 6).float()


def test_outcomes_equal_a_count_by_hand():
    own, donor = np.array([1, 1, 2, 2, 3]), np.array([2, 3, 1, 1, 1])
    base, now = [1, 1, 2, 1, 0], [1, 3, 5, 1, 3]
    found = compare(logits_of(base), logits_of(now), own, donor)
    assert found["outcomes"] == "kd-dk" and found["n"] == 5
    assert (found["kept"], found["donor"], found["other"]) == pytest.approx((0.4, 0.4, 0.2))
    assert (found["kept_unpatched"], found["donor_unpatched"]) == (0.6, 0.2)
    before, after = np.array([1, 1, 1, 0, 0]) == 1, np.array([1, 0, 0, 0, 1]) == 1
    assert (found["needed"], *found["needed_interval"]) == paired_difference(before, after)
    assert found["needed_p"] == mcnemar(before, after) and found["carried"] == pytest.approx(0.2)
    assert found["logit_difference"] == pytest.approx((4 - 4 + 0 - 4 + 4) / 5)
    assert found["logit_difference_unpatched"] == pytest.approx((4 + 4 + 4 - 4 + 0) / 5)


def line(kept: float, donor: float, site="mark", layer=0, n=1000) -> dict:
    """Returns a line in which 900 of 1000 texts are right without a patch, and `kept` of them with it."""
    base, now = np.arange(n) < 0.9 * n, np.arange(n) < kept * n
    own, others = np.full(n, 1), np.full(n, 2)
    took = np.arange(n) >= (1 - donor) * n
    logits = logits_of(np.where(now, 1, np.where(took, 2, 0)).tolist())
    return {
        "task": "parity", "placement": "target", "level": "easy", "question": "index", "length": 48,
        "mark": "meta-token", "site": site, "layer": layer, "arm": "meta + rope", "run": "r", "step": 1, "seed": 2,
        "same_place": 0.5, "chance": 0.5,
        **compare(logits_of(np.where(base, 1, 0).tolist()), logits, own, others),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shares", "needed", "carried"),
    [
        ((0.9, 0.0), "does not hold", "does not hold"),
        ((0.5, 0.4), "holds", "holds"),
        ((0.5, 0.0), "holds", "does not hold"),
        ((0.88, 0.0), "holds, within the margin", "does not hold"),
    ],
)
def test_verdicts_follow_the_rules(shares, needed, carried):
    lines = judged([line(*shares), line(0.9, 0.0, "ordinary")], CLAIMS, 0.0, 0.05)
    assert (lines[0]["needed_verdict"], lines[0]["carried_verdict"]) == (needed, carried)
    assert lines[0]["comparisons"] == 4
    few = judged([line(*shares, n=500)], CLAIMS, 0.0, 0.05)
    assert few[0]["needed_verdict"] == few[0]["carried_verdict"] == "undecided: n = 500, 1000 decide"


def test_the_picture_shows_every_line():
    one = line(0.9, 0.0, n=40)
    lines = [
        {**one, "site": site, "layer": layer, "kept": 0.9 - 0.1 * layer - 0.01 * i, "donor": 0.05 * layer + 0.01 * i}
        for i, site in enumerate(SITES) for layer in range(3)
    ] + [{**one, "site": site, "layer": None, "kept": 0.3, "donor": 0.5} for site in EXCHANGES]  # fmt: skip
    figure = Figure(layout="constrained")
    probe_pictures.draw_patching(figure, lines)
    for axes, share in zip(figure.axes, ("kept", "donor"), strict=True):
        curves = [list(of.get_ydata()) for of in axes.lines if of.get_marker() in drawing.MARKERS]
        assert curves == [[100 * one[share] for one in lines if one["site"] == site]
                          for site in (*SITES, *EXCHANGES)]  # fmt: skip
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "all"]


# ----------------------------------------------------------------------------- the command


@pytest.mark.parametrize(("second", "data"), [("meta", MARKED), ("none", PLAIN)])
def test_the_command_writes_and_draws_all_sites_and_layers(tokenizer, tmp_path, monkeypatch, capsys, second, data):
    drawn: list[list[dict]] = []
    if second == "none":
        monkeypatch.setattr(probe_command, "draw_picture", lambda name, lines: drawn.append(lines) or b"\x89PNG")
    run = small_run(tokenizer, data, position="rope", second_attention=second)
    placements = ("background", "target", "none") if second == "meta" else ("none",)
    folder = kept(run, tmp_path / "out/small", tasks=("copying", "parity"), placements=placements)
    probe.main(["patching", f"--run={folder}", "--n=12", "--lengths=48", "--sites", "mark", "answer"])
    lines, said_out = lines_of(folder / "patching.jsonl"), capsys.readouterr().out
    where = [(one["task"], one["placement"], one["site"], one["layer"]) for one in lines]
    assert where == [
        (task, placement, site, layer)
        for task in ("copying", "parity") for placement in ("target", "none")[second == "none" :]
        for site in ("mark", "answer")[: 1 + (task == "copying")] for layer in (0, 1)
    ]  # fmt: skip
    for one in lines:
        assert one["n"] == len(one["outcomes"]) == 12 and one["comparisons"] == 2 * len(lines)
        assert one["kept"] == one["outcomes"].count("k") / 12 and one["donor"] == one["outcomes"].count("d") / 12
        assert one["kept_interval"][0] <= one["kept"] <= one["kept_interval"][1] and one["run"] == "small"
    assert (folder / "patching.png").read_bytes().startswith(b"\x89PNG")
    assert "  mark      kept / donor by layer: " in said_out
    if second == "none":  # the picture shows the lines of the file, and of repeated lines those with the most texts
        (folder / "patching.jsonl").write_text(
            (folder / "patching.jsonl").read_text() + json.dumps({**lines[0], "weights_sha256": "other"}) + "\n"
        )
        for n in (13, 11):
            probe.main(["patching", f"--run={folder}", f"--n={n}", "--lengths=48", "--sites=mark", "--tasks=parity"])
        for of in drawn[1:]:
            assert [(one["task"], one["site"], one["layer"], one["n"]) for one in of] == [
                *(("copying", site, layer, 12) for site in ("mark", "answer") for layer in (0, 1)),
                *(("parity", "mark", layer, 13) for layer in (0, 1)),
            ]
        with (folder / "patching.jsonl").open("a") as file:
            file.write(json.dumps({name: value for name, value in lines[0].items() if name != "kept"}) + "\n")
        with pytest.raises(UserError, match=r"patching.jsonl, line 12 is no line of .* \(kept is missing\): remove it"):
            probe.main(["patching", f"--run={folder}", "--n=13", "--lengths=48"])
        assert len(drawn) == 3


REFUSED = {
    "no meta-tokens": (PLAIN, {"placements": ("none",)}, ("--placements=every",), "and placement every has them"),
    "one text": (MARKED, {}, ("--n=1",), "n=1 is out of range"),
    "no second attention": (MARKED, {}, ("--sites=kv_second",), "connects no marks of these texts"),
    "sites": (MARKED, {}, ("--sites", "mark", "mark"), "name each once"),
    "margin": (MARKED, {}, ("--margin=1",), "margin=1.0 is out of range"),
    "too long": (MARKED, {}, ("--lengths=80",), "80 positions do not fit into the learned position table"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(tokenizer, tmp_path, monkeypatch, capsys, case):
    data, task, args, sentence = REFUSED[case]
    run = small_run(tokenizer, data, position="learned", second_attention="none")
    kept(run, tmp_path / "out/small", tasks=("parity",), **task)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    defaults = [arg for arg in ("--n=5", "--lengths=40") if not args[0].startswith(arg.split("=")[0])]
    with pytest.raises(UserError) as refused:
        probe.main(["patching", "--run=out/small", *defaults, *args])
    assert sentence in str(refused.value) and str(refused.value).endswith(".")
    assert tree(tmp_path) == before and capsys.readouterr().out == ""
