"""Tests report.py on the tasks: the page has every number, differences are right, and no input becomes markup."""

import html
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats as distributions

from nanometa.common.errors import UserError
from nanometa.common.statistics import wilson
from nanometa.config.tasks import PLACEMENTS, TASKS
from nanometa.eval import EVALS
from nanometa.report import NO_SECTION, main, render, sections_of
from nanometa.reports import drawing
from nanometa.reports.compare import between_arms, between_checkpoints, beyond
from nanometa.reports.files import Found, read
from nanometa.reports.lines import Panel, arms_of, share_interval
from nanometa.reports.markup import command_line
from nanometa.reports.page import Page
from nanometa.reports.paper import FIGURE_1
from nanometa.reports.task_pictures import accuracy
from tests.conftest import cli, refusal

HALF = "1" * 50 + "0" * 50


def line(outcomes: str = HALF, arm="meta + rope", train_length=128, seed=1, **other) -> dict:
    """Returns a line of eval.py tasks. With empty outcomes, the cell is impossible."""
    run = f"{arm.split()[0]}_{train_length}_{seed}"
    facts = {
        "arm": arm, "run": run, "checkpoint": f"out/{run}/step_00002000", "weights_sha256": f"{run:0<64}",
        "step": 2000, "seed": seed, "trained_on": ["list_recall", "segment_counting", "parity", "copying"],
        "train_length": train_length, "train_placements": ["target"], "command": f"eval.py tasks --run=out/{run}",
        "commit": "c" * 40, "eval": "tasks", "task": "parity", "placement": "target", "level": "hard",
        "question": "index", "length": 128, "tokens_per_item": 1.25,
        "settings": "a" * 16, "parameters": 3_200_000,
    }  # fmt: skip
    n, right = len(outcomes), outcomes.count("1")
    if not n:
        return {
            **facts,
            "n": 0,
            "impossible": "512 positions do not fit into the learned position table, which has 128",
            **other,
        }
    return {
        **facts, "n": n, "correct": right, "exact": right / n, "interval": [0.0, 1.0], "token_accuracy": right / n,
        "token_interval": [0.125, 0.875], "nats": 1.2345, "chance": 0.5,
        "floors": {"the first bit": 0.501, "the parity of all bits": 0.489}, "outcomes": outcomes, "seconds": 1.5,
        **other,
    }  # fmt: skip


def realistic(seeds=(1,), n: int = 1000) -> list[dict]:
    """Returns lines of 3 arms x 2 train lengths x all tasks x all placements x 3 lengths."""
    draws, out = random.Random(0), []
    chances = {"list_recall": 0.005, "segment_counting": 0.25, "parity": 0.5, "copying": 0.0}
    skills = {"meta + rope": 0.9, "pause + rope": 0.6, "gpt2 + learned": 0.3}
    axes = (skills, (128, 256), seeds, TASKS, PLACEMENTS, (128, 256, 512))
    for arm, trained, seed, task, placement, length in itertools.product(*axes):
        cell = {"task": task, "placement": placement, "length": length}
        if arm.endswith("learned") and length > 256:
            out.append(line("", arm, trained, seed, **cell))
            continue
        luck = random.Random(f"{arm} {trained} {seed} {task} {placement}").uniform(-0.1, 0.1)
        skill = min(1, max(0, skills[arm] + luck - 0.2 * max(0, math.log2(length / trained))))
        chance = chances[task]
        # the same texts are easy for all arms
        easy = [random.Random(f"{task} {placement} {length} {i}").random() for i in range(n)]
        bits = "".join(str(int(0.5 * (e + draws.random()) < chance + (1 - chance) * skill)) for e in easy)
        floors = {"the last span": chance + 0.1 * 128 / length, "the first": chance}
        out.append(line(bits, arm, trained, seed, chance=chance, floors=floors, **cell))
    return out


def write(path, lines) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(path)


def files_of(lines, effect=0.0, margin=0.05, repeated=0, command="report.py") -> dict[str, bytes]:
    return render(Found({"tasks": lines}, [], repeated), sections_of(effect, margin), command)


def page(lines, *how) -> str:
    return files_of(lines, *how)["report.html"].decode()


def read_tasks(path: str) -> tuple[list[dict], int]:
    found = read((path,), sections_of(0.0, 0.05))
    return found.lines["tasks"], found.repeated


def words(text: str) -> str:
    """Returns the text of a page as a reader sees it, with cells separated by |."""
    text = re.sub(r"</?span>", "", text)  # the arguments of a command
    return html.unescape(re.sub(r"<[^>]+>", "|", re.sub(r"data:image/png;base64,[^\"]+", "", text)))


