"""Tests probe.py rate_distortion: which states, targets and questions it reads, its lines and pictures, and
refusals."""

import dataclasses
import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nanometa import probe
from nanometa.common.errors import UserError
from nanometa.config import TaskConfig
from nanometa.config.tasks import PLACEMENTS, TASKS
from nanometa.data.tokenizer import Tokenizer
from nanometa.inference.scoring import hidden_states
from nanometa.probes import rate_distortion, self_check
from nanometa.probes.marked_texts import marks
from nanometa.probes.rate_distortion import RateDistortionProbe, curve
from nanometa.probes.text_positions import STATES, labels_of, locate, locate_all, queries_of, states_of_texts
from nanometa.reports import rate_pictures
from nanometa.reports.drawing import STYLE, run_title, wrapped
from nanometa.reports.probe_sections import SECTIONS
from nanometa.tasks.example import POINT, STOP, Maker
from nanometa.tasks.source import collate
from nanometa.tasks.words import ITEMS, NAMES
from tests.conftest import tree
from tests.runs import small_run
from tests.test_bottleneck import SMALL, planted
from tests.test_positions import MARKED, kept, lines_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" " + " ".join(ITEMS + NAMES) + " zero one two three four : ? # \n" for _ in range(3)], 800)


# ----------------------------------------------------------------------------- states, targets and questions


def makers(tokenizer, task="list_recall", **settings):
    for placement in PLACEMENTS:
        yield placement, Maker(task, placement, TaskConfig(**{"meta_share": 0.2, **settings}), tokenizer)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("rule", ["ignore", "skip"])
def test_states_are_located_where_a_reader_finds_them(tokenizer, task, rule):
    run = small_run(tokenizer, MARKED, rule)
    for placement, maker in makers(tokenizer, task):
        for i in range(8):
            example = maker.example("test", i, 60, 90, ("easy",))
            text = locate(run, maker, example, 3, i)
            ids, at = example.ids, text.at
            prompt, question = tokenizer.decode(ids[: at["mean"]].tolist()), example.draft.questions[0]
            plain = ids[ids != tokenizer.meta].tolist()
            asked = "".join([*question[0], *question[1]])
            assert tokenizer.decode(plain) == f"<|endoftext|>{_plain(maker, example)}{asked}<|endoftext|>"
            rest = [k for k in ids[at["mean"] :].tolist() if k != tokenizer.meta]
            assert tokenizer.decode(rest) == f"{asked}<|endoftext|>"
            assert ids[text.answer] == tokenizer.encode(question[1][0])[0] and text.query == tuple(question[0])
            assert tokenizer.decode([int(ids[at["last"]])]) == "\n"
            assert ids[at["random"]] != tokenizer.meta and 3 <= at["random"] < at["mean"]
            assert at["mean"] <= at["question"] < text.answer
            between = ids[at["question"] + 1 : text.answer]
            assert not len(between) if rule == "ignore" else (between == tokenizer.meta).all()
            assert rule == "ignore" or ids[at["question"]] != tokenizer.meta
            metas = np.flatnonzero(ids[: at["mean"]] == tokenizer.meta)
            assert at.get("meta") == (int(metas[-1]) if len(metas) else None)
            words = prompt.replace("<|meta|>", "").split()
            assert ("delimiter" in at) == ("mark" in words)
            if "delimiter" in at:
                upto = tokenizer.decode([k for k in ids[: at["delimiter"] + 1].tolist() if k != tokenizer.meta]).split()
                assert upto[-1] == "mark" and upto.count("mark") == words.count("mark")
        expected = {
            "target": {"meta"},
            "none": {"delimiter"},
            "every": {"meta", "delimiter"},
            "background": {"meta", "delimiter"},
        }
        if task == "list_recall":
            expected["every"] = {"meta"}
        assert {"meta", "delimiter"} & set(at) == expected[placement]


