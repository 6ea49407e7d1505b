"""Tests probe.py positions: each condition removes exactly what it should; comparisons; and refusals."""

import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nanometa import eval as evaluation
from nanometa import probe
from nanometa.common.errors import UserError
from nanometa.common.statistics import bits, paired_difference, wilson
from nanometa.config import GPTConfig, TaskConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.data.tokenizer import Tokenizer
from nanometa.evals import tasks as tasks_eval
from nanometa.evals.tasks import answered, doubt, read
from nanometa.probes import probe_command
from nanometa.probes.marked_texts import judged, paired_claim
from nanometa.probes.positions import CLAIMS, CONDITIONS, PositionsProbe, measure_positions, under, useless
from nanometa.reports import drawing, probe_pictures
from nanometa.reports.probe_sections import SECTIONS
from nanometa.reports.table_sections import apart, fields_of
from nanometa.tasks.example import Draft, Example, Maker
from nanometa.tasks.words import ITEMS, NAMES
from tests.conftest import cli, tree
from tests.reference import gpt as reference
from tests.runs import saved, small_run
from tests.test_model import WITH_MARKERS, build, inputs, sharpen, wake

MARKED = {"dataset": "data/x", "injection": "uniform", "chunk_content": 27, "chunk_markers": 3}
PLAIN = {**MARKED, "injection": "none", "chunk_markers": 0}
ARMS = [(second, position) for second in WITH_MARKERS for position in ("learned", "rope")]
META = 61  # the id of the marker in inputs()
READINGS = ("no_position_pairs", "no_position_zeros")  # measured with --every_reading
# for each condition, its meta_position, and whether it keeps the marker's embedding
MEANING = {
    "full": ("same", True), "no_position": ("none", True), "no_position_first": ("none_first", True),
    "no_position_second": ("none_second", True), "no_position_pairs": ("same", True),
    "no_position_zeros": ("same", True), "no_embedding": ("same", False), "neither": ("none", False),
}  # fmt: skip


def allowed(second: str, position: str) -> list[str]:
    return [name for name in CONDITIONS if not useless(name, GPTConfig(second_attention=second, position=position))]


def restless(second: str, position: str, **scale):
    """Returns a model in which every part affects the output. scale: settings of the rotary scale."""
    model = sharpen(wake(build(second_attention=second, position=position, bias=True, **scale))).double()
    for name, p in model.named_parameters():
        if name.endswith(("bias", "wpe.weight", "wte.weight")):
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" " + " ".join(ITEMS + NAMES) + " zero one two three four : ? # \n" for _ in range(3)], 800)


# ----------------------------------------------------------------------------- conditions


def turned(condition: str, members: torch.Tensor):
    """Returns the definition of a reading of "no position", as a change of the factors of products q_i conj(k_j)."""
    with_marker = (members[:, :, None] | members[:, None, :])[..., None]
    new = {"no_position_pairs": torch.abs, "no_position_zeros": torch.zeros_like}.get(condition, lambda of: of)
    return lambda rotation: torch.where(with_marker, new(rotation).to(rotation.dtype), rotation)


@pytest.mark.parametrize(("second", "position"), ARMS)
@torch.no_grad()
def test_conditions_equal_the_reference(second, position):
    """The definition is attention over all pairs in double precision with one change. No two conditions are the
    same."""
    model = restless(second, position)
    tokens, positions, index = inputs()
    members, before = tokens == META, {name: p.clone() for name, p in model.named_parameters()}
    expected, found = {}, {}
    for name in allowed(second, position):
        changed = copy.deepcopy(model)
        place, embedded = MEANING[name]
        changed.cfg = dataclasses.replace(model.cfg, meta_position=place)
        changed.wte.weight[META] *= embedded  # the reference reads it only at the input
        expected[name] = reference.hidden_states(changed, tokens, positions, members, turn=turned(name, members))
        with under(model, META, name):
            found[name] = model(tokens, positions, index)
            logits = model.logits(found[name])[..., :60]
        torch.testing.assert_close(logits.double(), expected[name] @ before["wte.weight"][:60].T, rtol=1e-4, atol=1e-4)
    entry = SECOND_ATTENTIONS[second]  # a second attention with a window of one position has no distances
    rotated = 2 * (position == "rope")
    assert len(found) == (6 if position == "rope" and entry.has_layer and entry.window != 1 else 4) + rotated
    for name, hidden in found.items():
        for other, theirs in expected.items():
            if name == other:
                # angles and rotated q and k are in fp32
                torch.testing.assert_close(hidden, theirs, rtol=1e-5, atol=1e-5)
            else:
                assert (hidden - theirs).abs().max() > 1e-2, (name, other)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("second", "position"), ARMS)
