"""The synthetic tasks: texts, lengths, splits, markers, answers, shortcuts."""

import collections
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanometa.tasks.example
from nanometa.common.errors import UserError
from nanometa.config import TaskConfig, TrainConfig
from nanometa.config.command_line import load_config
from nanometa.config.tasks import LEVELS, PLACEMENTS, QUESTIONS, TASKS
from nanometa.data.inject import strip
from nanometa.data.layout import IGNORE
from nanometa.data.tokenizer import META, Tokenizer
from nanometa.tasks import words
from nanometa.tasks.example import TASK_MODULE, Maker, load_task
from nanometa.tasks.source import collate, count_right
from tests.reference.targets import stream_targets
from tests.reference.tasks import pointed_and_named, solve

SOLVED_QUESTIONS = ("index", "after")  # misnamed has tests of its own below


@pytest.fixture(scope="module")
def small():
    """A small BPE, to which many of the words are several tokens."""
    return Tokenizer.train(["the file is a list of names: one two three four\n" * 50 + "return value zero\n" * 50], 320)


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.gpt2()


def maker(task, tokenizer, placement="target", **settings):
    return Maker(task, placement, TaskConfig(**settings), tokenizer)


def draw(task, tokenizer, index, length=128, level="medium", split="test", **settings):
    low = math.ceil(0.9 * length)
    return maker(task, tokenizer, **settings).example(split, index, low, length, (level,))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(TASKS),
    st.sampled_from(tuple(PLACEMENTS)),
    st.sampled_from(SOLVED_QUESTIONS),
    st.integers(0, 10**6),
    st.sampled_from((128, 200, 512)),
    st.sampled_from(("easy", "medium", "hard")),
    st.sampled_from((1, 4)),
    st.booleans(),
)
def test_a_text_is_what_it_says(small, gpt2, task, placement, question, index, length, level, questions, is_small):
    tokenizer = small if is_small else gpt2
    if is_small and length == 128:
        length = 200  # words of several tokens need room
    example = draw(task, tokenizer, index, length, level, placement=placement, question=question, questions=questions)
    ids, text = example.ids, tokenizer.decode(example.ids)
    assert math.ceil(0.9 * length) <= len(ids) <= length and ids[0] == ids[-1] == tokenizer.eot
    # the ids are those of the text, with its markers and without
    inner = text.removeprefix("<|endoftext|>").removesuffix("<|endoftext|>")
    assert tokenizer.encode_prompt(inner).tolist() == ids[1:-1].tolist()
    assert tokenizer.encode(inner.replace(META, "")).tolist() == strip(ids[1:-1], tokenizer.meta).tolist()
    # every answer is right, and marked as the answer, with its line's end
    solved = solve(task, text, placement)
    assert all(given == true for given, true in solved), (solved, text)
    assert 1 <= len(solved) <= questions
    answers = tokenizer.decode(ids[example.answers])
    assert answers.split("\n")[:-1] == [("" if answer[0].isdigit() else " ") + answer for answer, _ in solved]
    low, high = {
        "target": (2 if task != "parity" else 1,) * 2,
        "none": (0, 0),
        "every": (1, length),
        "background": (round(0.1 * 0.7 * length), round(0.1 * length)),
    }[placement]
    assert low <= (ids == tokenizer.meta).sum() <= high


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", ["hard", "long"])
def test_texts_have_any_length(gpt2, task, level):
    """Beyond 200 lists, whose names are then of two words, each still of one list alone."""
    for index, length in enumerate((3072, 10_000)):
        example = draw(task, gpt2, index, length, level, placement="every")
        assert 0.9 * length <= len(example.ids) <= length
        text = gpt2.decode(example.ids)
        assert all(given == true for given, true in solve(task, text, "every"))
        if task in ("list_recall", "segment_counting"):
            lines = text.replace(META, "").removeprefix("<|endoftext|>").splitlines()
            names = [line.partition(":")[0] for line in lines if ":" in line and "?" not in line]
            assert len(set(names)) == len(names) > 200 and names[200].count(" ") == 2