def test_the_start_of_a_longer_word_is_not_taken_for_the_delimiter():
    tokenizer = Tokenizer.train([" mark mark mark set net let et et" for _ in range(9)], 300)
    (mark,) = tokenizer.encode(" mark").tolist()
    assert tokenizer.encode(" market").tolist()[0] == mark
    run, maker, behind = small_run(tokenizer, MARKED), Maker("list_recall", "none", TaskConfig(), tokenizer), 0
    maker.names = ["market", *maker.names[:9]]
    for i in range(12):
        example = maker.example("test", i, 200, 300, ("easy",))
        pieces = [" mark" if piece == POINT else piece for piece in example.draft.body if piece != STOP]
        last = len(pieces) - 1 - pieces[::-1].index(" mark")
        at = locate(run, maker, example, 0, i).at["delimiter"]
        assert tokenizer.decode(example.ids[: at + 1].tolist()) == "<|endoftext|>" + "".join(pieces[: last + 1])
        assert at == marks(maker, example)[-1]  # the same position as in the other probes
        behind += " market" in pieces[last:]
    assert behind  # otherwise no text contains a longer word that starts with the mark's id


def _plain(maker: Maker, example) -> str:
    """Returns the text of the body without meta-tokens."""
    return maker.tokenizer.decode([k for k in maker.ids(example.draft.body) if k != maker.tokenizer.meta])


def test_targets_are_classes_of_the_texts_ids(tokenizer):
    run, maker = small_run(tokenizer, MARKED), Maker("copying", "target", TaskConfig(), tokenizer)
    splits = [
        locate_all(run, maker, [maker.example(split, i, 60, 90, ("easy",)) for i in range(n)], 4, split)
        for split, n in (("train/x", 9), ("val", 4), ("test", 5))
    ]
    for state in ("meta", "last", "random", "question"):
        for back in (0, 1, 3):
            labels, K = labels_of(back, state, splits)
            assert [len(part) for part in labels] == [9, 4, 5] and max(part.max() for part in labels) == K - 1
            number = {}
            for of, part in zip(splits, labels, strict=True):
                for text, (label,) in zip(of, part.tolist(), strict=True):
                    k = int(text.ids[text.at[state] - back if back else text.answer])
                    assert number.setdefault(k, label) == label  # each id is one class
            assert len(number) == K == len(set(number.values()))


def test_queries_are_the_words_that_differ_between_questions(tokenizer):
    maker = Maker("list_recall", "target", TaskConfig(), tokenizer)
    of = [maker.example("test", i, 60, 90, ("easy",)) for i in range(30)]
    run = small_run(tokenizer, MARKED)
    texts = locate_all(run, maker, of, 0, "test")
    (first, second), Q = queries_of([texts[:20], texts[20:]])
    names, places = ({text.query[k] for text in texts[:20]} for k in (1, 3))
    assert first.shape == (20, 2) and Q == 1 + len(names) + len(places) == 1 + len(first.unique()) == first.max() + 1
    for a, text in zip(first, texts[:20], strict=True):
        for b, other in zip(first, texts[:20], strict=True):
            assert [x == y for x, y in zip(a, b, strict=True)] == [text.query[k] == other.query[k] for k in (1, 3)]
    for text, row in zip(
        texts[20:], second.tolist(), strict=True
    ):  # 0 stands for words that no question of the training texts contains
        assert [number > 0 for number in row] == [text.query[1] in names, text.query[3] in places]
    assert (second == 0).any() and (second > 0).any()
    parity = Maker("parity", "target", TaskConfig(), tokenizer)
    of = locate_all(run, parity, [parity.example("test", i, 40, 60, ("easy",)) for i in range(3)], 0, "test")
    assert queries_of([of])[0][0].shape == (3, 0)  # the question is always the same