@torch.no_grad()
def test_without_markers_no_condition_changes_anything(second, position):
    """Not a single bit changes, except through the other order of sums in products that are partly not rotated."""
    model, positions = restless(second, position).float(), torch.arange(12).expand(3, 12)
    tokens = torch.randint(0, 60, (3, 12))
    for index in (torch.empty(3, 0, dtype=torch.long), torch.full((3, 2), 12)):
        full = model(tokens, positions, index)
        for name in allowed(second, position):
            with under(model, META, name):
                found = model(tokens, positions, index)
            assert torch.equal(found, full) or name == "no_position_pairs"
            torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, UserError("why")])
def test_a_condition_leaves_the_model_unchanged(end):
    model = restless("meta", "rope")
    trained = model.cfg
    for name, (place, embedded) in MEANING.items():
        try:
            with under(model, META, name):
                assert model.cfg.meta_position == place and len(model.wte._forward_hooks) == (not embedded)
                if end:
                    raise end
        except (KeyboardInterrupt, UserError):
            assert end
        assert model.cfg is trained and not model.wte._forward_hooks
    learned = restless("meta", "learned")
    with (
        pytest.raises(UserError, match="before any attention: leave it out"),
        under(learned, META, "no_position_zeros"),
    ):
        pass
    with pytest.raises(UserError, match="needs position=rope"), under(learned, META, "no_position_second"):
        pass
    assert learned.cfg.meta_position == "same" and not learned.wte._forward_hooks


def test_a_failed_reading_leaves_the_model_unchanged(tokenizer):
    run = small_run(tokenizer, MARKED, position="rope")
    trained = run.model.cfg
    run.model.ln_f.weight.data[3] = math.nan
    maker = Maker("parity", "target", TaskConfig(), tokenizer)
    with pytest.raises(UserError, match="not finite"):
        measure_positions(PositionsProbe(n=3), run, maker, "easy", 32)
    assert run.model.cfg is trained and not run.model.wte._forward_hooks


# ----------------------------------------------------------------------------- what the probe finds in a model


# directions in a residual stream of 16 dimensions, with mean 0, so that LayerNorm keeps them
MARK, ASK, FIRST, SECOND, END, EARLY, LATE, FILL = (torch.eye(16)[2 * k] - torch.eye(16)[2 * k + 1] for k in range(8))
TOKENS = FILLER, QUESTION, APPLE, PEAR, LINE_END = range(10, 15)  # arbitrary content ids


def made_by_hand(tokenizer, position: str, looks: list, brings: dict):
    """Returns a run with one block and one head, whose weights are set by hand.

    looks: tuples (dimension of q and k, the direction that asks, phase, the direction that is looked for). brings: from
    the direction that is found to the direction that is added. A word is followed by the end of its line.
    """
    run = small_run(tokenizer, MARKED, n_layer=1, n_head=1, position=position)
    for name, p in run.model.named_parameters():
        if ".ln_" not in name and not name.startswith("ln_f"):
            p.data.zero_()
    for token, part in zip((*TOKENS, tokenizer.meta), (FILL, ASK, FIRST, SECOND, END, MARK), strict=True):
        run.model.wte.weight.data[token] = part
    attention = run.model.h[0].attn
    q, k, v = attention.c_attn.weight.data.split(16)
    for d, asks, phase, wanted in [*looks, (7, FIRST + SECOND, 0.0, FIRST + SECOND)]:
        q[d], q[d + 8], k[d] = 100 * math.cos(phase) * asks, 100 * math.sin(phase) * asks, wanted
    for found, added in [*brings.items(), (FIRST, END), (SECOND, END)]:
        v += torch.outer(added, found)
    attention.c_proj.weight.data.copy_(10 * torch.eye(16))
    return run


