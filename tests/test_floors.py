"""Tests that no simple program answers the texts of the tasks better than the printed floors say."""

import itertools
import math
from collections import Counter

import pytest

import nanometa.tasks.floors
from nanometa.common.errors import UserError
from nanometa.common.statistics import wilson
from nanometa.config import TaskConfig
from nanometa.config.tasks import LEVELS, PLACEMENTS, TASKS
from nanometa.data.tokenizer import Tokenizer
from nanometa.tasks import categories, words
from nanometa.tasks.example import SPLITS, Maker
from nanometa.tasks.floors import PROGRAMS, TOLD, lists_of, measure, prefix, read_text, spans_of
from nanometa.tasks.parity import percentile
from nanometa.tasks.segment_counting import SIZES
from tests.fast_cases import diagonal
from tests.reference.tasks import SIGNS, shortcuts, solve

LENGTHS = (64, 128, 256, 512)
# shortcuts that choose at random, or look the split of a prefix up
UNCHECKED = {
    "the same place in any list", "any item of the list", "any span", "a table of training prefixes, by the last bits",
    "a table of training prefixes, by the first bits", "the parity of the bits that are likely to count",
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.gpt2()


def maker(task, tokenizer, placement="none", **settings):
    return Maker(task, placement, TaskConfig(**settings), tokenizer)


def texts(make, n, length, level="hard", split="test"):
    return [make.example(split, i, math.ceil(0.9 * length), length, (level,)) for i in range(n)]


def beaten(cell, n, floors_vary=False):
    """Returns the programs of a cell whose 95 % interval lies above every floor and above chance.

    floors_vary: the interval must lie above that of the best floor, since among some thousand comparisons a few floors
    are too low by chance."""
    most = max(cell.chance, *(wilson(round(of * n), n)[1] if floors_vary else of for of in cell.floors.values()))
    return {name: share for name, share in cell.programs.items() if wilson(round(share * n), n)[0] > most}


@pytest.mark.parametrize(("task", "length"), diagonal(TASKS, LENGTHS))
def test_no_program_beats_the_printed_floors(gpt2, task, length):
    n = 120
    cell = measure(maker(task, gpt2), "hard", length, n, 300)
    assert not beaten(cell, n)
    assert cell.seen == (0 if task == "parity" else None)
    if task == "copying":  # at every length, 2-gram induction is right and 1-gram induction is ambiguous
        assert cell.told["2-gram induction"] == 1
        assert 0.03 < cell.told["1-gram induction, any occurrence"] < 0.35


@pytest.mark.slow
@pytest.mark.parametrize("level", ("easy", "medium", "hard", "extra_hard"))
@pytest.mark.parametrize("length", (*LENGTHS, 1024))
@pytest.mark.parametrize("task", TASKS)
def test_no_program_beats_the_printed_floors_on_many_texts(gpt2, task, length, level):
    if (task, length, level) in (("segment_counting", 64, "extra_hard"), ("copying", 64, "extra_hard")):
        pytest.skip("short texts hold one or two of the largest problems")
    n = 500
    cell = measure(maker(task, gpt2), level, length, n, 2000)
    if not (task == "parity" and level in ("easy", "medium")):  # their prefixes are few: see tasks/parity.py
        assert not beaten(cell, n, floors_vary=True)
    assert cell.seen in (0, None)


@pytest.mark.slow
def test_floors_of_segment_counting_do_not_grow_with_the_length(gpt2):
    """Programs that read no mark are at chance in long texts, where the largest count of adjacent lists once rose."""
    n, reads_marks = 200, ("mark", "segment")
    best = {}
    for length in (64, 256, 1024):
        cell = measure(maker("segment_counting", gpt2), "hard", length, n, 50)
        shares = {**cell.programs, **cell.floors}
        best[length] = max(of for name, of in shares.items() if not any(word in name for word in reads_marks))
    assert best[64] > best[256] > best[1024] - 0.02 and best[1024] < 0.25 + 4 * math.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("task", TASKS)
def test_printed_floors_are_the_answers_of_independent_programs(gpt2, task, placement):
    make = maker(task, gpt2, placement)
    for length, level in itertools.product((100, 200), ("easy", "medium", "hard")):
        for example in texts(make, 6, length, level):
            draft = example.draft
            expected = shortcuts(task, gpt2.decode(example.ids), placement, make.task.SIZES[level])
            given = {name: " ".join(answer.split()) for name, answer in {**draft.shortcuts, **draft.aided}.items()}
            assert {name: given[name] for name in expected} == expected
            assert given.keys() - expected.keys() <= UNCHECKED


@pytest.mark.parametrize("task", TASKS)
def test_programs_read_the_texts_of_every_placement_alike(gpt2, task):
    for placement in PLACEMENTS:
        make = maker(task, gpt2, placement)
        for example in texts(make, 5, 128, "medium"):
            text = read_text(example, placement, gpt2)
            assert text.answer == "".join(example.draft.questions[0][1]).strip()
            signs = text.body.count("@")
            assert signs == (1 if task == "parity" else 2 if make.has_pointer else 0)
            for program in {**PROGRAMS[task], **TOLD.get(task, {})}.values():
                (answer,) = program([text], [text])
                assert isinstance(answer, str)


# ----------------------------------------------------------------------------- parity


@pytest.mark.parametrize("n", range(3, 12))
def test_prefixes_of_every_length_are_split_evenly(n):
    """Each split has its share of the prefixes, as many with answer zero as with answer one, whatever the first bit."""
    counts = Counter((percentile(list(bits)), sum(bits) % 2) for bits in itertools.product((0, 1), repeat=n))
    assert counts == {(number, answer): 2**n // 8 for number in (0, 25, 50, 75) for answer in (0, 1)}
    assert [sum(number in of for number in (0, 25, 50, 75)) for of in SPLITS.values()] == [2, 1, 1]


@pytest.mark.parametrize(("level", "length", "distinct"), [("easy", 32, 6), ("hard", 64, 250), ("long", 128, 390)])
def test_no_prefix_occurs_in_two_splits(gpt2, level, length, distinct):
    make, seen = maker("parity", gpt2), {}
    for split in ("train/1", "val", "test"):
        found = [prefix(read_text(example, "none", gpt2)) for example in texts(make, 400, length, level, split)]
        assert all(seen.setdefault(of, split) == split for of in found)
        if split == "test":
            assert len(set(found)) >= distinct and (level != "easy" or len(set(found)) == distinct)


def test_the_mark_of_parity_moves_with_the_length(gpt2):
    for length in (128, 512, 2048):
        found = [read_text(example, "none", gpt2) for example in texts(maker("parity", gpt2), 60, length)]
        shares = [len(prefix(text)) / sum(word in ("zero", "one") for word in text.body) for text in found]
        assert 0.11 < min(shares) < 0.15 and 0.22 < max(shares) < 0.27


# ----------------------------------------------------------------------------- segment counting and copying


def test_the_item_is_as_frequent_outside_the_segment_as_inside(gpt2):
    for length, n in ((128, 400), (512, 150)):
        inside, outside = [], []
        for example in texts(maker("segment_counting", gpt2), n, length):
            text = read_text(example, "none", gpt2)
            item = text.question[-1]
            marked = False
            for line in " ".join(text.body).split(" \n"):
                opens = line.count("@")
                if line.strip():
                    (inside if marked or opens else outside).append(line.split().count(item))
                marked ^= opens == 1
        mean, beside = sum(inside) / len(inside), sum(outside) / len(outside)
        assert mean == pytest.approx(beside, abs=0.1) and 0.75 < mean < 1


@pytest.mark.parametrize(("length", "level"), [(64, "easy"), (128, "hard"), (512, "hard"), (1024, "extra_hard"),
                                               (1024, "hard")])  # fmt: skip
def test_copying_is_equally_ambiguous_at_every_length(gpt2, length, level):
    for example in texts(maker("copying", gpt2), 10, length, level):
        text = read_text(example, "none", gpt2)
        spans = spans_of(text.unmarked)
        assert len({span[0] for span in spans}) == len(spans) and all(len(set(span)) == len(span) for span in spans)
        free = [word for word in text.unmarked if word not in ("[", "]", "\n")]
        pairs = [pair for pair in itertools.pairwise(text.unmarked) if not set(pair) & {"[", "]", "\n"}]
        assert len(set(pairs)) == len(pairs) and all(first != second for first, second in pairs)
        often = Counter(Counter(free).values())
        if len(free) <= 800:
            assert often[2] >= len(set(free)) - 1 and set(often) <= {1, 2}
        else:
            assert set(often) <= {2, 3}


def test_copying_has_texts_with_more_places_than_words(gpt2):
    (example,) = texts(maker("copying", gpt2), 1, 8000)
    text = read_text(example, "none", gpt2)
    starts = Counter(span[0] for span in spans_of(text.unmarked))
    assert sum(starts.values()) > 400 and max(starts.values()) == 2
    pairs = [pair for pair in itertools.pairwise(text.unmarked) if not set(pair) & {"[", "]", "\n"}]
    assert len(set(pairs)) == len(pairs) > 3000


# ----------------------------------------------------------------------------- semantic lists


def test_categories_are_disjoint_and_large_enough(gpt2):
    members = [word for of in categories.CATEGORIES.values() for word in of.split()]
    assert len(categories.CATEGORIES) >= 16 and len(members) == len(set(members))
    taken = {*categories.CATEGORIES, *categories.ADJECTIVES}
    assert len(taken) == len(categories.CATEGORIES) + len(categories.ADJECTIVES) and not taken & set(members)
    assert not (taken | set(members)) & words.OWN
    assert all(len(of) == categories.MEMBERS >= 12 for of in categories.pools(gpt2).values())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("question", ("index", "misnamed"))
def test_semantic_lists_hold_members_of_their_category(gpt2, placement, question):
    if question == "misnamed" and not PLACEMENTS[placement].points_at_named:
        pytest.skip("nothing points")
    make = maker("list_recall", gpt2, placement, semantic_lists=True, question=question)
    plain = maker("list_recall", gpt2, placement, question=question)
    for length, level in ((64, "easy"), (128, "hard"), (2000, "extra_hard")):
        example = texts(make, 1, length, level)[0]
        lists = lists_of(read_text(example, placement, gpt2).unmarked)
        assert all(set(items) <= set(make.categories[name.split()[-1]]) for name, items in lists.items())
        assert length < 2000 or len(lists) > len(categories.CATEGORIES)
        if question == "index":
            assert all(given == true for given, true in solve("list_recall", gpt2.decode(example.ids), placement))
        assert "any item of the category" in example.draft.shortcuts
        assert "any item of the category" not in texts(plain, 1, length, level)[0].draft.shortcuts


def test_any_item_of_the_category_is_right_once_in_fourteen_times(gpt2):
    n, make = 1500, maker("list_recall", gpt2, semantic_lists=True)
    right = sum(
        example.draft.shortcuts["any item of the category"].strip() == "".join(example.draft.questions[0][1]).strip()
        for example in texts(make, n, 64, "medium")
    )
    assert right / n == pytest.approx(1 / 14, abs=4 * math.sqrt(13 / 14 / 14 / n))


def test_semantic_lists_that_cannot_be_are_refused(gpt2, monkeypatch):
    with pytest.raises(UserError, match="semantic_lists=True is out of range: it must be False with question=after"):
        TaskConfig(tasks=("list_recall",), semantic_lists=True, question="after")
    with pytest.raises(UserError, match="no text of level easy with 18000 to 20000 positions"):
        monkeypatch.setattr("nanometa.tasks.example.ATTEMPTS", 2)
        maker("list_recall", gpt2, semantic_lists=True).example("test", 0, 18000, 20000, ("easy",))


def test_semantic_lists_change_no_other_task(gpt2):
    for task in set(TASKS) - {"list_recall"}:
        one, other = (texts(maker(task, gpt2, semantic_lists=of), 1, 128)[0] for of in (False, True))
        assert (one.ids == other.ids).all()


# ----------------------------------------------------------------------------- the command


def test_the_command_prints_programs_beside_floors(capsys):
    nanometa.tasks.floors.main(["--tasks", "copying", "parity", "--length", "64", "--n", "20", "--train", "40"])
    shown = capsys.readouterr().out
    for name in (*PROGRAMS["copying"], *PROGRAMS["parity"], "floor: the last span", "floor: the first bit"):
        assert f"| {name} | " in shown
    assert "| told the first word: 2-gram induction | 100.0 |" in shown
    assert (
        "| test texts whose prefix occurs in training | 0.0 |" in shown
        and "above the largest floor by more than the 95 % interval: " in shown
    )
    for argv, said in (
        (["--n", "0"], "--n=0 is out of range"),
        (["--semantic", "--tasks", "parity"], "--semantic has no effect without list_recall"),
    ):
        with pytest.raises(UserError, match=said):
            nanometa.tasks.floors.main(argv)


def test_every_task_has_programs_and_its_sizes_are_known():
    assert set(PROGRAMS) == set(TASKS) and set(SIZES) == set(LEVELS) and set(SIGNS) == set(PLACEMENTS)
