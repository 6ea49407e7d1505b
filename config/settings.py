"""Declares settings: the default of each, when it has an effect, and whether a resumed run may change it."""

import dataclasses
from collections.abc import Iterable, Mapping

from nanometa.common.errors import UserError
from nanometa.config.checks import flat, flat_fields, hidden_fields

SET = "set"  # a condition that any value fulfils but None, False, 0 and an empty one
EMPTY = ((),)  # a condition that an empty tuple fulfils


def setting(default, *, only_with: Mapping | None = None, on_resume: str = "may not change", alone: bool = False):
    """Returns a dataclass field with a default.

    only_with: the settings that give this one an effect, as {name: accepted values, or SET}; one of them is enough. Of
    a setting with several values, one accepted value is enough. Without only_with it always has an effect.
    on_resume: "may change", "may not change", or "ignored" if a resumed run does not depend on it.
    alone: no other setting has an effect when this one is given."""
    return dataclasses.field(
        default=default, metadata={"only_with": only_with or {}, "on_resume": on_resume, "alone": alone}
    )


class Settings:
    """Base of the settings of a run: remembers which arguments its constructor was called with."""

    def __new__(cls, *args, **given):
        self = super().__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        object.__setattr__(self, "_given", frozenset([*names[: len(args)], *given]))
        return self


def named_settings(config: Settings) -> set[str]:
    """Returns the flat names of the settings that whoever wrote `config` has named.

    Those are the arguments of its constructor, equal to the defaults or not. dataclasses.replace passes every field, so
    of a call with all fields only those count that differ from the defaults."""
    fields, named = dataclasses.fields(config), set()
    given = config._given if len(config._given) < len(fields) else ()
    for field in fields:
        value = getattr(config, field.name)
        if isinstance(value, Settings):
            named |= named_settings(value)
        elif field.name in given or value != field.default:
            named.add(field.name)
    return named - hidden_fields(type(config))


def why_idle(config, name: str) -> str | None:
    """Returns the reason why a setting has no effect with the others of `config`, or None if it has one."""
    conditions = flat_fields(type(config))[name].metadata.get("only_with", {})
    values = flat(config)
    # a setting that has no effect itself cannot give another one an effect
    if not conditions or any(
        _fulfils(values[other], accepted) and not why_idle(config, other) for other, accepted in conditions.items()
    ):
        return None
    for other, accepted in conditions.items():
        if _fulfils(values[other], accepted):
            return why_idle(config, other)
    needed = " or ".join(_describe(other, accepted, values[other]) for other, accepted in conditions.items())
    found = " and ".join(f"{other}={_text(values[other])}" for other in conditions)
    return f"it is only used {needed}, and {found}"


def refuse_idle(config, typed: Iterable[str]) -> None:
    """Raises UserError if one of the settings that a command line named has no effect with the others."""
    declared, values = flat_fields(type(config)), flat(config)
    for name in typed:
        if reason := why_idle(config, name):
            raise UserError(f"--{name} has no effect: {reason}; leave --{name} out, or change the other.")
        if declared[name].metadata.get("alone") and values[name] and (others := [n for n in typed if n != name]):
            raise UserError(f"--{others[0]} has no effect with --{name}: leave one of them out.")


def _fulfils(value, accepted) -> bool:
    if accepted == SET:
        return bool(value)
    return value in accepted or (isinstance(value, tuple) and any(item in accepted for item in value))


def _describe(other: str, accepted, value) -> str:
    if accepted == SET:
        return f"with --{other}" + (" above 0" if type(value) in (int, float) else "")
    choices = "|".join(_text(value) for value in accepted if value != ())  # () = whatever is the default
    return f"without --{other}" if accepted == EMPTY else f"with --{other}={choices}"


def _text(value) -> str:
    return " ".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value) or "''"