def outcomes(run, places: list[list[int]], words: list[int]) -> dict[str, str]:
    """Returns for each condition the outcomes of texts with ten fillers, meta-tokens at `places`, a question and a
    word."""
    examples, out = [], {}
    for at, word in zip(places, words, strict=True):
        ids = np.array([run.tokenizer.eot, *[FILLER] * 10, QUESTION, word, LINE_END, run.tokenizer.eot])
        ids[at] = run.tokenizer.meta
        examples.append(Example(ids, np.isin(np.arange(15), (12, 13)), Draft()))
    for name in CONDITIONS:
        if not useless(name, run.model.cfg):
            with under(run.model, run.tokenizer.meta, name):
                out[name] = read(run, examples, 15)["outcomes"]
    return out


PLACES, EARLY_OR_LATE = [[place] for place in range(1, 11)], [APPLE] * 5 + [PEAR] * 5


def test_the_probe_recognizes_use_of_a_learned_position(tokenizer):
    """The position table adds a direction at the marker, and attention brings it to the question."""
    run = made_by_hand(tokenizer, "learned", [(0, ASK, 0.0, MARK)], {EARLY: FIRST, LATE: SECOND})
    run.model.wpe.weight.data[1:6], run.model.wpe.weight.data[6:11] = EARLY, LATE
    found = outcomes(run, PLACES, EARLY_OR_LATE)
    assert found["full"] == "1" * 10 and found["no_position"] == "0" * 10


def test_the_probe_recognizes_use_of_a_rotary_distance(tokenizer):
    """The question finds a marker at most five positions before it, because the query is rotated by 0.316 per position.

    With an angle of 0 the marker seems to be at the start, which is too far. With a single marker, the second attention
    does not depend on its position.
    """
    looks = [(1, ASK, math.pi / 2 - 5.5 * 0.316, MARK)]
    run = made_by_hand(tokenizer, "rope", looks, {MARK: SECOND, FILL: FIRST})
    found = outcomes(run, PLACES, EARLY_OR_LATE)
    assert found["full"] == found["no_position_second"] == "1" * 10
    assert found["no_position"] == found["no_position_first"] == found["no_embedding"] == "1" * 5 + "0" * 5


def test_the_probe_recognizes_use_of_the_embedding(tokenizer):
    """The question asks whether there is a marker. Its position does not matter, but without its embedding it is not
    found."""
    for position in ("learned", "rope"):
        # the sixth pair of dimensions rotates by 0.001 per position
        run = made_by_hand(tokenizer, position, [(6, ASK, 0.0, MARK)], {MARK: SECOND, FILL: FIRST})
        found = outcomes(run, [[], [3], [], [9, 10], [1]], [APPLE, PEAR, APPLE, PEAR, PEAR])
        assert found.pop("no_embedding") == found.pop("neither") == "10100"
        if position == "rope":
            assert found.pop("no_position_zeros") == "10100"  # a key of zeros is not found either
        assert set(found.values()) == {"11111"} and len(found) == (2 if position == "learned" else 5)


# ----------------------------------------------------------------------------- comparisons


def line(outcomes: str, condition: str = "full", **other) -> dict:
    right, n = outcomes.count("1"), len(outcomes)
    return {
        "task": "parity", "placement": "target", "level": "easy", "length": 48, "condition": condition, "n": n,
        "question": "index",
        "correct": right, "exact": right / n, "interval": (0.4, 0.6), "outcomes": outcomes, "chance": 0.5,
        "arm": "meta + rope", "run": "r", "step": 1, "seed": 2, "seconds": 1.0, **other,
    }  # fmt: skip


def compared(cells: list[list[dict]], effect: float, margin: float) -> list[dict]:
    """The lines of cells with the verdicts on their differences from the first line of their cell."""
    for full, *others in cells:
        for one in others:
            one |= paired_claim("difference", CLAIMS["difference"], bits(one["outcomes"]), bits(full["outcomes"]))
    return judged([one for cell in cells for one in cell], CLAIMS, effect, margin)


def pair(both: int, lost: int, won: int, n: int) -> tuple[str, str]:
    """Returns the outcomes of full, and of a condition that loses `lost` right answers and gains `won`."""
    rest = n - both - lost - won
    return "1" * (both + lost) + "0" * (won + rest), "1" * both + "0" * lost + "1" * won + "0" * rest


