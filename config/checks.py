"""What settings are checked with: one sentence for bad input, types, and names that are nearly right."""

import dataclasses
import difflib
import math
import re
import types
import typing
from typing import Literal

from nanometa.common.errors import UserError

FOLDER_NAME = "be a folder name of at most 100 letters, digits, '.', '_' and '-', not starting with a dot"


def is_folder_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) is not None


def check(config, name: str, holds: bool, must: str) -> None:
    if not holds:
        raise UserError(f"{name}={getattr(config, name)!r} is out of range: it must {must}.")


def check_types(config) -> None:
    """Every field holds a value of its annotated type (an int is taken for a float).

    Dataclasses do not look at types, and a config file could say n_layer="6"."""
    hints = typing.get_type_hints(type(config))
    for name, hint in hints.items():
        value = getattr(config, name)
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # Literal[..] | None is the second
        options = typing.get_args(hint) if is_union else (hint,)
        if float in options and type(value) is int and abs(value) < 2**1000:  # float() takes no more than 1e308
            object.__setattr__(config, name, float(value))
        elif type(value) is float and not math.isfinite(value):
            raise UserError(f"{name}={value} is out of range: it must be finite.")
        elif not any(_is_a(value, option) for option in options):
            wanted = " or ".join(_type_name(option) for option in options)
            raise UserError(f"{name}={value!r} has the wrong type: it must be {wanted}.")


def _is_a(value, hint) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint  # not isinstance: True is no int here


def _type_name(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return "None" if hint is types.NoneType else str(getattr(hint, "__name__", hint))


def nearest_multiples(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def nearest_name(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}."


def field_names(cls) -> list[str]:
    """All flat names of a config class, nested dataclasses included."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        names += field_names(hint) if dataclasses.is_dataclass(hint) else [name]
    return names


def bool_names(cls) -> list[str]:
    """The flat names of the settings that are True or False."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        names += bool_names(hint) if dataclasses.is_dataclass(hint) else [name] if hint is bool else []
    return names


def to_dict(config) -> dict:
    return dataclasses.asdict(config)


def flat(config) -> dict:
    """All settings by their flat names."""
    settings = to_dict(config)
    return {**settings.pop("model"), **settings.pop("task"), **settings}
