"""Checks of settings that come from Python or from a file: types, and names that are nearly right.

click converts what a command line says. A keyword argument or a value of a file may be anything.
"""

from __future__ import annotations

import difflib
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsm_common.errors import ConfigError

TOML_MODULE = "tomllib" if sys.version_info >= (3, 11) else "tomli"
"""What reads a file of settings."""
NO_VALUE = "none"
"""Text that stands for None where a preset has a value: "none" as `threads` is torch's own number."""

Named = Callable[[str], str]
"""How a user gave a setting: "--total-steps", "total_steps", or "total_steps in 'run.toml'"."""


@dataclass(frozen=True)
class SettingsFile:
    """The settings of a file, which lie between the preset and what is given beside the file."""

    path: str
    """As the user wrote it."""
    settings: Mapping[str, Any]
    """Values by the name of the field."""


def option_name(name: str) -> str:
    """ "--total-steps" of total_steps."""
    return f"--{name.replace('_', '-')}"


def named_in(file: SettingsFile | None, given: Mapping[str, Any], named: Named) -> Named:
    """How each setting was given, where some come from a file.

    Args:
        file: None if there is none.
        given: the settings that are given beside it.
        named: how those are named.
    """

    def name_of(name: str) -> str:
        return named(name) if file is None or name in given else f"{name} in {file.path!r}"

    return name_of


def checked(values: Mapping[str, Any], config: type, named: Named) -> dict[str, Any]:
    """The values, those of a dataclass of settings as the types of its fields want them.

    A whole number may be written as 1e6, and numbers of numpy become Python's.

    Args:
        values: by the name of the field; names that the dataclass does not have are left alone.
        config: the dataclass.
        named: how errors name a setting.

    Raises:
        ConfigError: a value of another type.
    """
    hints = typing.get_type_hints(config)
    return {
        name: _typed(hints[name], value, named(name)) if name in hints else value
        for name, value in values.items()
    }


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was meant; None if none is like it."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), known, n=1)), None)


def _typed(hint: Any, value: Any, name: str) -> Any:
    """The value as its type holds it; types that are not those of settings are not checked."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (part for part in parts if part is not type(None))
        none = value is None or (inner is not str and value == NO_VALUE)
        return None if none else _typed(inner, value, name)
    if origin is typing.Literal:
        if value not in parts:
            raise _wrong(f"one of {', '.join(map(str, parts))}", name, value)
        return value
    if origin is Mapping:
        return _named_values(value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    convert = _CONVERTERS.get(hint)
    return value if convert is None else convert(value, name)


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _wrong("true or false", name, value)
    return bool(value)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise _wrong("a whole number", name, value)
    if isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise _wrong("a whole number", name, value)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong("a number", name, value)
    return float(value)


def _text(value: Any, name: str) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _wrong("text", name, value)
    return text


_CONVERTERS: dict[Any, Callable[[Any, str], Any]] = {
    bool: _boolean,
    int: _whole,
    float: _number,
    str: _text,
}


def _named_values(value: Any, name: str) -> dict[str, Any]:
    """Names and plain values, as the arguments of an environment's constructor are."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong("names with values", name, value)
    for key, entry in value.items():
        if entry is not None and not isinstance(entry, bool | int | float | str):
            raise _wrong("a number, a boolean or text", f"{key} of {name}", entry)
    return dict(value)


def _wrong(wanted: str, name: str, value: Any) -> ConfigError:
    shown = " ".join(f"{value!r:.60}".split())
    return ConfigError(f"wanted {wanted} as {name}, got {shown}; correct the value")