def test_the_report_has_the_figures_of_every_cell_and_the_papers(tmp_path):
    lines = [one for one in realistic(n=200) if one["placement"] in ("target", "every") and one["task"] != "copying"]
    write(tmp_path / "tasks.jsonl", lines[:50])
    rest = write(tmp_path / "rest.jsonl", lines[50:])
    result = cli("report.py", str(tmp_path), rest, "--output=there", cwd=tmp_path)
    assert result.stdout.decode() == "there/report.html\n", result.stderr.decode()
    text = (tmp_path / "there/report.html").read_text()
    rows = {tuple(filter(None, row.split("|"))) for row in words(text).split("\n")} - {()}
    for one in lines:
        if "impossible" in one:
            found = [row for row in rows if "impossible" in row and one["impossible"] in row]
        else:
            share, low, high = one["exact"], *(100 * v for v in wilson(one["correct"], one["n"]))
            figures = {f"{100 * share:.1f}", f"{low:.1f} .. {high:.1f}", "1.234", str(one["n"]), str(one["length"])}
            ends = ([100 * end for end in share_interval(v, one["n"])] for v in one["floors"].values())
            floors = "; ".join(f"{100 * v:.1f} ({low:.1f} .. {high:.1f}) {name}"
                               for (name, v), (low, high) in zip(one["floors"].items(), ends, strict=True))  # fmt: skip
            found = [row for row in rows if figures | {floors, one["arm"]} <= set(row)]
        assert found, one
        assert one["command"] in words(text)
    section = words(text).partition("ours beside the paper's Figure 1")[2].partition("Source: ")[0].split("\n")
    for task in ("list_recall", "segment_counting", "parity"):
        at = next(i for i, row in enumerate(section) if row.startswith(f"||{task.replace('_', ' ')}: target (hard"))
        for row, length in zip(section[at + 1 :], (128, 256, 512), strict=False):
            given = tuple(str(model.get(length, "–")) for model in FIGURE_1[task].values())
            cells = tuple(filter(None, row.split("|")))
            assert (cells[0], *cells[-4:]) == (str(length), *given)
    # the paper's contradictory figures, and the small n they may rest on
    assert "49.2" in text and "64.8" in text and "1/28" in text
    pictures = {path.name for path in (tmp_path / "there").glob("*.png")}
    assert len(pictures) == 3 and all(name in text for name in pictures)
    assert not re.search(r"\bnan\b|\binf\b|<script|https?:|src=\"(?!data:)", re.sub(r"base64,[^\"]+", "", text), re.I)


def test_the_same_lines_give_the_same_page():
    first, second = (files_of(realistic(n=20)[::29]) for _ in range(2))
    assert first == second and len(first) == 5


def test_differences_of_checkpoints_equal_a_calculation_by_hand():
    # of 100 texts, 40 are right in both, 10 only in the first, 2 only in the second, 48 in neither
    first, second = "1" * 50 + "0" * 50, "1" * 40 + "0" * 10 + "11" + "0" * 48
    arms = arms_of([line(first), line(second, "gpt2 + rope"), line(first, task="copying"),
                    line(first, "gpt2 + rope", task="copying")])  # fmt: skip
    row, equal = between_checkpoints(arms)
    assert (row.first.label, row.second.label, row.seeds, row.length) == ("meta + rope", "gpt2 + rope", (1,), 128)
    assert row.mean == pytest.approx(0.08) and row.low < 0.08 < row.high
    # the probability of at most 2 heads in 12 throws, two-sided
    assert row.p == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert row.holm == pytest.approx(2 * row.p) and equal.p == equal.holm == 1 and equal.mean == 0
    assert row.verdict == "undecided: 1 seed" and between_arms(arms, 0.0, 0.05) == []
    text = words(page([line(first), line(second, "gpt2 + rope")]))
    assert "|+8.0|" in text and "undecided with fewer than 5 seeds" in text


def several(differences, n=100) -> list[dict]:
    """Returns lines of two arms, one pair per seed, in which the first arm is better by that many of n texts."""
    out = []
    for seed, more in enumerate(differences):
        out += [line("1" * (50 + k) + "0" * (n - 50 - k), arm, seed=seed) for arm, k in (("a", more), ("b", 0))]
    return out


