"""What the commands share: options from configuration dataclasses, and one way to report a mistake."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from rsm_common.errors import ConfigError, MissingExtraError, RsmError

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_MAX_SEED = 2**64 - 1
_MAX_SEEDS = 10_000


def run_command(command: click.Command | Callable[[], click.Command], argv: Sequence[str] | None = None) -> int:
    """Run a click command and return the exit status instead of raising.

    A user's mistake becomes one sentence on stderr and status 2; our own faults keep their traceback.

    Args:
        command: the command, or a function that makes it where that needs an extra.
        argv: the arguments; None means the process's own.
    """
    name = ""
    try:
        made = command if isinstance(command, click.Command) else command()
        name = f"{made.name}: "
        status = made.main(args=None if argv is None else list(argv), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_USER_ERROR
    except MissingExtraError as error:
        click.echo(str(error), err=True)  # says itself what needs the extra
        return EXIT_USER_ERROR
    except RsmError as error:
        click.echo(f"{name}{error}", err=True)
        return EXIT_USER_ERROR
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{name}interrupted", err=True)
        return EXIT_INTERRUPTED
    return status if isinstance(status, int) else EXIT_OK


def require_extra(command: str, extra: str, modules: Sequence[str]) -> None:
    """Check that the top-level modules that a command cannot work without are installed.

    They are looked for and not imported: a `--help` should not wait for torch.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(
                f'{command} needs: pip install "rsm-toolkit[{extra}]" (module {module} is missing)'
            )


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of '3', '0-4', '0,3,7' or '0-2,9', in that order.

    Raises:
        ConfigError: anything else, a seed twice, or more than 10,000 of them.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= _MAX_SEED or last - first >= _MAX_SEEDS:
            raise ConfigError(f"wanted seeds such as 0-4 or 0,3,7 (from 0 to 2**64 - 1), got {text!r}")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"wanted every seed once, got {text!r}; what it stands for would count twice")
    return tuple(seeds)


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Aligned plain text: a heading, a rule and lines; the first `left` columns begin at the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def dataclass_options(
    *configs: type, defaults: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds one option per field of the configuration dataclasses.

    A field `total_steps: int = field(default=..., metadata={"help": ...})` becomes `--total-steps`.
    A field of type bool becomes `--flag/--no-flag`; a Literal becomes a choice. Fields without a
    "help" entry get no option. A field that several dataclasses share becomes one option, with the help of
    the first.

    Args:
        configs: the dataclasses.
        defaults: whether options carry the field's default, of the first dataclass that has it; without, an
            option that was not given is None, so that a caller can tell it from one that was, and the help
            names every default that differs, with its dataclass.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        shared: dict[str, dict[str, dataclasses.Field[Any]]] = {}
        for config in configs:
            for item in dataclasses.fields(config):
                if "help" in item.metadata:
                    shared.setdefault(item.name, {})[_label(config)] = item
        hints: dict[str, Any] = {}
        for config in reversed(configs):
            hints |= typing.get_type_hints(config)
        for name, items in reversed(shared.items()):
            function = _option(items, hints[name], defaults)(function)
        return function

    return decorate


def _label(config: type) -> str:
    """What a configuration is for: "sac" of SACConfig."""
    return config.__name__.removesuffix("Config").lower()


def _option(items: Mapping[str, dataclasses.Field[Any]], hint: Any, defaults: bool) -> Callable[..., Any]:
    """The option of one field, given as it is in each dataclass that has it, by label."""
    item = next(iter(items.values()))
    flag = "--" + item.name.replace("_", "-")
    has_default = item.default is not dataclasses.MISSING
    text = item.metadata["help"]
    if not defaults:
        text += _default_text({label: shared.default for label, shared in items.items()})
    settings: dict[str, Any] = {
        "show_default": defaults and has_default and item.default is not None,
        "required": defaults and not has_default,
        "help": text,
    }
    if defaults and has_default:
        # Not even None otherwise: for click a default, also of None, satisfies `required`.
        settings["default"] = item.default
    kind = _option_type(hint)
    if kind is bool:
        if not defaults:
            settings["default"] = None  # or click says False where nothing was said
        return click.option(f"{flag}/--no-{flag[2:]}", item.name, **settings)
    return click.option(flag, item.name, type=kind, **settings)


def _default_text(by_label: Mapping[str, Any]) -> str:
    """The default of the first dataclass, then those that differ from it: "  [default: 5.0; sac: 1.0]"."""
    labels: dict[str, list[str]] = {}
    for label, default in by_label.items():
        if default is not dataclasses.MISSING:
            labels.setdefault(_shown(default), []).append(label)
    if not set(labels) - {_shown(None)}:
        return ""
    first, *others = labels
    parts = [first, *(f"{', '.join(labels[shown])}: {shown}" for shown in others)]
    return f"  [default: {'; '.join(parts)}]"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default is None else str(default)


def _option_type(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return click.Choice([str(value) for value in typing.get_args(hint)])
    return hint
