"""Environment ids: a check that does not create the environment, and the ids of environments without one."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from pathlib import Path

_FACTORY = re.compile(r"<factory (.+)>")


def unknown_env(env_id: str, cutoff: float = 0.6) -> str | None:
    """A sentence about an id that Gymnasium does not know; None if it knows the id.

    None too where Gymnasium is not installed, so that the id cannot be checked. Of "module:EnvId" the module
    is imported, as it registers its environments.

    Args:
        env_id: such as "HalfCheetah-v5" or "module:EnvId".
        cutoff: similarity, 0 to 1, from which a known id is named as the one that was meant.
    """
    try:
        import gymnasium as gym
    except ImportError:
        return None

    module, _, name = env_id.rpartition(":")
    if module:
        look_in_working_directory(env_id)
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            return f"the module of environment {env_id!r} cannot be imported ({type(error).__name__}: {error})"
    try:
        gym.spec(name)
    except gym.error.Error:
        close = difflib.get_close_matches(name, gym.registry, n=3, cutoff=cutoff)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        return f"Gymnasium knows no environment {env_id!r}{meant}"
    return None


def look_in_working_directory(env_id: str) -> None:
    """Let the module of "module:EnvId" be found where the command runs, after all installed packages."""
    here = str(Path.cwd())
    if ":" in env_id and not {here, ""} & set(sys.path):
        sys.path.append(here)


def factory_env_id(name: str) -> str:
    """The id that stands for the environments of a Python function: "<factory module:function>".

    No registered id has such brackets. Only a program that has the function can create the environment.
    """
    return f"<factory {name}>"


def factory_name(env_id: str) -> str | None:
    """ "module:function" of "<factory module:function>"; None for an id that can be registered."""
    match = _FACTORY.fullmatch(env_id)
    return match[1] if match else None