def test_differences_equal_a_calculation_by_hand():
    full, worse = pair(40, 10, 2, 100)
    other, same = pair(50, 0, 0, 100)
    lines = compared([[line(full), line(worse, "no_position")], [line(other), line(same, "neither")]], 0.0, 0.05)
    assert [one["condition"] for one in lines] == ["full", "no_position", "full", "neither"]
    assert all("difference" not in one and "verdict" not in one for one in lines[::2])
    first, second = lines[1::2]
    # the probability of at most 2 heads in 12 throws, two-sided
    p = 2 * sum(math.comb(12, k) for k in range(3)) / 2**12
    assert first["difference"] == pytest.approx(-0.08) and first["p"] == pytest.approx(p)
    assert first["holm"] == pytest.approx(2 * p) and second["p"] == second["holm"] == 1
    sides = [np.array([c == "1" for c in text]) for text in (worse, full)]
    assert (first["difference"], *first["difference_interval"]) == paired_difference(*sides)
    assert first["comparisons"] == 2 and first["verdict"] == "undecided: n = 100, 1000 decide"
    text = SECTIONS["positions"].table(lines)
    assert re.search(r"no position +42\.0 +40\.0 \.\. 60\.0 +-8\.0 ", text) and "Holm's p is over 2 comparisons" in text


@pytest.mark.parametrize(
    ("counts", "effect", "said"),
    [
        ((500, 20, 100), 0.0, "holds"),
        ((500, 20, 100), 0.07, "undecided"),
        ((500, 100, 20), 0.0, "the reverse holds"),
        ((500, 10, 30), 0.0, "holds, within the margin"),
        ((500, 10, 12), 0.0, "does not hold"),
        ((300, 150, 170), 0.0, "undecided"),
    ],
)
def test_verdicts_follow_the_rules(counts, effect, said):
    full, condition = pair(*counts, 1000)
    assert compared([[line(full), line(condition, "neither")]], effect, 0.05)[1]["verdict"] == said
    few = [[line(text[::2]) for text in (full, condition)]]
    assert compared(few, effect, 0.05)[1]["verdict"] == "undecided: n = 500, 1000 decide"


def test_holms_correction_can_withdraw_a_verdict_over_comparisons():
    full, condition = pair(500, 20, 40, 1000)
    alone, many = (
        compared([[line(full), line(condition), *[line(full)] * more]], 0.0, 0.05)[1] for more in (0, 9)
    )  # fmt: skip
    assert alone["p"] == many["p"] < 0.05 and alone["verdict"].startswith("holds")
    assert many["holm"] == pytest.approx(10 * alone["p"]) and many["verdict"] == "undecided after Holm"


def test_the_picture_has_a_panel_per_task_and_length_and_the_papers():
    shown = {"full": "10" * 10, "neither": "1000" * 5}
    cells = [
        [line(of, name, task=task, length=n, placement=p) for name, of in shown.items()]
        for task in ("parity", "copying") for n in (48, 64, 96) for p in ("target", "every")
    ]  # fmt: skip
    lines = compared(cells, 0.0, 0.05)
    panels = apart(lines, fields_of(("task", "level", "question", "length")))
    titles = []
    for of in panels:
        probe_pictures.draw_positions(figure := Figure(layout="constrained"), of)
        (axes,) = figure.axes
        titles.append(axes.get_title())
        dots = [mark.get_data() for mark in axes.lines if mark.get_marker() in drawing.MARKERS]
        assert sorted((x[0], round(y[0])) for x, y in dots) == [(25, 1), (25, 1), (50, 0), (50, 0)]
        assert "level easy" in axes.get_xlabel()
    assert titles == [f"{task}, {n} positions" for task in ("parity", "copying") for n in (48, 64, 96)]


# ----------------------------------------------------------------------------- the command