def test_background_markers_are_the_share_that_is_asked_for_and_anywhere(gpt2):
    examples = [draw("parity", gpt2, i, placement="background", meta_share=0.2) for i in range(200)]
    share = np.mean([(e.ids == gpt2.meta).sum() / (len(e.ids) - 3) for e in examples])
    assert share == pytest.approx(0.2, abs=0.005)
    places = np.concatenate([np.flatnonzero(e.ids == gpt2.meta) / (len(e.ids) - 3) for e in examples])
    assert np.histogram(places, 10, (0, 1))[0] == pytest.approx(len(places) / 10, rel=0.25)
    assert not any((e.ids[[0, -1]] == gpt2.meta).any() for e in examples)


@pytest.mark.parametrize("task", TASKS)
def test_text_number_i_is_always_the_same_and_in_one_split(gpt2, task):
    def texts(split, n, **settings):
        examples = [draw(task, gpt2, i, 48, "easy", split, **settings) for i in range(n)]
        return [gpt2.decode(e.ids) for e in examples]

    placement = {"placement": "none"}
    assert texts("test", 20, **placement) == texts("test", 20, **placement)
    train, val, test = (set(texts(s, 300, **placement)) for s in ("train/1", "val", "test"))
    assert not train & val and not train & test and not val & test
    assert texts("train/1", 5, **placement) != texts("train/2", 5, **placement)


def test_splits_hold_apart_texts_that_are_likely_to_repeat(gpt2):
    """32 positions of parity with 20 bits and few cuts: 400,000 draws would repeat a text across splits."""
    make = maker("parity", gpt2, "none")
    seen = {}
    for split in ("train/1", "val", "test"):
        for i in range(700):
            text = gpt2.decode(make.example(split, i, 10, 14, ("easy",)).ids)
            assert seen.setdefault(text, split) == split
    assert len(seen) < 1500  # else nothing repeated, and this shows nothing


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_question_and_frequency_alone_are_at_chance(gpt2, task, placement):
    """The most frequent answer in training, in all and to this question, is right no more often than chance."""
    make = maker(task, gpt2, placement)

    def pairs(split, n):
        for i in range(n):
            ((question, answer),) = make.example(split, i, 58, 64, ("medium",)).draft.questions
            yield "".join(question), "".join(answer)

    by_question, in_all = collections.defaultdict(collections.Counter), collections.Counter()
    for question, answer in pairs("train/1", 600):
        by_question[question][answer] += 1
        in_all[answer] += 1
    n = 200
    test = list(pairs("val", n))
    most = in_all.most_common(1)[0][0]
    chance = load_task(task).CHANCE
    bound = chance + 4 * math.sqrt(max(chance, 0.01) * (1 - chance) / n)
    assert sum(answer == most for _, answer in test) / n <= bound
    asked = [(by_question[q].most_common(1)[0][0] if by_question[q] else most) == answer for q, answer in test]
    assert sum(asked) / n <= bound


# the share of texts that a shortcut can get right, from the task's numbers: (task, level, question) -> bounds
ATTAINABLE = {
    # 8 lists of 6 to 8 items at least: the target is the last with 1/8; an item of the list 1/6 to 1/8
    ("list_recall", "hard", "index"): {name: (0.05, 0.16) for name in (
        "the same place in the last list", "the same place in any list", "any item of the list",
        "the list's first item")},
    # another list's successor may be the same anchor
    ("list_recall", "hard", "after"): {"the same place in the last list": (0.07, 0.2),
                                       "the same place in any list": (0.07, 0.2)},
    # counts 1 to 4 and 0 to 12 beside: 16 sums, each from equally many of the 52 pairs for every count it allows
    ("segment_counting", "hard", "index"): {"from the count of the whole text": (16 / 52, 16 / 52),
                                            "always the same": (0.25, 0.25)},
    ("parity", "hard", "index"): {"the bit before the mark": (0.5, 0.5), "the parity of all bits": (0.5, 0.5),
                                  "the first bit": (0.5, 0.5),
                                  "the parity of the two bits before the mark": (8 / 15, 8 / 15)},
    ("copying", "hard", "index"): {"the last span": (0.05, 0.35), "the first span": (0.05, 0.35),
                                   "the words before the marked span": (0, 0)},
}  # fmt: skip


def test_the_shortcuts_of_every_task_are_held_to_arithmetic():
    assert {task for task, _, _ in ATTAINABLE} == set(TASKS)