@pytest.mark.parametrize(
    ("differences", "effect", "said"),
    [
        ((20, 22, 18, 21, 19), 0.0, "holds"),
        ((20, 22, 18, 21, 19), 0.195, "undecided"),
        ((-20, -22, -18, -21, -19), 0.0, "the reverse holds"),
        ((1, -1, 0, 1, -1), 0.0, "does not hold"),
        ((3, 2, 3, 2, 3), 0.0, "holds, within the margin"),
        ((30, -20, 0, 10, -5), 0.0, "undecided"),
        ((20, 22, 18, 21), 0.0, "undecided: 4 seeds, but at least 5 are needed"),
        ((0, 0, 0, 0, 0), 0.0, "does not hold"),
    ],
)
def test_verdicts_about_arms_need_five_seeds(differences, effect, said):
    (row,) = between_arms(arms_of(several(differences)), effect, 0.05)
    mean, sd, n = np.mean(differences) / 100, np.std(differences, ddof=1) / 100, len(differences)
    half = {4: 3.182446, 5: 2.776445}[n] * sd / math.sqrt(n)  # Student's t from a table
    assert (row.mean, row.low, row.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
    assert row.verdict == said and f"|{said}|" in words(page(several(differences), effect))


def test_holms_correction_can_withdraw_a_verdict_over_cells():
    """One of eleven cells has p = 0.03."""
    shared = several((13, 2, 12, 4, 5))
    (alone,) = between_arms(arms_of(shared), 0.0, 0.05)
    assert alone.verdict == "holds" and 0.01 < alone.p < 0.05
    others = [{**one, "length": length} for length in range(200, 210) for one in several((9, -9, 3, -3, 0))]
    first = between_arms(arms_of(shared + others), 0.0, 0.05)[0]
    assert first.p == alone.p and first.holm == pytest.approx(11 * alone.p) and first.verdict == "undecided after Holm"


def test_p_values_agree_with_intervals():
    shares = np.array([0.1, 0.12, 0.05, 0.2, 0.16])
    assert beyond(shares.mean(), 1.0, 0.2, 5) == 1.0
    half = distributions.t.ppf(0.975, 4) * shares.std(ddof=1) / math.sqrt(5)
    assert beyond(shares.mean(), half, 0.0, 5) == pytest.approx(distributions.ttest_1samp(shares, 0).pvalue)
    assert beyond(shares.mean(), half, shares.mean() - half, 5) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"outcomes": "10" * 20, "n": 40, "correct": 20}, "n 100 against 40"),
        ({"tokens_per_item": 1.0}, "tokens_per_item 1.25 against 1"),
        ({"floors": {"the first bit": 0.25}}, "the texts differ, because the shortcuts' shares differ"),
        ({"seed": 2}, "no seed in common"),
    ],
)
def test_lines_of_other_texts_are_not_paired(other, why):
    lines = [line(), line(arm="gpt2 + rope", **other)]
    (row,) = between_checkpoints(arms_of(lines))
    assert row.refused == why and row.p is None and f"|not compared: {why}|" in words(page(lines))


def test_only_arms_of_equal_training_are_compared():
    lines = [line(), line(arm="gpt2 + rope", train_placements=["every"]), line(arm="pause + rope", train_length=256)]
    assert between_checkpoints(arms_of(lines)) == []
    assert "No two arms of equal training share a cell." in page(lines)


def test_two_runs_with_the_same_seed_are_shown_separately():
    twice = [line(), line(run="again", weights_sha256="b" * 64)]
    first, second = arms_of(twice)
    assert [arm.label for arm in (first, second)] == [
        "meta + rope, meta_128_1, step 2000, meta_128", "meta + rope, again, step 2000, bbbbbbbb"
    ]  # fmt: skip
    assert between_arms(arms_of(twice), 0.0, 0.05) == [] and len(between_checkpoints(arms_of(twice))) == 1
    (together,) = arms_of([line(), line(seed=2)])
    assert together.label == "meta + rope" and set(*together.lines.values()) == {1, 2}


def test_runs_with_other_settings_are_not_seeds_of_one_arm():
    lines = [line(), line(seed=2, settings="b" * 16), line(arm="gpt2 + rope", settings="c" * 16)]
    arms = arms_of(lines)
    assert [arm.label for arm in arms] == [
        "meta + rope, settings aaaaaa",
        "meta + rope, settings bbbbbb",
        "gpt2 + rope",
    ]
    assert between_checkpoints(arms) == [] and between_arms(arms, 0.0, 0.05) == []


