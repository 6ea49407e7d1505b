"""Reads the settings of a command from a config file and its --name=value arguments, and handles its errors.

    python train.py config/tiny_meta.py --n_layer=6 --learning_rate=3e-4 --compile=False

A config file is Python code that defines `config = TrainConfig(...)` or PrepareConfig, and that code is executed.
The arguments need no prefix, because field names are unique over the nested dataclasses (tests/test_config.py).
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import re
import runpy
import sys
import typing
from pathlib import Path

import tyro

import nanometa.config
from nanometa.common.errors import UserError, in_words, report
from nanometa.common.interrupts import end_at_once, was_interrupted
from nanometa.common.memory import keep_freed_memory
from nanometa.common.terminal import reader_has_ended, write_line
from nanometa.config import GPTConfig, PrepareConfig, SampleConfig, TaskConfig, TrainConfig
from nanometa.config.checks import bool_names, field_names, flat_fields, hidden_fields, nearest_name, type_name
from nanometa.config.settings import Settings, named_settings, refuse_idle

# Settings of all commands whose values are paths. tests/test_config.py fails for a text setting that it does not know.
PATHS = frozenset(
    {
        "branch_from", "dataset", "evaluator", "evaluator_dataset", "extra_files", "files", "hf_dataset", "init_from",
        "inspect", "merge", "out_dir", "output", "plan", "prompt_file", "run", "runs", "scorer", "tokenizer",
        "val_files",
    }
)  # fmt: skip


def run_cli(main) -> None:
    """Runs main(argv) of a command and exits.

    A UserError is printed as one line, and the exit status is then 2. An interruption, by SIGINT or a KeyboardInterrupt
    for another signal, is one line too, with status 130."""
    keep_freed_memory()
    open_streams()
    status = 1
    try:
        status = _exit_status(main)
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not reader_has_ended():
            raise  # the pipe is another one, such as that to a worker process
        # The reader of the output, such as head, has ended, or the disk is full. The shutdown of the interpreter would
        # try to write the rest again, and complain.
        os._exit(status or 1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # DDP keeps gloo's threads alive beyond destroy_process_group. If one of them frees a tensor during the shutdown
        # of the interpreter, the process aborts (seen in 4 of 99 runs of two processes): exit without that shutdown.
        os._exit(status)
    sys.exit(status)


def open_streams() -> None:
    """Makes every text printable: characters that the output's encoding lacks are escaped, such as \\u2026. A stream
    that the shell closed (>&-) is replaced by the null device."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", errors="backslashreplace"))
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit_status(main) -> int:
    """Returns the exit status of main(argv), after printing the reason for a failure.

    Raises BrokenPipeError if the reader of the output has ended, and any error that is a fault of the code."""
    status = 0
    try:
        try:
            main(sys.argv[1:])
        except SystemExit as end:  # --help
            status = end.code or 0
        sys.stdout.flush()  # shows that a disk is full
        return status
    except Exception as error:
        words = in_words(error)
        if words is not None:
            report(words)
            return 2
        if not was_interrupted(error):
            raise
        # An exception in the middle of a library's work, such as waiting for a lock, can cause another one.
        end_at_once()
        write_line(f"interrupted ({type(error).__name__}: {error})", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        end_at_once()
        write_line("interrupted", file=sys.stderr)
        return 130


def run_named(argv: list[str], kinds: dict[str, tuple], kind: str, about: str) -> None:
    """Calls the function that argv[0] names, with the settings that the rest of argv gives.

    kinds: {name: (class of settings, function)}. kind: the noun for error messages. about: the help text, which is
    printed if argv is empty or asks for help. Raises UserError for an unknown name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(about.strip() + f"\n\nEach of {', '.join(kinds)} has its own --help.")
        return
    name, *rest = argv
    if name not in kinds:
        raise UserError(f"there is no {kind} {name!r}: {nearest_name(name, list(kinds))}")
    settings, function = kinds[name]
    function(load_config(settings, rest, prog=f"{Path(sys.argv[0]).name} {name}"))


def load_config(cls, argv: list[str], config_file: bool = False, default=None, prog: str | None = None):
    """Returns an instance of cls with the settings that argv gives as --name=value.

    If config_file, argv may begin with the path of a config file. default: an instance with the values of all settings
    that are not given; None = the defaults of cls. prog: name of the program in --help; None = the file that was
    started. Raises UserError if a setting of the command line is unknown, has a value of the wrong type, or has no
    effect. Settings of the config file may lose their effect through the command line."""
    named: set[str] = set()
    has_file = config_file and bool(argv) and not argv[0].startswith("-")
    if has_file:
        default, named = read_config_file(cls, argv[0])
        argv = argv[1:]
    known = field_names(cls)
    argv = spell_out_flags(argv, cls)
    given = names_in(argv)
    if config_file and "config" in given:
        raise UserError("unknown setting --config: give the config file as the first argument, without --config=.")
    check_names(given, known)
    if "--help" in argv or "-h" in argv:
        join_help_lines(cls)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                cls,
                prog=prog,
                default=default,
                args=argv,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        # tyro prints a box, drawn with "-" where UTF-8 is missing; the first paragraph after its title is the reason
        lines = [line.strip("│╭╮╰╯ ") for line in complaint.getvalue().splitlines()[1:]]
        paragraphs = itertools.groupby(lines, key=lambda line: bool(line.strip("─-")))
        sentence = next((" ".join(text) for is_text, text in paragraphs if is_text), "").rstrip(" .")
        if (found := re.search(r"--(\w+)", sentence)) and found[1] in given:
            sentence = _invalid_value(cls, found[1], argv)
        raise UserError(f"{sentence}; --help lists all settings.") from None
    if unknown:
        cure = "give settings as --name=value."
        if config_file and unknown[0].endswith(".py"):
            cure = "give only one config file." if has_file else "the config file must be the first argument."
        elif "run" in known and os.path.isdir(unknown[0]):
            cure = f"did you mean --run={unknown[0]}?"
        raise UserError(f"unexpected argument {unknown[0]!r}: {cure}")
    config = with_home(config)
    # the model settings of the base run are not known yet; base_run.py later compares them with the given ones
    takes_over = isinstance(config, TrainConfig) and config.takes_over
    refuse_idle(config, [name for name in given if not (takes_over and name in field_names(GPTConfig))])
    about = {"typed": tuple(sorted(named.union(given))), "given": tuple(given)}
    return dataclasses.replace(config, **{name: about[name] for name in about if name in hidden_fields(cls)})


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses a command line in one sentence, as load_config does."""

    def __init__(self, **about):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **about)

    def parse_args(self, args: list[str], namespace=None):
        """Returns the values of the arguments. Raises UserError for a bad command line."""
        names = [name for action in self._actions for name in action.option_strings]
        check_names(names_in(args), [name[2:].replace("-", "_") for name in names if name.startswith("--")])
        return super().parse_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message}; --help lists all arguments.")