def test_a_run_that_has_not_learned_the_task_is_reported(tokenizer, monkeypatch):
    run, maker = small_run(tokenizer, MARKED, position="rope"), Maker("parity", "target", TaskConfig(), tokenizer)
    assert "was trained on no task" in doubt(run, [(maker, 48, answered(run, maker, "easy", 48, 5))])
    run.config = dataclasses.replace(run.config, task=TaskConfig(tasks=("parity",), level="easy"))
    for right, learned in ((100, True), (50, False)):
        figures = {"exact": right / 100, "interval": wilson(right, 100)}
        monkeypatch.setattr(tasks_eval, "read", lambda run, examples, length, figures=figures: figures)
        found = answered(run, maker, "easy", 48, 1000)
        assert found["n"] == 100 and found["better"] == learned and found["floor"] >= 0.5
        said = doubt(run, [(maker, 48, found)])
        told = f"answers 50.0% of parity target 48 (shortcut or chance {found['floor']:.1%}) exactly, no better than"
        assert said == "" if learned else told in said


def kept(run, folder, **task):
    """Saves the run, and makes it look as if it had been trained on tasks."""
    if task:
        run.config = dataclasses.replace(run.config, task=TaskConfig(level="easy", **task))
    return saved(run, folder)


def lines_of(path) -> list[dict]:
    return [json.loads(row) for row in path.read_text().splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    """Returns the lines without the fields that differ between two calls."""
    return [{name: value for name, value in one.items() if name not in ("seconds", "command")} for one in lines]


def test_the_command_writes_repeatable_lines_that_agree_with_eval(tokenizer, tmp_path, monkeypatch):
    run = small_run(tokenizer, MARKED, position="rope")
    folder = kept(run, tmp_path / "out/small", tasks=("parity",), placements=("target", "every", "none"))
    command = ("positions", "--run=out/small", "--n=20", "--lengths", "48", "64")
    result = cli("probe.py", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    said, picture = result.stdout.decode(), (folder / "positions.png").read_bytes()
    assert "texts without meta-tokens are left out: placement none\n" in said and "no_position_second" in said
    monkeypatch.chdir(tmp_path)
    probe.main(list(command))
    lines = lines_of(folder / "positions.jsonl")
    assert len(lines) == 2 * 24 and timeless(lines[:24]) == timeless(lines[24:])
    assert picture.startswith(b"\x89PNG") and picture == (folder / "positions.png").read_bytes()
    lines = lines[:24]
    where = [(one["placement"], one["length"], one["condition"]) for one in lines]
    assert where == [
        (placement, length, condition) for placement in ("target", "every") for length in (48, 64)
        for condition in MEANING if condition not in READINGS
    ]  # fmt: skip
    for one in lines:
        assert (one["probe"], one["level"], one["n"], one["run"], one["seed"]) == (
            "positions",
            "easy",
            20,
            "small",
            1337,
        )
        assert one["correct"] == one["outcomes"].count("1") == 20 * one["exact"] and len(one["outcomes"]) == 20
        assert one["interval"][0] <= one["exact"] <= one["interval"][1] and one["command"].startswith(
            "probe.py positions"
        )
        assert ("verdict" in one) == (one["condition"] != "full")
        if one["condition"] != "full":
            assert one["comparisons"] == 20 and {"difference", "difference_interval", "p", "holm"} <= one.keys()
    nats = {}
    for one in lines:
        nats.setdefault((one["placement"], one["length"]), []).append(one["nats"])
    # with target there is one marker, so the second attention reads only itself
    for (placement, _), of in nats.items():
        assert len(set(of)) == (4 if placement == "target" else 6)
    # the condition full equals the evaluation by eval.py
    evaluation.main(["tasks", "--run=out/small", "--n=20", "--lengths", "48", "64", "--placements", "target", "every"])
    same = ("task", "placement", "length", "correct", "outcomes", "nats", "token_accuracy", "tokens_per_item", "chance")
    theirs = [[one[name] for name in same] for one in lines_of(folder / "tasks.jsonl")]
    assert theirs == [[one[name] for name in same] for one in lines if one["condition"] == "full"]


def test_the_texts_of_a_cell_are_generated_once(tokenizer, monkeypatch):
    made, make = [], Maker.example

    def counted(self, split, index, *rest):
        made.append((split, index))
        return make(self, split, index, *rest)

    monkeypatch.setattr(Maker, "example", counted)
    maker = Maker("parity", "every", TaskConfig(), tokenizer)
    run = small_run(tokenizer, MARKED, position="rope")
    lines = measure_positions(PositionsProbe(n=7, every_reading=True), run, maker, "easy", 40)
    assert [one["condition"] for one in lines] == list(MEANING)
    assert made == [("test", i) for i in range(7)]


@pytest.mark.parametrize(
    ("shape", "conditions", "why"),
    [
        ({"position": "learned"}, ["full", "no_position", "no_embedding", "neither"], "before any attention"),
        ({"position": "rope", "second_attention": "none"}, ["full", "no_position", "no_embedding", "neither"],
         "one attention"),
        ({"position": "rope", "meta_position": "none"}, ["full", "no_embedding"], "no position in training"),
        ({"position": "rope", "meta_position": "none_second"}, ["full", "no_embedding"], "no position in training"),
    ],
)  # fmt: skip
def test_impossible_conditions_are_left_out_and_named(tokenizer, tmp_path, monkeypatch, capsys, shape, conditions, why):
    monkeypatch.setattr(probe_command, "draw_picture", lambda name, lines: b"\x89PNG")
    folder = kept(small_run(tokenizer, MARKED, **shape), tmp_path / "out/small", tasks=("parity",))
    probe.main(["positions", f"--run={folder}", "--n=3", "--lengths=40", f"--output={tmp_path / 'x.jsonl'}"])
    assert [one["condition"] for one in lines_of(tmp_path / "x.jsonl")] == conditions
    without = [row for row in capsys.readouterr().out.splitlines() if " is left out for a run " in row]
    left_out = [name for name in MEANING if name not in (*conditions, *READINGS)]
    assert [row.partition(" is left out for a run ")[0] for row in without] == left_out
    assert all(why in row for row in without)
    assert not (folder / "positions.jsonl").exists() and (tmp_path / "x.png").exists()


REFUSED = {
    "a setting of 0.1": ({}, {}, ("--conditions=full",), "unknown setting --conditions"),
    "random": ({"second_attention": "random"}, {}, (), "was trained without meta-tokens"),
    "plain": ({"second_attention": "none"}, None, (), "was trained without meta-tokens"),
    "placement none": ({}, {}, ("--placements", "target", "none"), "with placement none have no meta-tokens"),
    "trained without": ({}, {"placements": ("none",)}, (), "with placement none have no meta-tokens"),
    "learned positions": ({"position": "learned"}, {}, ("--every_reading",), "--every_reading has no effect"),
    "trained without positions": ({"meta_position": "none"}, {}, ("--every_reading",), "had no position in training"),
    "few markers": ({}, {"placements": ("background",), "meta_share": 0.001}, (), "placement background and 40"),
    "too long": ({"position": "learned"}, {}, ("--lengths", "40", "80"), "80 positions do not fit into the learned"),
    "too short": ({}, {}, ("--lengths=8",), "has no text of level easy with 8 to 8 positions"),
    "twice": ({}, {}, ("--tasks", "parity", "parity"), "tasks=('parity', 'parity') is out of range"),
    "n": ({}, {}, ("--n=0",), "n=0 is out of range"),
    "margin": ({}, {}, ("--margin=0",), "margin=0.0 is out of range"),
    "effect": ({}, {}, ("--effect=1",), "effect=1.0 is out of range"),
    "picture": ({}, {}, ("--output=x.png",), "output='x.png' is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence_before_anything_is_written(
    tokenizer, tmp_path, monkeypatch, capsys, case
):
    shape, task, args, sentence = REFUSED[case]
    run = small_run(tokenizer, PLAIN if task is None else MARKED, **{"position": "rope", **shape})
    kept(run, tmp_path / "out/small", **({} if task is None else {"tasks": ("parity",), **task}))
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = {arg.split("=")[0] for arg in args}
    defaults = [arg for arg in ("--n=5", "--lengths=40") if arg.split("=")[0] not in given]
    with pytest.raises(UserError) as refused:
        probe.main(["positions", "--run=out/small", *defaults, *args])
    assert sentence in str(refused.value) and str(refused.value).endswith((".", "?"))
    assert tree(tmp_path) == before and capsys.readouterr().out == ""


def test_an_unknown_probe_is_refused():
    with pytest.raises(UserError, match="there is no probe 'position': did you mean 'positions'"):
        probe.main(["position"])


def test_help_names_the_probe(capsys):
    with pytest.raises(SystemExit):
        probe.main(["positions", "--help"])
    assert re.match(r"usage: \S+ positions ", capsys.readouterr().out)