def test_labels_of_arms_name_what_distinguishes_them():
    lines = [line(), line(train_length=256), line(arm="gpt2 + rope"), line(train_placements=["every"], run="other")]
    assert [arm.label for arm in arms_of(lines)] == [
        "meta + rope, trained with target", "meta + rope, trained with target", "gpt2 + rope",
        "meta + rope, trained with every",
    ]  # fmt: skip


def test_an_impossible_cell_is_drawn_as_a_cross_below_zero():
    lines = [line(), line("", length=512), line(arm="gpt2 + rope"), line(arm="gpt2 + rope", length=512)]
    panel, figure = Panel("parity", "target", "hard", "index"), Figure()
    accuracy(figure, arms_of(lines), [panel], "")
    drawn = {(round(float(x)), float(y)) for mark in figure.axes[0].lines for x, y in zip(*mark.get_data(), strict=True)
             if mark.get_marker() == "x"}  # fmt: skip
    ((x, y),) = drawn
    assert abs(x - 512) < 32 and y < 0
    ours = next(mark for mark in figure.axes[0].lines if mark.get_marker() == "o")
    assert list(ours.get_ydata()) == [50.0]  # no point at 512
    (row,) = [row for row in between_checkpoints(arms_of(lines)) if row.length == 512]
    assert row.refused == "impossible for meta + rope"


def test_a_picture_shows_every_placement_of_its_task():
    """A panel for each placement, with all its figures, and an empty place where one is missing."""
    lines = [one for one in realistic(n=50) if (one["task"], one["placement"]) != ("copying", "every")]
    for task in TASKS:
        figure, placements = Figure(), [of for of in PLACEMENTS if (task, of) != ("copying", "every")]
        accuracy(figure, arms_of(lines), [Panel(task, placement, "hard", "index") for placement in placements], "")
        assert len(figure.axes) == 4 and sum(not axes.axison for axes in figure.axes) == 4 - len(placements)
        for axes, placement in zip(figure.axes, placements, strict=False):
            assert axes.get_title() == placement
            shown = sorted(100 * one["exact"] for one in lines
                           if (one["task"], one["placement"]) == (task, placement) and "exact" in one)  # fmt: skip
            points = [y for mark in axes.lines if mark.get_marker() in drawing.MARKERS for y in mark.get_ydata()]
            assert sorted(y for y in points if y >= 0) == pytest.approx(shown)


def test_an_arm_has_its_color_and_a_second_label_of_it_another():
    looks = drawing.arm_looks(["gpt2 + rope", "meta + rope, yarn 4x", "meta + rope", "other"])
    colours = [look["color"] for look in looks.values()]
    assert colours[:2] == [drawing.ARM_COLOURS["gpt2"], drawing.ARM_COLOURS["meta"]] and len(set(colours)) == 4


def test_the_first_table_has_one_row_for_each_weights_labelled_by_training():
    """However often the weights were read with another scale of the positions. The table does not scroll."""
    read_otherwise = line(arm="meta + rope, read with pi 2x", length=256)
    lines = [line(), line(length=512, outcomes="1" * 25 + "0" * 75), read_otherwise, line(seed=2),
             line(placement="none", outcomes="0" * 100), line(task="copying")]  # fmt: skip
    first, *_ = page(lines).split("</table>")
    rows = [tuple(filter(None, row.split("|"))) for row in words(first).split("\n")][-3:-1]
    assert "scroll" not in first.partition("<body>")[2]
    assert rows == [("meta + rope", "meta_128_1, step 2000", "1", "3.20M", "128 → 512", "50.0 → 25.0", "50.0 → –"),
                    ("meta + rope", "meta_128_2, step 2000", "2", "3.20M", "128", "50.0")]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "warned"),
    [
        ([line()], False),
        ([line(), line(arm="gpt2 + rope")], True),
        ([line(), line(run="again", weights_sha256="b" * 64)], True),
        ([line(), line(arm="gpt2 + rope"), line(seed=2)], False),
    ],
)
def test_the_page_warns_of_differences_between_arms_of_one_seed(lines, warned):
    assert ("One seed per arm: differences between rows may be chance." in page(lines)) == warned


def test_commands_can_be_pasted_and_break_only_between_arguments():
    text = command_line("train.py config/a.py --run_name=<b>")
    assert text == "<code><span>python</span> <span>train.py</span> <span>config/a.py</span> " + (
        "<span>--run_name=&lt;b&gt;</span></code>"
    )
    assert command_line("train.py, out/old") == "<code><span>train.py,</span> <span>out/old</span></code>"


