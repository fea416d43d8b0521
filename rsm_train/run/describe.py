"""Configurations as text: what each preset changes, and where each setting of a run comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rsm_common.commandline import aligned
from rsm_train.config import ALGORITHM_CONFIGS, PRESETS, AlgorithmConfig, Preset, RunConfig


def describe_presets() -> str:
    """Every preset: its description, and the settings that it changes, from the default to its value."""
    return "\n\n".join(_describe_preset(name, preset) for name, preset in PRESETS.items())


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
    preset = PRESETS[run.preset].of(run.algo)

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


def _describe_preset(name: str, preset: Preset) -> str:
    algorithms: dict[tuple[str, str, str], list[str]] = {}
    for algo in preset.algorithms:
        config = ALGORITHM_CONFIGS[algo]
        defaults = {item.name: item.default for cls in (RunConfig, config) for item in dataclasses.fields(cls)}
        for setting, value in preset.of(algo).items():
            if setting in defaults and defaults[setting] != value:
                key = (setting, text(defaults[setting]), text(value))
                algorithms.setdefault(key, []).append(algo)
    only = "" if len(preset.algorithms) == len(ALGORITHM_CONFIGS) else f" ({', '.join(preset.algorithms)})"
    title = f"{name}{only}: {preset.description}"
    if not algorithms:
        return title
    # A setting that is the same for every algorithm of the preset needs no name of one.
    rows = [
        [setting, default, "->", value, "" if len(algos) == len(preset.algorithms) else ", ".join(algos)]
        for (setting, default, value), algos in algorithms.items()
    ]
    return f"{title}\n\n{aligned([['setting', 'default', '', name, ''], *rows], left=5)}"
