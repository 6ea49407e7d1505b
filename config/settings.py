"""Declares settings: the default value, when a setting has an effect, and whether a resumed run may change it."""

import dataclasses
from collections.abc import Iterable, Mapping

from nanometa.common.errors import UserError
from nanometa.config.checks import flat, flat_fields, hidden_fields

SET = "set"  # condition: any value except None, False, 0 and empty ones
EMPTY = ((), "")  # condition: an empty tuple or text


def setting(default, *, only_with: Mapping | None = None, on_resume: str = "may not change", alone: bool = False):
    """Returns a dataclass field with a default.

    only_with: conditions {name of another setting: accepted values, or SET}. This setting has an effect if at least one
    condition is met; for a setting that is a tuple, one accepted item is enough. Without conditions it always has an
    effect. on_resume: "may change", "may not change", "a branch may change" (a resumed run may not, but one that
    branch_from starts may), or "ignored" if a resumed run does not depend on it.
    alone: if this setting is given, no other setting has an effect."""
    return dataclasses.field(
        default=default, metadata={"only_with": only_with or {}, "on_resume": on_resume, "alone": alone}
    )


class Settings:
    """Base class of settings. An instance remembers which arguments its constructor was called with."""

    def __new__(cls, *args, **given):
        self = super().__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        object.__setattr__(self, "_given", frozenset([*names[: len(args)], *given]))
        return self


def named_settings(config: Settings) -> set[str]:
    """Returns the flat names of the settings that the author of `config` set explicitly.

    These are the arguments of its constructor, even those equal to their defaults. dataclasses.replace passes every
    field, so after a call with all fields, only those count that differ from their defaults."""
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
    """Returns the reason why a setting has no effect in `config`, or None if it has an effect."""
    conditions = flat_fields(type(config))[name].metadata.get("only_with", {})
    values = flat(config)
    # a setting without an effect counts as not given: it meets the condition EMPTY, and no other one
    if not conditions or any(
        accepted == EMPTY if why_idle(config, other) else _fulfils(values[other], accepted)
        for other, accepted in conditions.items()
    ):
        return None
    for other, accepted in conditions.items():
        if _fulfils(values[other], accepted):
            return why_idle(config, other)
    needed = " or ".join(_describe(other, accepted, values[other]) for other, accepted in conditions.items())
    found = " and ".join(f"{other}={_text(values[other])}" for other in conditions)
    return f"it is only used {needed}, but {found}"


def refuse_idle(config, typed: Iterable[str]) -> None:
    """Raises UserError if a setting that the command line gave has no effect in `config`."""
    declared, values = flat_fields(type(config)), flat(config)
    for name in typed:
        if reason := why_idle(config, name):
            raise UserError(f"--{name} has no effect: {reason}; leave --{name} out, or change the other setting.")
        if declared[name].metadata.get("alone") and values[name] and (others := [n for n in typed if n != name]):
            raise UserError(f"--{others[0]} has no effect with --{name}: leave one of them out.")


def _fulfils(value, accepted) -> bool:
    """Returns whether the value of a setting meets a condition of only_with."""
    if accepted == SET:
        return bool(value)
    return value in accepted or (isinstance(value, tuple) and any(item in accepted for item in value))


def _describe(other: str, accepted, value) -> str:
    """Returns a condition as text, such as "with --position=rope". value: the present value of the setting."""
    if accepted == SET:
        return f"with --{other}" + (" above 0" if type(value) in (int, float) else "")
    choices = "|".join(_text(value) for value in accepted if value != ())  # () stands for an unset value
    return f"without --{other}" if accepted == EMPTY else f"with --{other}={choices}"


def _text(value) -> str:
    """Returns the value of a setting as text."""
    return " ".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value) or "''"