def test_every_evaluation_has_a_section_or_is_listed_without_one():
    shown = {section.kind for section in sections_of(0.0, 0.05)} & EVALS.keys()
    assert sorted([*shown, *NO_SECTION]) == sorted(EVALS)


def test_of_repeated_lines_the_one_with_most_texts_or_the_last_counts(tmp_path):
    rows = [line("0" * 100), line(length=256), line("1" * 100), line("0" * 20)]
    lines, repeated = read_tasks(write(tmp_path / "x.jsonl", rows))
    assert repeated == 2 and [(one["length"], one["exact"]) for one in lines] == [(128, 1.0), (256, 0.5)]
    assert "same run and weights: 2." in page(lines, 0.0, 0.05, repeated)


def test_no_input_becomes_markup_or_mathematics():
    evil = "<script>alert('x')</script>&\"'$\\frac{$"
    lines = [line(arm=evil, run=evil, command=evil, checkpoint=evil, commit=evil, trained_on=[evil, "parity"],
                  floors={evil: 0.5}, weights_sha256=evil), line("", length=512, impossible=evil)]  # fmt: skip
    files = files_of(lines, command=evil)
    text = files["report.html"].decode()
    assert "<script" not in text and "alert" in text and words(text).count(evil) > 6
    assert all(re.fullmatch(r"[\w.]+", name) for name in files)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n": None}, "n is missing"),
        ({"n": 99}, "exact is 0.5, but 50 of 99 answers are correct"),
        ({"correct": 51}, "exact is 0.5"),
        ({"outcomes": "1" * 100}, "its outcomes are not 50 ones"),
        ({"outcomes": None}, "outcomes is missing"),
        ({"seed": "1"}, "seed is '1'"),
        ({"task": "../../etc"}, "task is '../../etc'"),
        (
            {"eval": "passkey"},
            'it has no field "eval" or "probe" with one of the values tasks, perplexity, compression, longppl, ',
        ),
        ({"origin": {"weights": "scratch"}}, "dataset is missing"),
        ({"scaling": 4}, "scaling is '4'"),
        ({"chance": math.nan}, "NaN is no figure"),
        ({"floors": {}}, "floors"),
        ({"token_interval": [0.5, 7]}, "token_interval"),
        ({"length": 0}, "its length is 0"),
        ({"nats": 10**400}, "too large"),
        ({"run": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_damaged_line_of_tasks_is_refused_with_its_number(tmp_path, change, why):
    damaged = {name: value for name, value in (line() | change).items() if value is not None}
    with pytest.raises(UserError, match=re.escape("x.jsonl, line 2 ")) as refused:
        read_tasks(write(tmp_path / "x.jsonl", [line(), damaged]))
    assert why in str(refused.value)


def test_bad_arguments_and_files_are_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "x.jsonl", [line()])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl").write_text(json.dumps(line()) + "\n" + json.dumps(line())[:50])
    for args, sentence in (
        ((), "name folders of runs"),
        (("nowhere",), "there is no folder nowhere: give folders of runs, such as out/NAME."),
        (("curve", "nowhere"), "there is no folder or command curve: did you mean 'curves'?"),
        (("nowhere.jsonl",), "nowhere.jsonl cannot be read"),
        (("empty.jsonl",), "empty.jsonl has no line"),
        ((good, "--margin=0"), "margin=0.0 is out of range"),
        ((good, "--efect=0.1"), "did you mean 'effect'"),
    ):
        with pytest.raises(UserError) as refused:
            main(list(args))
        assert sentence in str(refused.value), args
    told = "cut.jsonl, line 2 is no line of eval.py or probe.py"
    assert told in refusal(cli("report.py", "cut.jsonl", cwd=tmp_path))
    assert not (tmp_path / "out").exists()


def test_commands_are_named_by_the_order_of_their_first_mention():
    page = Page("")
    assert [re.sub("<[^>]+>", "", page.links(list(names))) for names in ("ab", "cab", "c")] == [
        "[1] [2]",
        "[1] [2] [3]",
        "[3]",
    ]


def test_every_panel_has_a_picture_and_rows():
    lines = [line(task=task, level=level, question=question) for task in ("parity", "list_recall")
             for level in ("easy", "hard") for question in ("index", "after")]  # fmt: skip
    files = files_of(lines)
    assert sum(name.startswith("accuracy_") for name in files) == 8
    cells = words(files["report.html"].decode()).rpartition("Tasks: all cells")[2].partition("Figure 1")[0]
    assert len(set(re.findall(r"\n\|\|(\w[^|]+: target [^|]+)\|", cells))) == 8 and cells.count("|1.234|") == 8