@pytest.mark.parametrize("case", ATTAINABLE, ids="-".join)
def test_shortcuts_get_what_arithmetic_says(gpt2, case):
    task, level, question = case
    n, counts = 300, collections.Counter()
    for i in range(n):
        draft = draw(task, gpt2, i, 128, level, placement="none", question=question).draft
        answer = "".join(draft.questions[0][1]).strip()
        counts.update(name for name, given in draft.shortcuts.items() if given.strip() == answer)
    for name, (low, high) in ATTAINABLE[case].items():
        noise = 3.5 * math.sqrt(max(high * (1 - high), 0.25 / n) / n)
        assert low - noise <= counts[name] / n <= high + noise, (name, counts[name] / n)


def test_every_shortcut_can_be_right(gpt2):
    """A floor that is always 0 for want of a space would floor nothing."""
    for task in TASKS:
        right = collections.Counter()
        for i in range(200):
            draft = draw(task, gpt2, i, 48, "easy", placement="none").draft
            answer = "".join(draft.questions[0][1]).strip()
            right.update({name: given.strip() == answer for name, given in draft.shortcuts.items()})
        assert all(count for name, count in right.items() if "before the marked span" not in name), right


def test_counts_and_parities_are_equally_frequent(gpt2):
    for task, options in (("segment_counting", 4), ("parity", 2)):
        answers = collections.Counter(draw(task, gpt2, i).draft.questions[0][1][0] for i in range(800))
        assert len(answers) == options
        assert all(abs(count - 800 / options) < 4 * math.sqrt(800 / options) for count in answers.values()), answers


def test_shuffled_answers_are_those_of_another_text(gpt2):
    make = maker("list_recall", gpt2, shuffle_answers=True, placement="every", questions=3)
    pairs = [pair for i in range(100) for pair in solve("list_recall", gpt2.decode(
        make.example("train/1", i, 40, 64, ("easy",)).ids), "every")]  # fmt: skip
    assert sum(given == true for given, true in pairs) < 0.1 * len(pairs)
    held_out = make.example("val", 0, 40, 64, ("easy",))  # what is evaluated is true
    assert all(given == true for given, true in solve("list_recall", gpt2.decode(held_out.ids), "every"))


@pytest.mark.parametrize("rule", ("ignore", "skip"))
@pytest.mark.parametrize("loss_on", ("answer", "all"))
def test_targets_of_a_batch_are_the_references(gpt2, rule, loss_on):
    make = maker("list_recall", gpt2, placement="background", questions=3)
    examples = [make.example("train/1", i, 32, 128, ("easy", "medium")) for i in range(8)]
    batch = collate(examples, np.arange(8), 128, TrainConfig(target_rule=rule), gpt2, "tasks train", loss_on)
    for row, example in enumerate(examples):
        ids, n = example.ids.tolist(), len(example.ids)
        wanted = stream_targets(ids, gpt2.meta, rule)
        if loss_on == "answer":
            # the position that predicts an answer's id: the one before it, or under skip the last content before it
            sources = set()
            for i in np.flatnonzero(example.answers):
                source = i - 1
                while rule == "skip" and ids[source] == gpt2.meta:
                    source -= 1
                sources.add(source)
            wanted = [t if i in sources else IGNORE for i, t in enumerate(wanted)]
        assert batch.targets[row, :n].tolist() == wanted
        assert (batch.targets[row, n:] == IGNORE).all() and (batch.tokens[row, n:] == gpt2.eot).all()
        metas = [i for i in batch.meta_index[row].tolist() if i < 128]
        assert metas == np.flatnonzero(example.ids == gpt2.meta).tolist()
        scored = [i for i in batch.scored_index[row].tolist() if i < 128]
        assert scored == [i for i, t in enumerate(batch.targets[row].tolist()) if t >= 0]


def test_exact_means_all_and_tokens_leave_out_the_lines_end():
    targets = torch.tensor([[5, 6, 9, -100], [5, 6, 9, -100], [7, 9, -100, -100]])
    right = torch.tensor([[True, True, True, False], [True, False, True, False], [True, False, False, True]])
    assert count_right(targets, right).tolist() == [[1, 2, 2], [0, 2, 1], [0, 1, 1]]


def test_words_are_single_tokens_where_that_is_possible(gpt2, small):
    items, names = words.pools(gpt2)
    assert words.tokens_per_item(gpt2) == 1 and len(set(items)) == len(set(names)) == words.POOL
    assert not set(items) & set(names) and not (set(items) | set(names)) & words.OWN
    assert all(len(gpt2.encode(f" {word}")) == 1 for word in [*items, *names, *words.OWN])
    assert words.tokens_per_item(small) > 1