@pytest.mark.parametrize("second", ["meta", "random", "none"])
@torch.no_grad()
def test_the_states_read_are_those_of_the_model(tokenizer, second, monkeypatch):
    run = small_run(tokenizer, MARKED, position="rope", second_attention=second)
    maker = Maker("parity", "every", TaskConfig(), tokenizer)
    examples = [maker.example("test", i, 40, 60, ("easy",)) for i in range(7)]
    of = locate_all(run, maker, examples, 0, "test")
    monkeypatch.setattr("nanometa.probes.marked_texts.READ", 120)  # so that two texts are read at a time
    found = states_of_texts(run, examples, of, list(STATES), [0, 2])
    assert found.shape == (2, len(STATES), 7, 16)
    if second == "random":  # the positions that random connects depend on the length of the batch
        assert found.isfinite().all()
        return
    for i, (example, text) in enumerate(zip(examples, of, strict=True)):
        batch = collate([example], np.array([0]), len(example.ids), run.config, tokenizer, "tasks test")
        hidden = hidden_states(run.model, batch)[0]
        for j, name in enumerate(STATES):
            if name == "mean":
                embedded = run.model.wte(batch.tokens)[0, : text.at["mean"]].mean(dim=0)
                torch.testing.assert_close(found[0, j, i], embedded, rtol=1e-4, atol=1e-5)
            else:
                torch.testing.assert_close(run.model.ln_f(found[1, j, i]), hidden[text.at[name]], rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- the command


FAST = (
    "--n=24", "--train_texts=24", "--lengths=48", "--seeds=2", "--epochs=2", "--batch=20", "--z_dim=3", "--hidden=6",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_betas_and_texts(monkeypatch):
    monkeypatch.setattr(rate_distortion, "BETAS", (2.0, 0.1, 0.003))
    monkeypatch.setattr(rate_distortion, "VAL_TEXTS", 20)


def timeless(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in one.items() if not name.startswith("seconds")} for one in lines]


def test_the_command_writes_and_draws_the_curves_of_all_cells(tokenizer, tmp_path, monkeypatch, capsys):
    run = small_run(tokenizer, MARKED, position="rope")
    folder = kept(run, tmp_path / "out/small", tasks=("list_recall", "copying"), placements=("target", "none"))
    made, make = [], Maker.example

    def noted(self, split, index, *rest):
        example = make(self, split, index, *rest)
        made.append((split, (*example.draft.body, *example.draft.questions[0][0])))
        return example

    monkeypatch.setattr(Maker, "example", noted)
    monkeypatch.setattr("nanometa.probes.rate_curves.DRAWS", 20)
    pictures = []
    cells = ("--tasks", "list_recall", "copying", "--placements", "target", "none")
    command = ["rate_distortion", f"--run={folder}", *FAST, *cells]
    for _ in range(2):
        probe.main([*command, "--targets", "answer", "back"])
        pictures.append((folder / "rate_distortion.png").read_bytes())
    said = capsys.readouterr().out
    # no text is in two splits, and the texts that measure are those of eval.py tasks
    by_split = {split: {text for other, text in made if other == split} for split, _ in made}
    assert set(by_split) == {"train/rate_distortion", "val", "test"}
    assert not by_split["train/rate_distortion"] & by_split["test"] and not by_split["val"] & by_split["test"]
    assert not by_split["train/rate_distortion"] & by_split["val"]
    lines = lines_of(folder / "rate_distortion.jsonl")
    assert timeless(lines[: len(lines) // 2]) == timeless(lines[len(lines) // 2 :])
    assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")
    lines = lines[: len(lines) // 2]
    # the picture shows all lines that were measured with the same settings
    drawn = []
    monkeypatch.setattr("nanometa.probes.probe_command.draw_picture", lambda name, lines: drawn.append(lines) or b"")
    for gates in (0.5, 8.0):
        probe.main(["rate_distortion", f"--run={folder}", *FAST, "--tasks=parity", "--states=last", f"--gates={gates}"])
    assert [{one["task"] for one in shown} for shown in drawn] == [{"list_recall", "copying", "parity"}, {"parity"}]
    curves = [one for one in lines if one["kind"] == "curve"]
    where = [(one["task"], one["placement"], one["target"], one["state"]) for one in curves]
    # here the token before is always the same, a bracket or a word of the question, so there is nothing to learn
    constant = {("copying", "back_1", state) for state in ("meta", "delimiter", "question")}
    assert where == [
        (task, placement, target, state) for task in ("list_recall", "copying")
        for placement, point in (("target", "meta"), ("none", "delimiter")) for target in ("answer", "back_1")
        for state in (point, "last", "question")
        if (task, target, state) not in constant
    ]  # fmt: skip
    for one in curves:
        assert (one["n"], one["train_texts"], one["probe_seeds"], one["layer"], one["run"]) == (24, 24, 2, 2, "small")
        assert [point["beta"] for point in one["points"]] == [2, 0.1, 0.003]
        assert one["told_the_question"] == (one["target"] == "answer")
        for point in one["points"]:
            assert len(point["rates"]) == len(point["distortions"]) == 2
            assert point["distortion_interval"][0] <= point["distortion"] <= point["distortion_interval"][1]
            assert point["distortion"] == pytest.approx(np.mean(point["distortions"]))
        assert 0 < one["entropy"] <= one["uniform"] and one["floor"] == 0
    pairs = [one for one in lines if one["kind"] == "comparison"]
    assert [one["states"] for one in pairs] == 2 * [
        ["meta", "last"], ["meta", "question"], ["delimiter", "last"], ["delimiter", "question"]
    ]  # fmt: skip
    assert all(one["verdict"] == "undecided: n = 24, 1000 decide" and one["comparisons"] == 8 for one in pairs)
    for word in (
        "shuffled",
        "D of meta minus D of question",
        "The code tells at most its rate R about the state",
        "not its arm",
    ):
        assert word in said
    assert re.search("answer +meta", said) and re.search("answer +delimiter", said)


def test_states_and_layers_can_be_chosen(tokenizer, tmp_path):
    folder = kept(small_run(tokenizer, MARKED, position="rope"), tmp_path / "out/small", tasks=("parity",))
    out = tmp_path / "x.jsonl"
    command = ("rate_distortion", f"--run={folder}", *FAST, "--tasks=parity", f"--output={out}")
    probe.main([*command, "--layers", "0", "2", "--states", "mean", "random", "meta"])
    curves = [one for one in lines_of(out) if one["kind"] == "curve"]
    assert [(one["layer"], one["state"]) for one in curves] == [
        (k, s) for k in (0, 2) for s in ("meta", "random", "mean")
    ]
    assert len({one["points"][-1]["rate"] for one in curves}) == 6 and not (folder / "rate_distortion.jsonl").exists()
    assert (tmp_path / "x.png").exists()


def test_a_single_seed_has_no_interval_over_seeds(tokenizer, tmp_path):
    folder = kept(small_run(tokenizer, MARKED, position="rope"), tmp_path / "out/small", tasks=("parity",))
    rest = [arg for arg in FAST if not arg.startswith("--seeds")]
    probe.main(["rate_distortion", f"--run={folder}", *rest, "--tasks=parity", "--seeds=1", "--states=meta"])
    (one,) = lines_of(folder / "rate_distortion.jsonl")
    assert {str(point["seed_interval"]) for point in one["points"]} == {"None"}


def test_the_self_check_needs_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanometa.probes.rate_curves.DRAWS", 40)
    for name in ("GAUSSIAN", "CATEGORICAL"):
        monkeypatch.setattr(self_check, name, dataclasses.replace(getattr(self_check, name), epochs=1, draws=2))
        monkeypatch.setattr(self_check, {"GAUSSIAN": "GAUSSIAN_TEXTS", "CATEGORICAL": "CLASS_TEXTS"}[name], 400)
    probe.main(["rate_distortion", "--known", "--train_texts=400", "--epochs=1"])
    said = capsys.readouterr().out
    curves, *lookups = said.split("planted: ")
    assert "NO" in curves and curves.count("beta") == len(
        self_check.GAUSSIAN_BETAS + self_check.CLASS_BETAS
    )  # one epoch is too few
    asked = [re.search(r"holds (\d) .* (\d+) texts to train: ([a-z ]+)", one, re.S | re.I).groups() for one in lookups]
    assert asked == [("1", "400", "found"), ("7", "400", "NOTHING FOUND"), ("7", "1600", "NOTHING FOUND")]
    assert not list(tmp_path.iterdir())


def test_the_picture_and_the_table_show_the_points(tokenizer, tmp_path):
    line, _ = curve(
        SMALL, planted(lambda y, seed: torch.nn.functional.one_hot(y, 12).float(), sizes=(60, 30, 30)), 12, 0
    )
    facts = {"arm": "meta + rope", "run": "r", "step": 1, "seed": 2, "task": "parity", "placement": "target",
             "level": "easy", "length": 40, "layer": 2, "target": "answer", "kind": "curve", "floor": 0.0}  # fmt: skip
    line["points"][1] |= {"violates_converse": True, "converse_tolerance": 0.25}
    lines = [{**line, **facts, "state": state, "violations": 1} for state in ("meta", "last")]
    figure = Figure()
    rate_pictures.draw_rates(figure, lines)
    (axes,) = figure.axes
    shown = [mark.get_data() for mark in axes.lines if mark.get_marker() in ("o", "s")]
    for R, D in shown:
        assert list(R) == [point["rate"] for point in line["points"]]
        assert list(D) == [point["distortion"] for point in line["points"]]
    crosses = [mark.get_data() for mark in axes.lines if mark.get_marker() == "x"]
    assert len(shown) == len(crosses) == 2
    assert crosses[0][0][0] == line["points"][1]["rate"]
    (line_of_converse,) = [
        m for m in axes.lines if len(m.get_xdata()) == 3 and m.get_marker() == "None" and m.get_color() == "black"
    ]
    H = line["entropy"]
    assert list(line_of_converse.get_ydata()) == [H, 0, 0] and list(line_of_converse.get_xdata())[:2] == [0, H]
    said = SECTIONS["rate_distortion"].table(lines)
    assert said.count("BELOW THE CONVERSE by more than 0.250") == 2
    assert f"{line['points'][2]['distortion']:.3f}" in said


def test_legend_and_titles_fit_into_the_picture():
    point = {"rate": 3.0, "distortion": 2.0, "rate_interval": (2.5, 3.5), "distortion_interval": (1.5, 2.5)}
    line = {
        "arm": "meta + rope (with another attention, whose rows are drawn at random from all the others of a text)",
        "run": "r", "step": 1, "seed": 2, "task": "segment_counting", "placement": "background", "level": "extra_hard",
        "length": 1024, "target": "back_2", "n": 1000, "train_texts": 4000, "probe_seeds": 3, "found": False,
        "uniform": 5.5, "entropy": 5.25, "cross_entropy": 5.375, "floor": 0.5, "violations": 1,
        "ceiling": {"distortion": 1.0}, "shuffled": {"distortion": 5.5},
        "points": [{**point, "violates_converse": True}],
    }  # fmt: skip
    lines = [{**line, "state": state, "layer": 2} for state in STATES]
    with matplotlib.rc_context(STYLE):
        rate_pictures.draw_rates(figure := Figure((3.6, 3.0), dpi=100, layout="constrained"), lines)
        figure.draw_without_rendering()
        (legend,), renderer = figure.legends, FigureCanvasAgg(figure).get_renderer()
        for drawn in (legend, *(axes.title for axes in figure.axes)):
            box = drawn.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
    labels = {text.get_text().replace("\n", " ") for text in legend.texts}
    assert labels > {f"{state}: nothing found" for state in STATES}
    titles = wrapped(run_title(lines), 100).split("\n")
    assert len(titles) > 1 and all(row.count("(") == row.count(")") for row in titles)
    assert all("ln K 5.50, H(Y) 5.25, constant 5.38" in axes.get_title() for axes in figure.axes)


REFUSED = {
    "no meta-token": ({}, ("--placements=none", "--states=meta"), "states=meta does not exist in parity with"),
    "no delimiter": ({}, ("--states=delimiter",), "20 of 20 texts have no 'mark' before the question"),
    "layer": ({}, ("--layers", "1", "3"), "there is no layer 3: this model has states 0"),
    "too far back": ({}, ("--targets=back", "--back=100"), "asks for 100 tokens before the state meta"),
    "too long": ({"position": "learned"}, ("--lengths=80",), "80 positions do not fit into the learned position table"),
    "few texts": ({}, ("--n=19",), "n=19 is out of range"),
    "few training texts": ({}, ("--train_texts=5",), "train_texts=5 is out of range"),
    "twice": ({}, ("--states", "meta", "meta"), "states=('meta', 'meta') is out of range"),
    "no such state": ({}, ("--states=all",), "--states=all is invalid"),
    "a setting of 0.1": ({}, ("--beta_min=0.1",), "unknown setting --beta_min"),
    "a target of 0.1": ({}, ("--targets=bag",), "--targets=bag is invalid"),
    "no target": ({}, ("--targets",), "targets=() is out of range"),
    "seeds": ({}, ("--seeds=0",), "seeds=0 is out of range"),
    "back": ({}, ("--back=0",), "back=(0,) is out of range"),
    "gates": ({}, ("--gates=-1",), "gates=-1.0 is out of range"),
    "margin": ({}, ("--margin=0",), "margin=0.0 is out of range"),
    "picture": ({}, ("--output=x.png",), "output='x.png' is out of range"),
    "one class": ({}, ("--targets=back", "--states=question"), "nothing is left to measure, for the reasons above"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(tokenizer, tmp_path, monkeypatch, case):
    shape, args, sentence = REFUSED[case]
    kept(small_run(tokenizer, MARKED, **{"position": "rope", **shape}), tmp_path / "out/small", tasks=("parity",))
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    given_ = {arg.split("=")[0] for arg in args}
    rest = [arg for arg in (*FAST, "--tasks=parity") if arg.split("=")[0] not in given_]
    with pytest.raises(UserError) as refused:
        probe.main(["rate_distortion", "--run=out/small", *rest, *args])
    assert sentence in str(refused.value) and str(refused.value).endswith((".", "?"))
    assert tree(tmp_path) == before


def pair(up_to: float, found: tuple[bool, bool], difference: tuple[float, float] = (-0.9, -0.8), n: int = 1000) -> dict:
    return {"states": ["meta", "last"], "n": n, "p": 0.001, "difference": sum(difference) / 2,
            "difference_interval": difference, "entropy": 5.0, "up_to": up_to, "found": list(found)}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        (pair(5.0, (True, True)), "holds"),
        (pair(2.5, (True, True)), "holds up to R = 2.50"),
        (pair(5.0, (True, True), (0.7, 0.8)), "the reverse holds"),
        (pair(0.1, (True, True), (-0.01, 0.01)), "does not hold up to R = 0.10"),
        (pair(5.0, (True, False)), "holds; nothing found from last"),
        (pair(2.5, (False, True), (0.7, 0.8)), "the reverse holds up to R = 2.50; nothing found from meta"),
        (pair(5.0, (False, False)), "nothing found from either"),
        (pair(5.0, (False, False), (0.0, 0.0)), "nothing found from either"),
        (pair(5.0, (False, False), n=999), "undecided: n = 999, 1000 decide"),
    ],
)
def test_a_verdict_is_limited_to_the_compared_rates(line, verdict):
    rate_distortion.judged_within_reach([line], rate_distortion.CLAIMS, 0.0, 0.05)
    assert line["verdict"] == verdict


def test_the_table_names_the_rates_that_were_not_reached():
    where = {"kind": "comparison", "task": "parity", "placement": "target", "length": 40, "layer": 2, "effect": 0.0}
    found = {"rates": [1.0, 4.0], "differences": [(-0.5, -0.75, -0.25), None], "difference": -0.85, "holm": 0.001}
    reached, nothing = (
        pair(2.5, of) | where | found | {"verdict": "so it is"} for of in ((True, True), (False, False))
    )
    said = SECTIONS["rate_distortion"].table([reached])
    assert "  1: -0.500 (-0.750 .. -0.250)  4: not reached\n  mean up to R = 2.50 of H = 5.00: -0.850" in said
    said = SECTIONS["rate_distortion"].table([nothing])
    assert "so it is" in said and not re.search(r"[+-]0\.", said)


def test_states_missing_from_the_texts_are_left_out_by_default(tokenizer):
    maker = Maker("list_recall", "every", TaskConfig(), tokenizer)
    run = small_run(tokenizer, MARKED)
    of = locate_all(run, maker, [maker.example("test", i, 60, 90, ("easy",)) for i in range(5)], 0, "test")
    cfg = RateDistortionProbe()
    assert rate_distortion.states_of(cfg, maker, of) == ["meta", "last", "question"]
