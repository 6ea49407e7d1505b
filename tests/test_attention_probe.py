"""Tests probe.py attention: it reads the model's own heads, its figures follow the definitions, it finds a planted
boost."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.special import softmax
from scipy.stats import entropy

from nanometa import probe
from nanometa.common.errors import UserError
from nanometa.common.statistics import bootstrap_means, bootstrap_ratio, mean_p
from nanometa.config import TaskConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.tasks import PLACEMENTS, TASKS
from nanometa.evals.tasks import texts
from nanometa.inference.scoring import hidden_states
from nanometa.probes import probe_command
from nanometa.probes.attention import CLAIMS, AttentionProbe, by_text, measure_attention, paired, summarise
from nanometa.probes.heads import FIRST, SECOND, observe_heads
from nanometa.probes.marked_texts import (
    MarkedTextsProbe,
    answer_position,
    answer_query_position,
    batches,
    judged,
    mark_id,
    marks,
    span_end_mark,
)
from nanometa.probes.positions import under
from nanometa.probes.theorem import boosted_entropy
from nanometa.reports import probe_pictures
from nanometa.reports.probe_sections import SECTIONS
from nanometa.tasks.example import Draft, Example, Maker
from tests.conftest import tree
from tests.reference import heads as reference
from tests.runs import small_run
from tests.test_model import LAYERED, WITH_MARKERS, crowded, inputs
from tests.test_positions import (
    APPLE,
    ASK,
    FILLER,
    LINE_END,
    MARK,
    MARKED,
    PLAIN,
    QUESTION,
    kept,
    lines_of,
    made_by_hand,
    restless,
)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ----------------------------------------------------------------------------- heads


@pytest.mark.parametrize(("second", "position"), itertools.product(SECOND_ATTENTIONS, ("learned", "rope")))
@pytest.mark.parametrize("place", ["same", "none", "none_first"])
@pytest.mark.parametrize("of", [inputs, crowded])
@torch.no_grad()
def test_recomputed_weights_give_the_output_of_the_attention(second, position, place, of):
    if (place == "none_first" and position == "learned") or (place != "same" and second not in WITH_MARKERS):
        pytest.skip("the model has no such positions")
    model = restless(second, position).float()
    model.cfg = dataclasses.replace(model.cfg, meta_position=place)
    tokens, positions, index = of()
    plain, found, gave = model(tokens, positions, index), {}, {}
    for layer, block in enumerate(model.h):
        for which in (FIRST, SECOND)[: 1 + (second != "none")]:
            module = block.attn if which == FIRST else block.second_attn
            module.register_forward_hook(
                lambda module, inputs, output, key=(layer, which): gave.update({key: (module, inputs, output)})
            )
    with observe_heads(model, lambda layer, which, rows: found.update({(layer, which): rows})):
        assert torch.equal(model(tokens, positions, index), plain)
    assert hooks(model) == len(gave) == len(found) == 2 * (1 + (second != "none"))  # only the hooks of this test
    for key, rows in found.items():
        module, (x, *_), output = gave[key]
        y = (rows.logits().softmax(-1) @ rows.v).transpose(1, 2).flatten(2)
        y = module.c_proj(y)
        if key[1] == SECOND and SECOND_ATTENTIONS[second].selects:  # the layer adds its input
            output = output - x
        if key[1] == SECOND and SECOND_ATTENTIONS[second].gathers:
            assert torch.equal(rows.at, index)
            for row, at in enumerate(index):
                n = int((at < 12).sum())
                torch.testing.assert_close(y[row, :n], output[row, at[:n]], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(rows.at, positions)
            reads = (positions >= index[:, :1]) | (key[1] == FIRST) | (second != "read_meta")
            torch.testing.assert_close(y[reads], output[reads], rtol=1e-4, atol=1e-5)
            assert (output[~reads] == 0).all()


def test_hooks_are_removed_and_a_dynamic_scale_is_refused():
    model = restless("meta", "rope").float()
    with pytest.raises(KeyboardInterrupt), observe_heads(model, lambda *_: None):
        assert hooks(model) == 8
        raise KeyboardInterrupt
    assert hooks(model) == 0
    model.cfg = dataclasses.replace(model.cfg, rope_scaling="ntk", rope_dynamic=True)
    with pytest.raises(UserError, match="leave --rope_dynamic out"), observe_heads(model, lambda *_: None):
        pass
    assert hooks(model) == 0


# ----------------------------------------------------------------------------- the theorem


def test_boosting_a_key_changes_entropy_as_the_theorem_says():
    """The formula from p and H agrees with the definition of entropy, and its slope with -p (ln p + H). Entropy falls
    for a likely key; for an unlikely one it rises until the key is likely."""
    logits, t = np.linspace(-1, 1, 64), np.linspace(0, 10, 81)
    logits[0] = 7.0
    for name, key in (("likely", 0), ("unlikely", 32)):
        boosted = np.tile(logits, (len(t), 1))
        boosted[:, key] += t
        p, H = softmax(boosted, axis=-1)[:, key], entropy(softmax(boosted, axis=-1), axis=-1)
        np.testing.assert_allclose(boosted_entropy(p[0], H[0], t), H, rtol=1e-9, atol=1e-12)
        slope = -p * (np.log(p) + H)
        np.testing.assert_allclose((H[2:] - H[:-2]) / (t[2:] - t[:-2]), slope[1:-1], rtol=0, atol=2e-3)
        turn = int(H.argmax())
        assert turn == 0 if name == "likely" else turn > 20 and H.max() > H[0] + 0.1
        assert (slope[: max(turn - 1, 0)] > 0).all() and (slope[turn + 1 :] < 0).all()


def test_entropy_after_a_boost_where_one_key_has_nearly_all():
    logits = np.array([0.0, 14.0, 0.5, -80.0])
    for key, t in ((1, -3.0), (0, 20.0), (3, 40.0)):
        boosted = logits.copy()
        boosted[key] += t
        p, H = np.clip(softmax(logits)[key], 1e-30, 1 - 1e-9), entropy(softmax(logits))
        assert boosted_entropy(p, H, t) == pytest.approx(entropy(softmax(boosted)), abs=1e-3)


# ----------------------------------------------------------------------------- positions of marks and answers


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("task", TASKS)
def test_marks_and_answers_are_where_a_reader_finds_them(tokenizer, task, placement):
    """The reader sees only the decoded text, not the draft."""
    maker = Maker(task, placement, TaskConfig(), tokenizer)
    mark = {"target": "<m>", "every": "<m>", "none": " mark(?![a-z])", "background": "<m>"}[placement]
    for example in texts(maker, "easy", 90, 8):
        spelt = ["<m>" if id == tokenizer.meta else tokenizer.decode([id]) for id in example.ids.tolist()]
        text, starts = "".join(spelt), np.cumsum([0, *map(len, spelt)]).tolist()
        found, end = marks(maker, example), span_end_mark(maker, example)
        assert end in found and len(found) == len(re.findall(mark, text))
        assert all(re.match(mark, text[starts[i] :]) for i in found)
        asked = [answer_query_position(small_run(tokenizer, MARKED, rule), example) + 1 for rule in ("ignore", "skip")]
        assert clean(text[: starts[asked[0]]]).endswith(":") and example.answers[asked[0]]
        assert text[: starts[asked[1]]].endswith(":") and asked[1] <= asked[0]
        answer = text[starts[asked[0]] :].split("\n")[0]
        at = answer_position(maker, example)
        in_text = {"list_recall": True, "segment_counting": False, "parity": False, "copying": True}
        if not in_text[task]:
            assert at is None
            continue
        before, behind = (clean(part) for part in (text[: starts[at]], text[starts[at] :]))
        assert behind.startswith(answer)
        line = before.split("\n")[-1] + behind.split("\n")[0]
        if task == "list_recall":
            name, number = re.search(r" \? (\w+) #(\d+):", clean(text)).groups()
            assert line.removeprefix("<|endoftext|>").startswith(f" {name}:")
            assert line.split(":")[1].split()[int(number) - 1] == answer.strip()
        else:
            assert before.endswith(" [")
            if placement != "target":
                assert re.search(r" mark(<m>| )*\[(<m>)*$", text[: starts[at]])
        if placement != "background":  # directly after the answer, at the end of its line
            assert re.match(f"{mark}\n", text[starts[end] :]) and "\n" not in text[starts[at] : starts[end]]


def clean(text: str) -> str:
    return re.sub("<m>| mark(?![a-z])", "", text)


def test_list_recall_is_the_default_task_if_the_run_was_trained_on_it(tokenizer):
    run = small_run(tokenizer, MARKED, block_size=128)
    for tasks, asked in ((("parity", "list_recall"), ["list_recall"]), (("parity", "copying"), ["parity", "copying"])):
        run.config = dataclasses.replace(
            run.config, task=TaskConfig(tasks=tasks, placements=("every", "none", "target"), level="easy")
        )
        probed = MarkedTextsProbe(lengths=(60,))
        assert [maker.name for maker, _, _ in probed.marked_cells(run, ("target", "background"))] == asked
        assert [maker.placement for maker, _, _ in probed.marked_cells(run)][:3] == ["every", "none", "target"]
        assert {maker.placement for maker, _, _ in probed.marked_cells(run, ("background",))} == {
            "every",
            "none",
            "target",
        }
        (maker, level, length), *_ = dataclasses.replace(probed, tasks=("copying",)).marked_cells(run, ("target",))
        assert (maker.name, maker.placement, level, length) == ("copying", "target", "easy", 60)


# ----------------------------------------------------------------------------- figures


@pytest.mark.parametrize("second", [name for name in LAYERED if name in WITH_MARKERS])
@pytest.mark.parametrize(
    "placement", ["background", "none"]
)  # background: meta-tokens scattered over the text; none: the ordinary word as the mark
def test_figures_equal_their_definition_query_by_query(tokenizer, second, placement):
    """Computes the figures anew, query by query and under each condition, and averages them by text."""
    run = small_run(tokenizer, MARKED, position="rope", second_attention=second)
    maker = Maker("copying", placement, TaskConfig(meta_share=0.3), tokenizer)
    examples = texts(maker, "easy", 56, 3)
    found, rows = by_text(run, maker, examples), {}
    for condition in ("full", "no_embedding"):
        for _, batch in batches(run, examples, 3):
            with (
                under(run.model, mark_id(maker), condition),
                observe_heads(run.model, lambda layer, which, of, c=condition: rows.update({(c, layer, which): of})),
            ):
                hidden_states(run.model, batch)
    for (layer, which), measured in found.items():
        for text, example in enumerate(examples):
            at = rows["full", layer, which].at[text].tolist()
            T, positions = len(example.ids), marks(maker, example).tolist()
            entry = SECOND_ATTENTIONS[second]
            among = positions if entry.others == "read" and which == SECOND else range(T)  # the possible keys
            gathered, window = entry.gathers and which == SECOND, entry.window if which == SECOND else None
            if gathered and window is not None:
                assert len(positions) > window
            if gathered:
                queries = range(1, len(positions))
            else:
                queries = range(positions[-1] + 1, T - 1)
            for head in range(2):
                sums: dict[str, list[float]] = {}
                for query in queries:
                    keys = [j for j in range(len(at)) if j <= query and (window is None or j > query - window)]
                    keys = [j for j in keys if gathered or j in among]
                    known = [n for n, j in enumerate(keys) if at[j] in positions]
                    one = {}
                    for c in ("full", "no_embedding"):
                        of = rows[c, layer, which]
                        logits = [
                            math.fsum((of.q[text, head, query] * of.k[text, head, j]).tolist()) / math.sqrt(8)
                            for j in keys
                        ]
                        one[c] = reference.sharpness(logits, known)
                        one[c]["sink"] *= keys[0] == 0  # a sink is the first key of the text, if the query sees it
                        if (position := answer_position(maker, example)) in keys:
                            one[c]["logit_answer"] = logits[position]
                    full, zeroed = one["full"], one["no_embedding"]
                    values = {"boost": full["max"] - zeroed["max"], "drop": zeroed["entropy"] - full["entropy"]}
                    values["keys"] = full["keys"]
                    for name in ("entropy", "normalised", "sink", "on_marks"):
                        values |= {name: full[name], f"{name}_zeroed": zeroed[name]}
                    values["boost_mark"] = full["logit_mark"] - zeroed["logit_mark"]
                    values["applies"] = float(math.log(zeroed["p_mark"]) > -zeroed["entropy"])
                    if not gathered and query == answer_query_position(run, example) and len(among) == T:
                        values["boost_answer"] = full["logit_answer"] - zeroed["logit_answer"]
                    for name, value in values.items():
                        sums.setdefault(name, []).append(value)
                for name, of in sums.items():
                    if gathered and name in ("on_marks", "on_marks_zeroed", "boost_mark", "applies"):
                        assert name not in measured
                        continue
                    assert measured[name][text, head] == pytest.approx(np.mean(of), abs=2e-4), name
    assert len(found) == 4 - 2 * (SECOND_ATTENTIONS[second].selects and placement == "none")
    assert any(abs(of["boost"]).max() > 0.05 for of in found.values())


def test_a_planted_boost_is_found(tokenizer):
    """The question attends to the mark with a logit of 800, and without its embedding to all tokens equally.

    The word and the line's end attend to the same keys under both conditions.
    """
    run = made_by_hand(tokenizer, "learned", [(0, ASK, 0.0, MARK)], {})
    maker, examples = Maker("parity", "target", TaskConfig(), tokenizer), []
    for filled in (3, 9):
        ids = np.array([tokenizer.eot, *[FILLER] * filled, tokenizer.meta, QUESTION, APPLE, LINE_END, tokenizer.eot])
        examples.append(Example(ids, np.isin(np.arange(len(ids)), (filled + 3, filled + 4)), Draft()))
    found = by_text(run, maker, examples)[0, FIRST]
    for name, values in {
        "boost": [800 / 3] * 2, "boost_mark": [800 / 3] * 2, "drop": [math.log(6) / 3, math.log(12) / 3],
    }.items():  # fmt: skip
        np.testing.assert_allclose(found[name][:, 0], values, rtol=1e-3, err_msg=name)
    # one of three queries attends to the mark alone, and the last one to all tokens equally
    np.testing.assert_allclose(found["on_marks"][:, 0], [(1 + 1 / 8) / 3, (1 + 1 / 14) / 3], rtol=1e-3)


def test_means_and_bootstrap_are_over_texts_not_queries():
    full = {"max": torch.full((2, 1, 9), math.nan), "entropy": torch.zeros(2, 1, 9), "keys": torch.ones(2, 1, 9)}
    full["max"][0, 0, :8], full["max"][1, 0, 0] = 1.0, 3.0
    zeroed = {name: torch.zeros(2, 1, 9) for name in full}
    rest = {name: value for name in ("normalised", "sink") for value in [torch.zeros(2, 1, 9)]}
    boost = paired(full | rest, zeroed | rest)["boost"]
    assert boost[:, 0].tolist() == [1.0, 3.0]
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1, 400)
    line = {"values": {"boost": values, "drop": -values, "boost_mark": np.where(values > 0, values, np.nan)}}
    summarise([line])
    assert line["n"] == 400 and line["boost"] == pytest.approx(values.mean()) == -line["drop"]
    half = 1.96 * values.std() / 20
    assert line["boost_interval"] == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert line["boost_mark"] == pytest.approx(values[values > 0].mean()) and line["boost_p"] == mean_p(values)


def test_bootstrap_of_means_agrees_with_the_ratio_bootstrap_and_skips_nan():
    values = np.random.default_rng(1).normal(size=(150, 2))
    low, high = bootstrap_means(values)
    assert (low[0], high[0]) == pytest.approx(bootstrap_ratio(values[:, 0], np.ones(150)), abs=0.03)
    values[::2, 1] = np.nan
    half = bootstrap_means(values)
    assert half[0][0] == low[0] and half[1][1] - half[0][1] > 1.2 * (high[1] - low[1])
    assert mean_p(np.zeros(5)) == 1 and mean_p(np.ones(5)) == 0 and 0.2 < mean_p(np.array([1.0, -1, 2, 0])) < 0.6


def line(boost=(0.5, 0.6), p=1e-9, n=1000, **other) -> dict:
    out = {
        "task": "parity", "placement": "target", "level": "easy", "length": 48, "attention": FIRST, "layer": 0,
        "head": 1, "n": n, "mark": "meta-token", "arm": "meta + rope", "run": "r", "step": 1, "seed": 2, "keys": 9.0,
        "seconds": 1.0, "sink": 0.1, "sink_zeroed": 0.2, **other,
    }  # fmt: skip
    for claim, (low, high) in (("boost", boost), ("drop", (-0.01, 0.02))):
        out |= {claim: (low + high) / 2, f"{claim}_interval": (low, high), f"{claim}_p": p if claim == "boost" else 0.7}
    return out


def test_verdicts_follow_the_intervals_and_holms_correction():
    (one,) = judged([line()], CLAIMS, 0.0, 0.1)
    assert (one["boost_verdict"], one["drop_verdict"], one["comparisons"]) == ("holds", "does not hold", 2)
    assert judged([line(n=999)], CLAIMS, 0.0, 0.1)[0]["boost_verdict"] == "undecided: n = 999, 1000 decide"
    assert judged([line((-0.6, -0.5))], CLAIMS, 0.0, 0.1)[0]["boost_verdict"] == "the reverse holds"
    assert judged([line((0.01, 0.09))], CLAIMS, 0.0, 0.1)[0]["boost_verdict"] == "holds, within the margin"
    assert judged([line()], CLAIMS, 0.55, 0.1)[0]["boost_verdict"] == "undecided"
    assert judged([line(p=0.02)], CLAIMS, 0.0, 0.1)[0]["boost_verdict"] == "holds"
    many = judged([line(p=0.02) for _ in range(3)], CLAIMS, 0.0, 0.1)
    assert many[0]["boost_verdict"] == "undecided after Holm" and many[0]["comparisons"] == 6
    said = SECTIONS["attention"].table(many)
    assert "0.1" in said and "Holm's p is over 6 comparisons" in said


# ----------------------------------------------------------------------------- the command


@pytest.mark.parametrize("second", SECOND_ATTENTIONS)
def test_the_command_reads_every_arm(tokenizer, tmp_path, monkeypatch, capsys, second):
    among_marks, reads_marks = SECOND_ATTENTIONS[second].gathers, SECOND_ATTENTIONS[second].others == "read"
    if second != "meta":  # one picture is enough
        monkeypatch.setattr(probe_command, "draw_picture", lambda name, lines: b"\x89PNG")
    data = PLAIN if SECOND_ATTENTIONS[second].markers == "refused" or second == "causal" else MARKED
    among_marks &= second != "random"  # whose keys are not marks
    run = small_run(tokenizer, data, position="rope", second_attention=second)
    folder = kept(run, tmp_path / "out/small", tasks=("parity", "copying"), placements=("target", "none"))
    probe.main(["attention", f"--run={folder}", "--n=6", "--lengths=48"])
    lines, said = lines_of(folder / "attention.jsonl"), capsys.readouterr().out
    # copying with placement target has two marks, and parity one, which other tokens may read
    expected = 5 if among_marks else 10 if reads_marks else 20 if second == "causal" else 0
    assert len(lines) == 20 + expected
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG") and 'mark: the word "mark"' in said
    assert said.count("no better than a shortcut or chance") == said.count("texts: at least 1000 are needed.") == 1
    assert "undecided: n" not in said
    for one in lines:
        assert (
            one["probe"] == "attention"
            and one["n"] == 6
            and one["run"] == "small"
            and one["comparisons"] == 2 * len(lines)
        )
        assert (one["layer"] is None) == (one["head"] is None) and one["drop_verdict"].startswith("undecided: n = 6")
        every_key = one["attention"] == FIRST or not (among_marks or reads_marks)
        assert ("boost_answer" in one) == (one["task"] == "copying" and every_key)
        if one["attention"] == SECOND and among_marks:
            assert (one["task"], one["keys"], "on_marks" in one) == (
                "copying", min(2.0, SECOND_ATTENTIONS[second].window or 2.0), False,
            )  # fmt: skip
    pooled = [one for one in lines if one["layer"] is None]
    heads = [one for one in lines if one["layer"] is not None]
    for one in pooled:
        key = ("task", "placement", "attention")
        same = [each["drop"] for each in heads if all(each[name] == one[name] for name in key)]
        assert len(same) == 4 and one["drop"] == pytest.approx(np.mean(same))
    if second == "meta":
        assert "a softmax over few keys" in said
        for task in ("parity", "copying"):
            figure = Figure(layout="constrained")
            probe_pictures.draw_attention(figure, [one for one in lines if one["task"] == task])
            boost = figure.axes[0]
            drawn = [mark for mark in boost.lines if mark.get_marker() in "oD" and len(mark.get_xdata()) == 1]
            expected = sorted(one["boost"] for one in heads if one["task"] == task)
            assert sorted(float(mark.get_ydata()[0]) for mark in drawn) == expected


def test_attention_probe_gives_the_same_lines_twice(tokenizer):
    run = small_run(tokenizer, MARKED, position="learned")
    maker = Maker("list_recall", "every", TaskConfig(), tokenizer)
    first, again = (measure_attention(AttentionProbe(n=5), run, maker, "easy", 60) for _ in range(2))
    drop = [{name: value for name, value in one.items() if name != "seconds"} for one in first]
    assert drop == [{name: value for name, value in one.items() if name != "seconds"} for one in again]


REFUSED = {
    "never met one": (PLAIN, {"placements": ("none",)}, ("--placements=target",), "and placement target has them"),
    "no task": (PLAIN, None, (), "trained without meta-tokens"),
    "few markers": (MARKED, {"placements": ("background",), "meta_share": 0.001}, (), "have no meta-tokens"),
    "dynamic": (MARKED, {}, ("--rope_scaling=ntk", "--rope_factor=2", "--rope_dynamic"), "leave --rope_dynamic out"),
    "margin": (MARKED, {}, ("--margin=0",), "margin=0.0 is out of range"),
    "effect": (MARKED, {}, ("--effect=-1",), "effect=-1.0 is out of range"),
    "twice": (MARKED, {}, ("--tasks", "parity", "parity"), "name each once"),
    "picture": (MARKED, {}, ("--output=x.png",), "output='x.png' is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(tokenizer, tmp_path, monkeypatch, capsys, case):
    data, task, args, sentence = REFUSED[case]
    run = small_run(tokenizer, data, position="rope", second_attention="none")
    kept(run, tmp_path / "out/small", **({} if task is None else {"tasks": ("parity",), **task}))
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        probe.main(["attention", "--run=out/small", "--n=5", "--lengths=40", *args])
    assert sentence in str(refused.value) and str(refused.value).endswith(".")
    assert tree(tmp_path) == before and capsys.readouterr().out == ""
