"""Configurations as text: what each preset changes, and where each setting of a run comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rsm_common.commandline import aligned
from rsm_train.algorithms.common import AlgorithmConfig
from rsm_train.algorithms.registry import ALGORITHMS
from rsm_train.config import PRESETS, RunConfig, preset_settings


def describe_presets() -> str:
    """Every preset: its description, and the settings that it changes, from the default to its value."""
    return "\n\n".join(_describe_preset(name) for name in PRESETS)


def describe_run(
    given: Mapping[str, Any],
    run: RunConfig,
    algorithm: AlgorithmConfig,
    origins: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Every setting of a resolved configuration, its value and where that comes from.

    Args:
        given: the settings of the command line; None means not given.
        run: what they resolve to.
        algorithm: likewise.
        origins: of settings that come from elsewhere, by name.
    """
    preset = preset_settings(run.preset, run.algo)

    def origin(name: str) -> str:
        if name in origins:
            return origins[name]
        if given.get(name) is not None:
            return "command line"
        return f"preset {run.preset}" if name in preset else "default"

    tables = []
    for title, config in (("run", run), (run.algo, algorithm)):
        values = dataclasses.asdict(config)
        rows = [[title, "value", "from"], *([name, text(v), origin(name)] for name, v in values.items())]
        tables.append(aligned(rows, left=3))
    return "\n\n".join(tables)


def text(value: Any) -> str:
    """A setting as it is shown: 12,000, 0.0003, on, - for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _describe_preset(name: str) -> str:
    having = [algo for algo in ALGORITHMS if name in ALGORITHMS[algo].presets]
    algorithms: dict[tuple[str, str, str], list[str]] = {}
    for algo in having:
        config = ALGORITHMS[algo].Config
        defaults = {item.name: item.default for cls in (RunConfig, config) for item in dataclasses.fields(cls)}
        for setting, value in preset_settings(name, algo).items():
            if defaults[setting] != value:
                key = (setting, text(defaults[setting]), text(value))
                algorithms.setdefault(key, []).append(algo)
    only = "" if len(having) == len(ALGORITHMS) else f" ({', '.join(having)})"
    title = f"{name}{only}: {PRESETS[name].description}"
    if not algorithms:
        return title
    # A setting that is the same for every algorithm of the preset needs no name of one.
    rows = [
        [setting, default, "->", value, "" if len(algos) == len(having) else ", ".join(algos)]
        for (setting, default, value), algos in algorithms.items()
    ]
    return f"{title}\n\n{aligned([['setting', 'default', '', name, ''], *rows], left=5)}"