def path_argument(text: str) -> Path:
    """Returns an argument of a Parser that is a path, with ~ expanded."""
    return Path(in_home(text))


def names_in(argv: list[str]) -> list[str]:
    """Returns the names of the settings --name or --name=value in argv, with _ in place of -."""
    return [arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")]


def check_names(given: list[str], known: list[str]) -> None:
    """Raises UserError for a setting that is unknown or given twice."""
    for name in given:
        if name not in known + ["help"]:
            raise UserError(f"unknown setting --{name}: {nearest_name(name, known)}")
        if given.count(name) > 1:
            raise UserError(f"--{name} is given {given.count(name)} times: give it once.")


def with_home(config):
    """Returns the settings with ~ expanded in every path, because a shell does not expand it in --name=~/x."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in PATHS}
    expanded = {
        name: tuple(map(in_home, value)) if isinstance(value, tuple) else in_home(value)
        for name, value in values.items()
    }
    return config if expanded == values else dataclasses.replace(config, **expanded)


def in_home(path: str) -> str:
    """Returns a path with a leading ~ or ~USER replaced by that home folder. Raises UserError if it is not known."""
    try:
        found = os.path.expanduser(path)
    except ValueError:  # a zero byte
        found = path
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(
            f"the home folder {user} in {path!r} is not known: give the full path, or ./{path} for a name that starts "
            f"with ~."
        )
    return found


def _invalid_value(cls, name: str, argv: list[str]) -> str:
    """Returns the sentence that the value of the setting `name` in argv does not have the type of the setting."""
    words = itertools.dropwhile(lambda arg: arg.split("=")[0].replace("-", "_") != f"__{name}", argv)
    first, *rest = words
    values = [first.partition("=")[2], *itertools.takewhile(lambda arg: not arg.startswith("--"), rest)]
    value = " ".join(filter(None, values))
    what = f"--{name}={value} is invalid" if value else f"--{name} has no value"
    return f"{what}: it must be {type_name(flat_fields(cls)[name].type, value.split())}"


def join_help_lines(cls) -> None:
    """Joins the lines of the docstring of every setting of cls, because tyro would print them with line breaks."""
    from docstring_parser import parse_from_object  # installed with tyro, and only needed here

    hints, docs = typing.get_type_hints(cls), {doc.args[1]: doc.description for doc in parse_from_object(cls).params}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            join_help_lines(hints[field.name])
        elif docs.get(field.name):
            field.metadata = {**field.metadata, "help": " ".join(docs[field.name].split())}


def spell_out_flags(argv: list[str], cls) -> list[str]:
    """Returns argv with every bool setting that has no value, --name, spelled out as --name=True."""
    bools, out = bool_names(cls), []
    for arg, following in itertools.pairwise([*argv, "--"]):
        bare = arg.startswith("--") and arg[2:].replace("-", "_") in bools and following.startswith("--")
        out.append(f"{arg}=True" if bare else arg)
    return out


def recipes(folder: Path) -> list[Path]:
    """Returns the sorted config files of a folder, which are the Python files that define `config`."""
    return sorted(path for path in folder.glob("*.py") if "\nconfig = " in path.read_text(errors="replace"))


@contextlib.contextmanager
def _importable_as_config():
    """Makes nanometa.config importable as `config` within a with block, hiding any other module of that name.

    Config files of users contain `from config import TrainConfig`. Afterwards `config` means what it meant before."""

    def named_config() -> dict:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "config"}

    foreign = named_config()
    for name in foreign:
        del sys.modules[name]
    sys.modules["config"] = nanometa.config
    try:
        yield
    finally:
        for name in named_config():
            del sys.modules[name]
        sys.modules.update(foreign)


def read_config_file(cls, path: str) -> tuple:
    """Returns the `config` that a file defines, and the names of the settings that the file sets.

    Raises UserError if the file is missing, fails, or does not define a `config` of class cls."""
    path = in_home(path)
    if not os.path.isfile(path):  # also False for text that cannot be a path
        here = [str(config) for config in recipes(Path("config"))]
        elsewhere = "run this in the folder of the repository, which contains config/, or give the file's full path."
        raise UserError(f"there is no config file {path!r}: {nearest_name(path, here) if here else elsewhere}")
    try:
        with _importable_as_config():
            config = runpy.run_path(path).get("config")
    except TypeError as error:  # TrainConfig(learing_rate=...)
        found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if not found:
            raise UserError(f"{path} fails with TypeError: {error}; correct the file.") from error
        owner, name = found.groups()
        owner_class = {c.__name__: c for c in (GPTConfig, TaskConfig, TrainConfig, PrepareConfig, SampleConfig)}.get(
            owner
        )
        nested = {GPTConfig: "model", TaskConfig: "task"} if owner_class is TrainConfig else {}
        # on a command line, these settings are not nested, so the mistake is common
        for part, argument in nested.items():
            if name in field_names(part):
                raise UserError(
                    f"{path}: TrainConfig has no setting {name!r}, because it belongs to {part.__name__}: write "
                    f"{argument}={part.__name__}({name}=...)."
                ) from None
        known = [f.name for f in dataclasses.fields(owner_class)] if owner_class else []
        raise UserError(f"{path}: {owner} has no setting {name!r}: {nearest_name(name, known)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} fails with {type(error).__name__}: {error}; correct the file.") from error
    if not isinstance(config, cls):
        found = "it defines no config" if config is None else f"its config is of type {type(config).__name__}"
        raise UserError(f"{path} must define `config = {cls.__name__}(...)`, but {found}.")
    named = named_settings(config) if isinstance(config, Settings) else set()
    if isinstance(config, TrainConfig) and not config.run_name:
        config = dataclasses.replace(config, run_name=Path(path).stem)
    if isinstance(config, PrepareConfig) and not config.recipe:
        config = dataclasses.replace(config, recipe=Path(path).stem)
    return config, named