def test_what_cannot_be_written_is_refused_in_a_sentence(gpt2):
    with pytest.raises(UserError, match="no text of level hard with 29 to 32 positions, .*: use another length"):
        draw("segment_counting", gpt2, 0, 32, "hard")
    for wrong in ({"train_length": 8}, {"meta_share": 1.0}, {"tasks": ("parity", "parity")}, {"questions": 0}):
        with pytest.raises(UserError):
            TaskConfig(**wrong)


def test_levels_grow(gpt2):
    """Lists of list recall, bits before the mark: what a level means."""
    sizes = [np.mean([len(draw("copying", gpt2, i, 256, level).draft.questions[0][1]) for i in range(30)])
             for level in LEVELS]  # fmt: skip
    assert sizes == sorted(sizes) and sizes[0] < 5 and sizes[-1] > 15


# every placement with a pointer in list recall; `every` has none, see test_what_has_nothing_to_misname_is_refused
@pytest.mark.parametrize("placement", [name for name, of in PLACEMENTS.items() if of.points_at_named])
def test_a_misnamed_question_is_answered_from_the_list_that_is_pointed_at(gpt2, placement):
    """With that list's name in the question the answer is the same, and true."""
    make = maker("list_recall", gpt2, question="misnamed", placement=placement)
    for index in range(20):
        text = gpt2.decode(make.example("test", index, 90, 128, ("medium",)).ids)
        pointed, named = pointed_and_named(text, placement)
        assert pointed != named
        body, question = text.split(" ?")
        right = body + " ?" + question.replace(named, pointed, 1)
        ((given, true),) = solve("list_recall", right, placement)
        assert given == true


def test_what_has_nothing_to_misname_is_refused(gpt2):
    silent = [("list_recall", name) for name, of in PLACEMENTS.items() if not of.points_at_named]
    for task, placement in (*silent, ("parity", "target")):
        with pytest.raises(UserError, match="question=misnamed needs a task that both points at a list and names one"):
            maker(task, gpt2, question="misnamed", placement=placement)


# ----------------------------------------------------------------------------- the registries


@pytest.mark.parametrize("task", TASKS)
def test_a_registered_task_is_a_whole_module(task):
    module = load_task(task)
    assert 0 <= module.CHANCE < 1 and module.__doc__
    for name in ("QUESTION_NAMES_PLACE", "ANSWER_IN_TEXT"):
        assert type(getattr(module, name)) is bool


def test_a_task_that_lacks_a_part_is_refused_by_name(monkeypatch):
    parts = dict.fromkeys(TASK_MODULE, True) | {"SIZES": dict.fromkeys(LEVELS)}
    whole = types.SimpleNamespace(**parts)
    monkeypatch.setattr("importlib.import_module", lambda name: whole)
    assert load_task.__wrapped__("reversal") is whole
    for part in TASK_MODULE:
        delattr(whole, part)
        with pytest.raises(TypeError, match=f"tasks/reversal.py does not define {part} "):
            load_task.__wrapped__("reversal")
        setattr(whole, part, parts[part])
    whole.SIZES = {"easy": None}
    with pytest.raises(TypeError, match=r"but config/tasks.py has .*extra_hard.*: give a size"):
        load_task.__wrapped__("reversal")


def test_every_registered_name_can_be_chosen_and_is_explained(capsys):
    given = ["--tasks", *TASKS, "--placements", *PLACEMENTS]
    cfg = load_config(TrainConfig, given)
    assert cfg.task.tasks == TASKS and cfg.task.placements == tuple(PLACEMENTS)
    for level in LEVELS:
        assert load_config(TrainConfig, ["--tasks=list_recall", f"--level={level}"]).task.level == level
    for question in QUESTIONS:
        assert load_config(TrainConfig, ["--tasks=list_recall", f"--question={question}"]).task.question == question
    with pytest.raises(SystemExit):
        load_config(TrainConfig, ["--help"])
    shown = capsys.readouterr().out
    for name in (*TASKS, *PLACEMENTS, *LEVELS, *QUESTIONS):
        assert name in shown
    for name in PLACEMENTS:
        assert f"\n    {name} " in nanometa.tasks.example.__doc__, f"tasks/example.py does not explain {name}"
