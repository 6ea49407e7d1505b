"""Checks the values and types of settings, and suggests the nearest known name for a misspelled one."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from pathlib import PurePath
from typing import Literal

from nanometa.common.errors import UserError

FOLDER_NAME = "be a folder name of at most 100 letters, digits, '.', '_' and '-', not starting with a dot"


def is_folder_name(name: str) -> bool:
    """Returns whether name satisfies FOLDER_NAME."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) is not None


def check(config, name: str, holds: bool, must: str) -> None:
    """Raises UserError unless `holds`. The message says that the setting `name` is out of range and must `must`."""
    if not holds:
        raise UserError(f"{name}={getattr(config, name)!r} is out of range: it must {must}.")


def check_types(config) -> None:
    """Raises UserError unless every field has a value of its annotated type. Converts an int to float where needed.

    Dataclasses do not check types, and a config file may contain, for example, n_layer="6"."""
    hints = typing.get_type_hints(type(config))
    for name, hint in hints.items():
        value = getattr(config, name)
        options = _options(hint)
        if float in options and type(value) is int and abs(value) < 2**1000:  # float() overflows above 1e308
            object.__setattr__(config, name, float(value))
        elif type(value) is float and not math.isfinite(value):
            raise UserError(f"{name}={value} is out of range: it must be finite.")
        elif not any(_is_a(value, option) for option in options):
            raise UserError(f"{name}={value!r} has the wrong type: it must be {type_name(hint, value)}.")


def _options(hint) -> tuple:
    """Returns the types that a union allows, or the annotated type itself if it is not a union."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # Literal[..] | None is a typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _is_a(value, hint) -> bool:
    """Returns whether value has the annotated type `hint`, which is not a union."""
    if typing.get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint  # not isinstance, because True must not count as an int


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}


def type_name(hint, value=None) -> str:
    """Returns an annotated type in words, for an error message, and the allowed choice that `value` may misspell.

    value: the wrong value, as text or as a list of texts; other values are not compared with the choices."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        wrong = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
        close = [similar_name(str(item).lower(), choices) for item in wrong if item not in choices]
        offer = f" (did you mean {' '.join(filter(None, close))!r}?)" if any(close) else ""
        return "one of " + ", ".join(map(str, choices)) + offer
    if typing.get_origin(hint) is tuple:
        return f"a list, each item of which is {type_name(typing.get_args(hint)[0], value)}"
    options = _options(hint)
    return " or ".join(TYPE_NAMES[option] if option in TYPE_NAMES else type_name(option, value) for option in options)


def nearest_multiples(value: int, step: int) -> str:
    """Returns the positive multiples of step below and above value, as text: "96 or 108"."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


# Short and common names of settings, and the names of our settings, of which the first that a command has is suggested
SHORT_NAMES = {
    "lr": ("learning_rate",), "rate": ("learning_rate",), "max_lr": ("learning_rate",),
    "bs": ("batch_size",), "batch": ("batch_size",), "mbs": ("micro_batch_size",), "wd": ("weight_decay",),
    "gradient_accumulation_steps": ("micro_batch_size",), "grad_accum": ("micro_batch_size",),
    "epochs": ("max_steps", "epochs"), "iters": ("max_steps",), "max_iters": ("max_steps",),
    "steps": ("max_steps", "max_new_tokens"), "n": ("n", "count"), "samples": ("n", "count"),
    "warmup": ("warmup_steps",), "decay_steps": ("lr_decay_steps",), "clip": ("grad_clip",),
    "layers": ("n_layer",), "depth": ("n_layer",), "heads": ("n_head",), "dim": ("n_embd",), "width": ("n_embd",),
    "d_model": ("n_embd",), "hidden_size": ("n_embd",), "d_ff": ("n_inner",),
    "context": ("block_size",), "ctx": ("block_size",), "seq_len": ("block_size",), "window": ("block_size",),
    "length": ("train_length", "lengths", "max_new_tokens"), "max_tokens": ("max_new_tokens", "max_tokens"),
    "opt": ("optimizer",), "sched": ("schedule",), "precision": ("dtype",), "gpus": ("n_accelerators",),
    "data": ("dataset",), "name": ("run_name", "name"), "out": ("out_dir", "output"), "output": ("out_dir", "output"),
    "resume": ("init_from",), "checkpoint": ("init_from", "run"), "ckpt": ("init_from", "run"), "model": ("run",),
    "temp": ("temperature",), "vocab": ("vocab_size", "bpe_vocab_size"),
}  # fmt: skip


def similar_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name that is most similar, or None if none is similar.

    Only the last parts of paths are compared, because a folder in common does not make two names similar."""
    ends = {PurePath(path).name: path for path in known}
    close = difflib.get_close_matches(PurePath(name).name, ends, n=1, cutoff=cutoff)
    return ends[close[0]] if close else None


def similar_path(path: str, known: Iterable[str]) -> str | None:
    """Returns the known path that `path` probably misspells, or None. data/x_none does not misspell data/x_uniform."""
    return similar_name(path, known, cutoff=0.75)


def nearest_name(name: str, known: list[str]) -> str:
    """Returns the end of an error message: the known name that is probably meant, or else all known names."""
    meant = [ours for ours in SHORT_NAMES.get(name.lower(), ()) if ours in known]
    close = meant[0] if meant else similar_name(name, known)
    return f"did you mean {close!r}?" if close else f"known are {', '.join(sorted(known))}."


def hidden_fields(cls) -> set[str]:
    """Returns the names of the fields that are not settings: they are neither on the command line nor saved."""
    return {field.name for field in dataclasses.fields(cls) if field.metadata.get("hidden")}


def flat_fields(cls) -> dict[str, dataclasses.Field]:
    """Returns the fields of all settings by flat name, including those of nested dataclasses."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        found |= flat_fields(hint) if dataclasses.is_dataclass(hint) else {field.name: field}
    return {name: field for name, field in found.items() if name not in hidden_fields(cls)}


def field_names(cls) -> list[str]:
    """Returns the flat names of all settings of a class."""
    return list(flat_fields(cls))


def bool_names(cls) -> list[str]:
    """Returns the flat names of the bool settings."""
    return [name for name, field in flat_fields(cls).items() if field.type is bool]


def to_dict(config) -> dict:
    """Returns the settings as nested dictionaries, in the form in which they are saved."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in hidden_fields(config)}


def flat(config) -> dict:
    """Returns the values of all settings by flat name, those of nested dataclasses first."""
    settings = to_dict(config)
    nested = {name: value for part in settings.values() if isinstance(part, dict) for name, value in part.items()}
    return nested | {name: value for name, value in settings.items() if not isinstance(value, dict)}
