"""Public names of a package that are imported when they are first used, and its version."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

DISTRIBUTION = "rsm-toolkit"


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package (PEP 562); `__version__` is one of its names.

    Args:
        package: its `__name__`.
        homes: the module of each public name.
    """

    def get(name: str) -> Any:
        if name == "__version__":
            value: Any = toolkit_version()
        elif name in homes:
            value = getattr(import_module(homes[name]), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, "__version__"})

    return get, names


def toolkit_version() -> str:
    """The installed version, such as "0.1.0"; "unknown" for a checkout that was not installed."""
    from importlib import metadata  # slow

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
