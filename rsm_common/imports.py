"""Import of a user's own code by name: "module:attribute", from the working directory too."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from rsm_common.errors import ConfigError


def import_attribute(module: str, attribute: str, option: str) -> Any:
    """The attribute of a module, which is looked for in the working directory last.

    Args:
        module: dotted name.
        attribute: its name in the module.
        option: the option that names it, for the message.

    Raises:
        ConfigError: the module cannot be imported, or has no such attribute.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the module's own code may raise anything
        raise ConfigError(
            f"wanted {option} with a module that can be imported, got {type(error).__name__}: {error}; "
            "start in the directory of the module, or correct the module"
        ) from error
    if not hasattr(found, attribute):
        raise ConfigError(
            f"wanted {option} with a name that module {module} defines, got {attribute!r}; correct the name"
        )
    return getattr(found, attribute)
