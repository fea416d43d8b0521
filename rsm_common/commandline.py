"""Parts that every command shares: options from configuration dataclasses, grouped help, error reports."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import click

from rsm_common.errors import ConfigError, MissingExtraError, RsmError

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_MAX_SEED = 2**64 - 1
_MAX_SEEDS = 10_000

OTHER = "Other"
"""The last section of a help text: options without a group."""

Config = TypeVar("Config")


def run_command(
    command: click.Command | Callable[[], click.Command], argv: Sequence[str] | None = None, name: str = ""
) -> int:
    """Run a click command and return the exit status instead of raising.

    A user's mistake becomes one sentence on stderr and status 2; our own faults keep their traceback.

    Args:
        command: the command, or a function that makes it where that needs an extra.
        argv: the arguments; None means the process's own.
        name: of a command that may be refused while it is made.
    """
    start = f"{name}: " if name else ""
    try:
        made = command if isinstance(command, click.Command) else command()
        start = f"{made.name}: "
        arguments = None if argv is None else list(argv)
        status = made.main(args=arguments, prog_name=made.name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_USER_ERROR
    except MissingExtraError as error:
        click.echo(str(error), err=True)  # says itself what needs the extra
        return EXIT_USER_ERROR
    except RsmError as error:
        click.echo(f"{start}{error}", err=True)
        return EXIT_USER_ERROR
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{start}interrupted", err=True)
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
        raise ConfigError(f"wanted every seed once, got {text!r}; remove the repeated seed")
    return tuple(seeds)


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Names and values of "size=3", "model=walker.xml", "terminate=false".

    A value is read as a JSON number, boolean, null or quoted text; anything else is text as it stands.

    Raises:
        ConfigError: no "=", an empty name, or a name twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError(f"wanted NAME=VALUE, got {text!r}; write for example size=3")
        if name in found:
            raise ConfigError(f"wanted every name once, got {name!r} twice; leave one of them out")
        found[name] = _json_scalar(value)
    return found


def format_assignments(values: Mapping[str, Any]) -> list[str]:
    """The texts that `parse_assignments` reads as these values."""
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def _json_scalar(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=lambda name: name)  # NaN and Infinity are no JSON
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def _assignments(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...], nothing: dict[str, Any] | None
) -> dict[str, Any] | None:
    try:
        return parse_assignments(texts) or nothing
    except ConfigError as error:
        raise click.BadParameter(str(error), context, parameter) from None


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


class GroupedOption(click.Option):
    """An option that stands in a section of the help text of a `GroupedCommand`.

    Args:
        group: title of the section.
    """

    def __init__(self, *args: Any, group: str = OTHER, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists the options in sections, and examples at the end.

    Sections come in the order of their first option; `OTHER` comes last.

    Args:
        examples: (purpose, command line) of each example; a command line may have several lines.
    """

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command`."""
        write_sections(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command`."""
        write_examples(self.examples, formatter)
        super().format_epilog(ctx, formatter)


def write_sections(
    parameters: Sequence[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    """Write a section per group of options, in the order of `GroupedCommand`; arguments are left out."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for option in parameters:
        if not isinstance(option, click.Option):
            continue  # click 8.5 has a help record for arguments too
        if (record := option.get_help_record(ctx)) is not None:
            sections.setdefault(getattr(option, "group", OTHER), []).append(record)
    for title in sorted(sections, key=lambda title: title == OTHER):
        with formatter.section(title):
            formatter.write_dl(sections[title])


def write_examples(examples: Sequence[tuple[str, str]], formatter: click.HelpFormatter) -> None:
    """Write the section of examples, (purpose, command line) each; nothing if there are none."""
    if not examples:
        return
    with formatter.section("Examples"):
        indent = " " * formatter.current_indent
        for purpose, line in examples:
            formatter.write(f"{indent}# {purpose}\n")
            formatter.write("".join(f"{indent}{part}\n" for part in line.splitlines()))


class _Setting(NamedTuple):
    """A field that is an option."""

    name: str
    """Of the option, with underscores."""
    label: str
    """Of the dataclass."""
    field: dataclasses.Field[Any]
    hint: Any
    group: str


