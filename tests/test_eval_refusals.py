"""Tests that evaluations and probes refuse what they cannot measure before they measure anything."""

from types import SimpleNamespace

import pytest

from nanometa import eval as evaluation
from nanometa import probe
from nanometa.common.errors import UserError
from nanometa.config import TrainConfig, WeightConfig
from nanometa.data.tokenizer import Tokenizer
from nanometa.evals import tasks as tasks_eval
from nanometa.evals.common import _settings
from nanometa.evals.perplexity import MEANING
from nanometa.probes import probe_command
from tests.conftest import tree
from tests.runs import run_on, saved, small_run
from tests.test_positions import MARKED, PLAIN, kept, lines_of


@pytest.fixture
def run(tokenizer, tmp_path, monkeypatch):
    """A run that looks as if it had been trained on parity and list recall; commands that read a text of it fail."""
    kept(small_run(tokenizer, MARKED, position="rope"), tmp_path / "out/r", tasks=("parity", "list_recall"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks_eval, "read", lambda *_: pytest.fail("a cell was measured"))
    return tmp_path / "out/r"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--lengths", "64", "128", "8"], "no text of level easy with 8 to 8 positions"),
        (["--tasks", "parity", "segment_counting", "--level=long", "--lengths=64"], "segment_counting .* has no text"),
        (["--placements", "target", "every", "--question=misnamed", "--tasks=list_recall"], "question=misnamed needs"),
        (["--tasks=parity", "--question=after"], "--question has no effect: it is only used"),
        (["--output=out"], "output=out is a folder, but results are lines of a file: give a file's name."),
    ],
)
def test_all_cells_are_tried_before_the_first_is_measured(run, args, sentence, capsys):
    level = [] if "--level=long" in args else ["--level=easy"]
    before = tree(run)
    with pytest.raises(UserError, match=sentence):
        evaluation.main(["tasks", "--run=out/r", "--n=2", *level, *args])
    assert tree(run) == before and capsys.readouterr().out == ""


def test_a_form_of_question_for_a_run_without_list_recall_is_refused(tokenizer, tmp_path, monkeypatch):
    kept(small_run(tokenizer, MARKED, position="rope"), tmp_path / "out/r", tasks=("parity", "copying"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--question has no effect on parity, copying, the tasks of out/r/.*: leave it"):
        evaluation.main(["tasks", "--run=out/r", "--question=after"])


def test_perplexity_says_what_its_conditions_mean(workdir, tmp_path, capsys):
    folder = saved(run_on(workdir / "data/u", position="rope"), tmp_path / "out/r")
    evaluation.main(["perplexity", f"--run={folder}", "--max_tokens=120"])
    out = capsys.readouterr().out
    assert "The same 121 content tokens are read in every condition, and markers are never scored.\n" in out
    for markers, meaning in MEANING.items():
        assert (f"  {markers:<9}  {meaning}\n" in out) == (markers in ("trained", "none"))


@pytest.mark.parametrize(
    ("data", "markers", "idle"),
    [("u", [], False), ("u", ["trained"], False), ("p", [], True), ("p", ["trained", "none"], True),
     ("p", ["uniform"], False), ("n", [], True)],
)  # fmt: skip
def test_a_number_of_draws_is_refused_if_nothing_is_drawn(workdir, tmp_path, data, markers, idle):
    folder = saved(run_on(workdir / f"data/{data}", position="rope", **NO_SECOND), tmp_path / "out/r")
    command = [
        "perplexity",
        f"--run={folder}",
        "--max_tokens=120",
        "--draws=3",
        *(["--markers", *markers] if markers else []),
    ]
    if not idle:
        return evaluation.main(command)
    with pytest.raises(
        UserError, match="--draws has no effect on .*, because no marker is placed at random: leave it out"
    ):
        evaluation.main(command)


NO_SECOND = {"second_attention": "none"}


@pytest.mark.parametrize("setting", ["--run=out/r", "--tasks=parity", "--seeds=2", "--layers=1", "--lengths=64"])
def test_settings_that_the_self_check_does_not_use_are_refused(setting):
    with pytest.raises(UserError, match=f"{setting.split('=')[0]} has no effect with --known, which reads no run"):
        probe.main(["rate_distortion", "--known", setting])


@pytest.fixture(scope="module")
def small():
    """A tokenizer that splits the word "mark" into several tokens."""
    return Tokenizer.train(["the file is a list of names: one two three four\n" * 50 + "return value zero\n" * 50], 320)


@pytest.mark.parametrize("kind", ["attention", "patching"])
def test_placements_whose_mark_is_several_tokens_are_left_out_by_default(small, tmp_path, monkeypatch, capsys, kind):
    """A zeroed embedding or a patched state is that of one token."""
    monkeypatch.setattr(probe_command, "draw_picture", lambda name, lines: b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    placed = {"tasks": ("parity",), "placements": ("none", "target")}
    folder = kept(small_run(small, MARKED, position="rope"), tmp_path / "out/r", **placed)
    probe.main([kind, "--run=out/r", "--n=12", "--lengths=60", "--level=easy"])
    assert {line["placement"] for line in lines_of(folder / f"{kind}.jsonl")} == {"target"}
    said = capsys.readouterr().out
    assert 'left out: placement none marks places with the word "mark", which is ' in said


@pytest.mark.parametrize(
    ("data", "placements", "cure"),
    [(MARKED, ("none",), "take --placements target or every."), (PLAIN, ("none",), "take a run that was trained with")],
)
def test_a_mark_of_several_tokens_is_refused_with_settings_that_work(
    small, tmp_path, monkeypatch, data, placements, cure
):
    monkeypatch.chdir(tmp_path)
    second = {"second_attention": "meta" if data is MARKED else "none"}
    placed = {"tasks": ("parity",), "placements": placements}
    kept(small_run(small, data, position="rope", **second), tmp_path / "out/r", **placed)
    for typed in ([], ["--placements=none"]):
        with pytest.raises(UserError) as refused:
            probe.main(["attention", "--run=out/r", "--n=3", "--lengths=60", "--level=easy", *typed])
        assert "tokens to the tokenizer of out/r/" in str(refused.value) and cure in str(refused.value)


def test_the_hash_of_settings_tells_trainings_apart_and_not_what_is_shown_of_them():
    """A new setting at its default leaves the hash of older runs as it is: add it to the list in evals/common.py."""

    def hash_of(**changes) -> str:
        return _settings(SimpleNamespace(config=TrainConfig(**changes)))

    assert hash_of() == hash_of(run_name="b", seed=3, tracker="none", sample_interval=9) == "5fb034f213fba4c9"
    others = (
        {"weights": WeightConfig(weighting="dense")},
        {"train_only": "lora"},
        {"batch_size": 96},
        {"scorer": "out/x"},
    )
    assert len({hash_of(), *(hash_of(**changes) for changes in others)}) == 5
