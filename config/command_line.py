"""Command lines: how a config file and --name=value settings fill a dataclass of config, and how a program ends.

    python train.py config/tiny_meta.py --n_layer=6 --learning_rate=3e-4 --compile=False

A config file is Python that defines `config = TrainConfig(...)` or PrepareConfig: running a config is running code.
Overrides are flat: a field's name is unique over the nested dataclasses (tests/test_config.py).
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import runpy
import sys
from pathlib import Path

import tyro

import nanometa.config
from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, PrepareConfig, SampleConfig, TaskConfig, TrainConfig
from nanometa.config.checks import bool_names, field_names, nearest_name
from nanometa.config.settings import Settings, named_settings, refuse_idle


def run_cli(main) -> None:
    """Calls main(argv) of a command-line program and ends the process; a UserError: its sentence and status 2."""
    status = 0
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one voice a machine
            print(f"error: {error}", file=sys.stderr)
        status = 2
    except (OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output (head, say) has gone
            os._exit(1)
        reason = str(error) or "there is not enough memory"
        print(f"error: {reason}: check the path, its permissions and the space that is left.", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # DDP keeps gloo's threads alive beyond destroy_process_group, and one that frees a tensor while the interpreter
        # shuts down aborts the process (seen in 4 of 99 runs of two processes): leave without that shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run_named(argv: list[str], kinds: dict[str, tuple], kind: str, about: str) -> None:
    """Calls what the first of argv names, of kinds name -> (class of its settings, function), with the settings that
    follow it; without a name shows `about`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(about.strip() + f"\n\neach of {', '.join(kinds)} has its own --help")
        return
    name, *rest = argv
    if name not in kinds:
        raise UserError(f"there is no {kind} {name!r}: {nearest_name(name, list(kinds))}")
    settings, function = kinds[name]
    function(load_config(settings, rest, prog=f"{Path(sys.argv[0]).name} {name}"))


def load_config(cls, argv: list[str], config_file: bool = False, default=None, prog: str | None = None):
    """Returns an instance of cls for argv = --name=value ..., after a FILE.py if config_file.

    Raises UserError for a setting on the command line that is unknown, is no value of its type, or has no effect with
    the others. A config file may hold settings that the command line makes idle.
    default: the values of settings that neither names; None = the defaults of cls. prog: what --help calls the
    program; None = the file that was started."""
    named: set[str] = set()
    if config_file and argv and not argv[0].startswith("-"):
        default, named = read_config_file(cls, argv[0])
        argv = argv[1:]
    known = field_names(cls)
    argv = spell_out_flags(argv, cls)
    given = [arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")]
    for name in given:
        if name not in known + ["help"]:
            raise UserError(f"unknown setting --{name}: {nearest_name(name, known)}")
        if given.count(name) > 1:
            raise UserError(f"--{name} is given {given.count(name)} times: leave one.")
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
        # tyro draws a box, or where there is no UTF-8 rules of "-"; its first paragraph after the title is the reason
        lines = [line.strip("│╭╮╰╯ ") for line in complaint.getvalue().splitlines()[1:]]
        paragraphs = itertools.groupby(lines, key=lambda line: bool(line.strip("─-")))
        sentence = next((" ".join(text) for is_text, text in paragraphs if is_text), "").rstrip(" .")
        raise UserError(f"{sentence}; --help lists all settings.") from None
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}: settings are given as --name=value.")
    if isinstance(config, TrainConfig):
        # the model of a run that is taken over is not known yet: base_run.py compares what was typed with it
        from_base = set(field_names(GPTConfig)) if config.takes_over else set()
        refuse_idle(config, [name for name in given if name not in from_base])
        return dataclasses.replace(config, typed=tuple(sorted(named.union(given))))
    refuse_idle(config, given)
    return config


def spell_out_flags(argv: list[str], cls) -> list[str]:
    """argv with --name=True for a bare --name of a bool: one that no value follows."""
    bools, out = bool_names(cls), []
    for arg, following in itertools.pairwise([*argv, "--"]):
        bare = arg.startswith("--") and arg[2:].replace("-", "_") in bools and following.startswith("--")
        out.append(f"{arg}=True" if bare else arg)
    return out


def recipes(folder: Path) -> list[Path]:
    """Returns the config files of a folder, sorted: the Python files that define `config`."""
    return sorted(path for path in folder.glob("*.py") if "\nconfig = " in path.read_text(errors="replace"))


@contextlib.contextmanager
def _importable_as_config():
    """While a config file is read, `from config import TrainConfig` means nanometa.config, whatever else is called so.

    Config files of users say it. Afterwards no module of ours is left under that name."""

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
    """Returns the `config` that a file defines, and the names of the settings that the file named.

    Raises UserError unless it is one of cls."""
    if not os.path.isfile(path):  # False, too, for what can be no path
        here = [str(config) for config in recipes(Path("config"))]
        raise UserError(f"there is no config file {path!r}: {nearest_name(path, here)}")
    try:
        with _importable_as_config():
            config = runpy.run_path(path).get("config")
    except TypeError as error:  # TrainConfig(learing_rate=...)
        found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if not found:
            raise UserError(f"{path} fails: {error}.") from error
        owner, name = found.groups()
        owner_class = {c.__name__: c for c in (GPTConfig, TaskConfig, TrainConfig, PrepareConfig, SampleConfig)}.get(
            owner
        )
        known = [f.name for f in dataclasses.fields(owner_class)] if owner_class else []
        raise UserError(f"{path}: {owner} has no setting {name!r}: {nearest_name(name, known)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} fails with {type(error).__name__}: {error}; correct the file.") from error
    if not isinstance(config, cls):
        raise UserError(f"{path} must define `config = {cls.__name__}(...)`, and defines {type(config).__name__}.")
    named = named_settings(config) if isinstance(config, Settings) else set()
    if isinstance(config, TrainConfig) and not config.run_name:
        config = dataclasses.replace(config, run_name=Path(path).stem)
    if isinstance(config, PrepareConfig) and not config.recipe:
        config = dataclasses.replace(config, recipe=Path(path).stem)
    return config, named