def dataclass_options(
    *configs: type, defaults: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds one option per field of the configuration dataclasses.

    A field `total_steps: int = field(default=..., metadata={"help": ...})` becomes `--total-steps`.
    A field of type bool becomes `--flag/--no-flag`; a Literal becomes a choice; a Mapping becomes an option
    NAME=VALUE that can be repeated, see `parse_assignments`. Fields without a
    "help" entry get no option. A field that several dataclasses share becomes one option, with the help of
    the first. More entries of the metadata:

    "option": the option's name, with underscores, where it is not the field's name.
    "group": title of the option's section in the help of a `GroupedCommand`. On a field whose type is a
        dataclass: the fields of that dataclass become options in this section.

    Args:
        configs: the dataclasses.
        defaults: whether options carry the field's default, of the first dataclass that has it; without, an
            option that was not given is None, so that a caller can tell it from one that was, and the help
            names every default that differs, with its dataclass.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        shared: dict[str, dict[str, _Setting]] = {}
        for config in configs:
            for setting in _settings(config, _label(config)):
                shared.setdefault(setting.name, {})[setting.label] = setting
        for settings in reversed(shared.values()):
            function = _option(settings, defaults)(function)
        return function

    return decorate


def from_options(config: type[Config], options: Mapping[str, Any]) -> Config:
    """Make a configuration, its nested groups included, from the values of its options.

    Args:
        config: a dataclass as `dataclass_options` takes it.
        options: values by option name, with underscores; a field without an option goes by its own name.
            Fields that are not named keep their defaults.

    Raises:
        TypeError: the configuration has no such option, or a field without a default is missing.
        ConfigError: a value is out of range.
    """
    left = dict(options)
    made = _take(config, left)
    if left:
        raise TypeError(f"{config.__name__} has no option named {', '.join(sorted(left))}")
    return made


def _take(config: type[Config], left: dict[str, Any]) -> Config:
    """Make a configuration and remove its options from `left`."""
    hints = typing.get_type_hints(config)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        name = item.metadata.get("option", item.name)
        if name in left:
            values[item.name] = left.pop(name)
        elif "group" in item.metadata and dataclasses.is_dataclass(nested := hints[item.name]):
            values[item.name] = _take(typing.cast(type, nested), left)
    return config(**values)


def _settings(config: type, label: str, group: str = OTHER) -> Iterator[_Setting]:
    """The fields of a dataclass that are options, those of nested groups included."""
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        hint, section = hints[item.name], item.metadata.get("group", group)
        if "group" in item.metadata and dataclasses.is_dataclass(hint):
            yield from _settings(typing.cast(type, hint), label, section)
        elif "help" in item.metadata:
            yield _Setting(item.metadata.get("option", item.name), label, item, hint, section)


def _label(config: type) -> str:
    """The name of a configuration in help texts: "sac" of SACConfig."""
    return config.__name__.removesuffix("Config").lower()


def _option(shared: Mapping[str, _Setting], defaults: bool) -> Callable[..., Any]:
    """The option of one field; `shared` has the field of every dataclass that has it, by label."""
    first = next(iter(shared.values()))
    flag = "--" + first.name.replace("_", "-")
    default = first.field.default
    kind = _option_type(first.hint)
    if kind is dict:
        settings: dict[str, Any] = {
            "cls": GroupedOption,
            "group": first.group,
            "help": first.field.metadata["help"],
        }
        callback = partial(_assignments, nothing={} if defaults else None)
        return click.option(
            flag, first.name, multiple=True, metavar="NAME=VALUE", callback=callback, **settings
        )
    has_default = default is not dataclasses.MISSING
    text = first.field.metadata["help"]
    if not defaults:
        text += _default_text({label: setting.field.default for label, setting in shared.items()})
    settings = {
        "cls": GroupedOption,
        "group": first.group,
        "show_default": defaults and has_default and default is not None,
        "required": defaults and not has_default,
        "help": text,
    }
    if defaults and has_default:
        # Not even None otherwise: for click a default, also of None, satisfies `required`.
        settings["default"] = default
    if kind is bool:
        if not defaults:
            settings["default"] = None  # click's own default is False
        return click.option(f"{flag}/--no-{flag[2:]}", first.name, **settings)
    return click.option(flag, first.name, type=kind, **settings)


def _default_text(by_label: Mapping[str, Any]) -> str:
    """The default of the first dataclass, then those that differ from it: "  [default: 5.0; sac: 1.0]"."""
    known = {label: default for label, default in by_label.items() if default is not dataclasses.MISSING}
    if all(default is None for default in known.values()):
        return ""
    labels: dict[str, list[str]] = {}
    for label, default in known.items():
        labels.setdefault(_shown(default), []).append(label)
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
    return dict if typing.get_origin(hint) is Mapping else hint
