"""Tests what all commands do with paths, and with arguments that argparse reads."""

import dataclasses
import typing
from pathlib import Path

import pytest

from nanometa.common.errors import UserError
from nanometa.config import PrepareConfig, SampleConfig, TrainConfig
from nanometa.config.checks import field_names
from nanometa.config.command_line import PATHS, Parser, load_config, path_argument
from nanometa.eval import EVALS
from nanometa.interop.export import ExportConfig
from nanometa.probe import PROBES
from nanometa.report import Report
from nanometa.reports import curves
from nanometa.study import COMMANDS
from nanometa.tasks.example import _show
from tests.test_config import schema_hints

CLASSES = (
    TrainConfig, PrepareConfig, SampleConfig, ExportConfig, Report,
    *(cls for cls, _ in (EVALS | PROBES | COMMANDS).values()),
)  # fmt: skip
# settings that are text, but no path
NO_PATHS = {
    "run_name", "accelerator", "text_column", "separator", "hf_config", "hf_split", "hf_revision", "packages", "name",
    "part", "recipe", "prompt", "size", "push_to_hub", "sample_prompt", "license", "language",
}  # fmt: skip


def load(*argv: str, cls=TrainConfig):
    return load_config(cls, list(argv), config_file=cls in (TrainConfig, PrepareConfig))


def test_every_setting_that_is_text_is_known_to_be_a_path_or_not():
    texts = {name for cls in CLASSES for name, hint in schema_hints(cls).items()
             if str in (hint, *typing.get_args(hint)) and name in field_names(cls)}  # fmt: skip
    assert texts == PATHS | NO_PATHS and not PATHS & NO_PATHS
    for cls in CLASSES:  # in nested settings a path would not be found
        own = {field.name for field in dataclasses.fields(cls)}
        assert PATHS & set(field_names(cls)) <= own


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_tilde_is_the_home_folder_in_every_path(home):
    """The shell expands it at the start of a word, but not in --name=~/x."""
    assert load("--out_dir=~/runs", "--dataset=~", "--init_from", "~/a/b").out_dir == f"{home}/runs"
    cfg = load("--out_dir=~/runs", "--dataset=~", "--init_from", "~/a/b")
    assert (cfg.dataset, cfg.init_from, cfg.typed) == (str(home), f"{home}/a/b", ("dataset", "init_from", "out_dir"))
    cfg = load("--source=files", "--files", "~/x/*.txt", "y", cls=PrepareConfig)
    assert cfg.files == (f"{home}/x/*.txt", "y")
    assert load("~/a", "b", "--output=~/c", cls=Report).runs == (f"{home}/a", "b")
    for cls, name in ((SampleConfig, "prompt_file"), *((cls, "output") for cls, _ in (EVALS | PROBES).values())):
        assert getattr(load(f"--{name}=~/x", cls=cls), name) == f"{home}/x"
    (home / "c.py").write_text("from config import TrainConfig\nconfig = TrainConfig(out_dir='~/kept', seed=2)")
    cfg = load("~/c.py")
    assert (cfg.out_dir, cfg.run_name, cfg.typed) == (f"{home}/kept", "c", ("out_dir", "seed"))
    assert path_argument("~/x") == home / "x"


def test_a_tilde_elsewhere_is_an_ordinary_character(home):
    assert load("--out_dir=./~/x~", cls=TrainConfig).out_dir == "./~/x~"
    assert load("--prompt=~/x", cls=SampleConfig).prompt == "~/x"


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "~nobody-of-this-name", "~\0/x", "~\ud800"])
def test_the_home_folder_of_an_unknown_user_is_refused(path):
    for argv, cls in (
        ([f"--out_dir={path}"], TrainConfig), (["--output", path], Report), ([path], TrainConfig),
        (["--source=files", "--files", "a", path], PrepareConfig),
    ):  # fmt: skip
        with pytest.raises(UserError, match="the home folder ~.* is not known: give the full path, or ./~"):
            load(*argv, cls=cls)
    with pytest.raises(UserError, match="the home folder ~.* is not known"):
        curves.main([f"--output={path}"])
    with pytest.raises(UserError, match="the home folder ~.* is not known"):
        _show("parity", [f"--tokenizer={path}"])


# ----------------------------------------------------------------------------- commands that use argparse


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--lengt=64"], "unknown setting --lengt: did you mean 'length'?"),
        (["--len", "64"], "unknown setting --len: "),
        (["--length=64", "--length=128"], "--length is given 2 times: give it once."),
        (["--length=long"], "argument --length: invalid int value: 'long'; --help lists all arguments."),
        (["--level=harder"], "argument --level: invalid choice: 'harder' (choose from"),
        (["--length"], "argument --length: expected at least one argument; --help lists all arguments."),
        (["more"], "unrecognized arguments: more; --help lists all arguments."),
        (["--length=0"], "--length=0 is out of range: it must lie in 1 .. 1048576."),
        (["--length", "64", "-5"], "--length=-5 is out of range"),
        (["--show=0"], "--show=0 is out of range: it must lie in 1 .. 1000000."),
        (["--questions=2"], "--questions has no effect on parity: it is only used by list_recall; leave it out."),
        (["--question=after"], "--question has no effect on parity"),
        (
            ["--tokenizer=nowhere"],
            "tokenizer='nowhere' is unknown: it must be gpt2, or the folder of a",
        ),
        (["--length", "64", "4"], "has no text of level medium with 4 to 4 positions"),
    ],
)
def test_bad_arguments_of_the_tasks_get_one_sentence_before_anything_is_printed(argv, sentence, capsys):
    with pytest.raises(UserError) as refused:
        _show("parity", argv)
    assert sentence in str(refused.value) and capsys.readouterr() == ("", "")


def test_bad_arguments_of_curves_get_one_sentence(capsys):
    for argv, sentence in (
        (["--outptu=x.png"], "unknown setting --outptu: did you mean 'output'?"),
        (["--output"], "argument --output: expected one argument; --help lists all arguments."),
    ):
        with pytest.raises(UserError) as refused:
            curves.main(argv)
        assert str(refused.value) == sentence and capsys.readouterr() == ("", "")


def test_a_parser_accepts_names_with_a_hyphen(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--some-name", type=int)
    assert parser.parse_args(["--some-name=3"]).some_name == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--some-name" in capsys.readouterr().out
