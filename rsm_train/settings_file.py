"""Settings in a TOML file: what `--config` reads and `--save-config` writes."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rsm_common.commandline import OTHER, require_extra
from rsm_common.errors import ConfigError
from rsm_common.lazy import toolkit_version
from rsm_common.output import write_atomically
from rsm_train.algorithms.common import AlgorithmConfig
from rsm_train.config import RunConfig, find_algorithm
from rsm_train.setting_types import NO_VALUE, SettingsFile, checked, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from tomlkit.items import Item

_HEAD = (
    "Every setting of a run, as `rsm-train --save-config` of rsm-toolkit {version} wrote it.",
    "`rsm-train --config FILE` reads it. An option on the command line replaces a setting of the file.",
)
_WIDTH = 110


def read_settings(path: str | Path, algo: str | None = None) -> SettingsFile:
    """Read settings from a TOML file: one key per setting, and the table env_arg.

    Args:
        path: of the file.
        algo: the algorithm, where it is not that of the file.

    Raises:
        ConfigError: the file cannot be read or is no TOML, a key is no setting of the algorithm, or a value has
            another type.
    """
    found = _parse(path)
    file = SettingsFile(str(path), found)

    def named(name: str) -> str:
        return f"{name} in {str(path)!r}"

    values = checked(found, RunConfig, named)
    algo = algo or values.get("algo", "dpmd")
    config = find_algorithm(algo).Config
    known = {item.name for kind in (RunConfig, config) for item in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            meant = nearest(name, known)
            raise ConfigError(
                f"wanted settings that algorithm {algo} has in {str(path)!r}, got {name}; "
                + (f"did you mean {meant}?" if meant else "leave it out")
            )
    return dataclasses.replace(file, settings=checked(values, config, named))


def algorithm_in(path: str | Path) -> str | None:
    """The algorithm that a file names; None if it names none, or cannot be read."""
    try:
        algo = _parse(path).get("algo")
    except ConfigError:
        return None  # said where the file is used
    return algo if isinstance(algo, str) else None


def _parse(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the settings in {str(path)!r}: {error.strerror}; correct the path"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"wanted settings in TOML in {str(path)!r}, got: {reason}; correct the file"
        ) from None


def write_settings(path: Path, run: RunConfig, algorithm: AlgorithmConfig) -> None:
    """Write `format_settings` to a file, whole or not at all; a file of that name is replaced.

    Raises:
        ConfigError: a setting that TOML cannot hold.
        UsageError: the file cannot be written.
        MissingExtraError: tomlkit is not installed.
    """
    write_atomically(path, format_settings(run, algorithm))


def format_settings(run: RunConfig, algorithm: AlgorithmConfig) -> str:
    """The text of a file that means these settings, whatever the presets of a later version are.

    A setting is a comment if it has no effect beside the others, or if it is text that was not given.

    Raises:
        ConfigError, MissingExtraError: see `write_settings`.
    """
    require_extra("rsm-train --save-config", "train", ["tomlkit"])
    import tomlkit

    document = tomlkit.document()
    for line in _HEAD:
        document.add(tomlkit.comment(line.format(version=toolkit_version())))
    groups: dict[str, list[_Entry]] = {}
    for entry in _entries(run, algorithm):
        groups.setdefault(entry.group, []).append(entry)
    for group in sorted(groups, key=lambda title: title == OTHER):
        document.add(tomlkit.nl())
        document.add(tomlkit.comment(f"--- {group} ---"))
        for entry in groups[group]:
            document.add(tomlkit.nl())
            for line in textwrap.wrap(entry.comment, _WIDTH):
                document.add(tomlkit.comment(line))
            if entry.value is None:
                document.add(tomlkit.comment(f'{entry.name} = ""'))
            elif entry.needed is not None:
                document.add(tomlkit.comment(f"{entry.name} = {_item(entry.name, entry.value).as_string()}"))
            else:
                document.add(entry.name, _item(entry.name, entry.value))
    return tomlkit.dumps(document)


class _Entry(NamedTuple):
    """A setting as it is written."""

    name: str
    value: Any
    """None: text that was not given."""
    help: str
    group: str
    needed: str | None
    """The setting without which this one has no effect; None if it has one."""

    @property
    def comment(self) -> str:
        """The help text, and whether the setting has an effect."""
        return self.help if self.needed is None else f"{self.help} No effect here: it needs {self.needed}."


def _entries(run: RunConfig, algorithm: AlgorithmConfig) -> Iterator[_Entry]:
    """The settings in the order of the options; the table env_arg, which must be last in a file, is last."""
    needed = algorithm.ineffective()
    table = None
    for config in (run, algorithm):
        hints = typing.get_type_hints(type(config))
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            entry = _Entry(
                item.name,
                NO_VALUE if value is None and str not in typing.get_args(hints[item.name]) else value,
                item.metadata.get("help", ""),
                item.metadata.get("group", OTHER),
                needed.get(item.name, needed.get(f"{item.name}={value}")),
            )
            if isinstance(value, Mapping):
                table = entry if value else None
            else:
                yield entry
    if table is not None:
        yield table._replace(group="Arguments of the environment's constructor")


def _item(name: str, value: Any) -> Item:
    """A value of TOML.

    Raises:
        ConfigError: TOML has no such value.
    """
    import tomlkit
    from tomlkit.exceptions import ConvertError

    try:
        item: Item = tomlkit.item(dict(value) if isinstance(value, Mapping) else value)
        return item
    except ConvertError:
        raise ConfigError(
            f"wanted a number, a boolean or text as {name}, as TOML has no others, got {value!r:.60}; leave it "
            "out of the file"
        ) from None
