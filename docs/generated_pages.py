"""Fills the marks of the reference pages, such as `<!-- generated: commands -->`, from the program itself.

A hook of mkdocs. Nothing that it makes is checked in: commands come from click, settings from the dataclasses,
and errors from the tree in rsm_common/errors.py.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
from click.testing import CliRunner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^<!-- generated: ([a-z]+)(?: (\S+))? -->$", re.MULTILINE)
SETTINGS = (
    "rsm_train.config",
    "rsm_export.config",
    "rsm_eval.evaluation",
    "rsm_eval.curves.command",
    "rsm_serve.config",
)
"""Modules whose import brings every dataclass of settings."""
PACKAGES = ("rsm_common", "rsm_train", "rsm_export", "rsm_eval", "rsm_serve")

Row = Sequence[str]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark of a page by what it stands for; called by mkdocs."""
    return MARK.sub(lambda mark: GENERATORS[mark[1]](*filter(None, [mark[2]])), markdown)


def commands() -> str:
    """Every command and subcommand with usage, options in their groups, and examples."""
    return "\n\n".join(section for name, main in _scripts() for section in _described(name, _command_of(main)))


def settings() -> str:
    """Every dataclass of settings with its fields."""
    for name in SETTINGS:
        importlib.import_module(name)
    return "\n\n".join(_settings_of(config) for config in sorted(_config_classes(), key=_package_order))


def presets() -> str:
    """What every preset of every algorithm changes, as `rsm-train --list-presets` prints it."""
    command = _command_of(dict(_scripts())["rsm-train"])
    return f"```text\n{CliRunner().invoke(command, ['--list-presets']).output.rstrip()}\n```"


def errors() -> str:
    """The tree of errors: a section for each class, in the order of the source."""
    from rsm_common.errors import RsmError

    return "\n\n".join(_error(kind) for kind in _subclasses(RsmError))


def statuses() -> str:
    """The table gRPC status -> exceptions."""
    from rsm_common.errors import WIRE_STATUS

    rows = [
        (f"`{status.code}`", f"[`{kind.__name__}`](errors.md#{kind.__name__.lower()})", _summary(kind))
        for kind, status in WIRE_STATUS.items()
    ]
    return _table(("status", "exception in Python", "meaning"), rows)


def rooms(package: str) -> str:
    """The folders and modules directly below a package, with what each holds; for the server its arrows too."""
    folder = ROOT / package
    arrows = _import_rules().ARROWS if package == "rsm_serve" else {}
    rows = []
    for path in sorted(folder.iterdir()):
        source = path / "__init__.py" if path.is_dir() else path
        if path.name in ("__init__.py", "pb") or source.suffix != ".py" or not source.is_file():
            continue
        summary = (ast.get_docstring(ast.parse(source.read_text())) or "").split("\n\n")[0]
        allowed = ", ".join(f"`{name}`" for name in sorted(arrows.get(path.stem, ()))) or "-"
        rows.append(
            [f"`{path.name}{'/' if path.is_dir() else ''}`", _escaped(summary), allowed][: 3 if arrows else 2]
        )
    return _table(("room", "holds", "may import")[: 3 if arrows else 2], rows)


def _import_rules() -> types.ModuleType:
    """The test that holds the arrows between the rooms."""
    spec = importlib.util.spec_from_file_location("import_rules", ROOT / "tests" / "test_import_rules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def file(path: str) -> str:
    """A file of the repository, as a block."""
    language = {".proto": "protobuf"}.get(Path(path).suffix, "text")
    return f"```{language}\n{(ROOT / path).read_text().rstrip()}\n```"


GENERATORS: dict[str, Callable[..., str]] = {
    generate.__name__: generate for generate in (commands, settings, presets, errors, statuses, rooms, file)
}


def _scripts() -> Iterator[tuple[str, Callable[[Sequence[str]], int]]]:
    """(name, main function) of each command that the wheel installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        yield name, getattr(importlib.import_module(module), function)


def _command_of(main: Callable[[Sequence[str]], int]) -> click.Command:
    """The click command that a main function would run."""
    found: list[click.Command] = []
    with mock.patch.object(click.Command, "main", lambda command, *_, **__: found.append(command)):
        main([])
    return found[0]


def _described(name: str, command: click.Command, parent: click.Context | None = None) -> Iterator[str]:
    """Sections of a command and its subcommands."""
    context = click.Context(command, parent=parent, info_name=name.split()[-1])
    yield _command(name, command, context)
    if isinstance(command, click.Group):
        for subname in command.list_commands(context):
            subcommand = command.get_command(context, subname)
            assert subcommand is not None
            yield from _described(f"{name} {subname}", subcommand, context)


def _command(name: str, command: click.Command, context: click.Context) -> str:
    usage = command.get_usage(context).removeprefix("Usage: ")
    usage = "\n".join(line.strip() for line in usage.splitlines())
    parts = [
        f"{'#' * (2 + name.count(' '))} {name}",
        inspect.cleandoc(command.help or ""),
        f"```text\n{usage}\n```",
    ]
    parts += [
        f"**{title}**\n\n{_table(('option', 'meaning'), rows)}" for title, rows in _options(command, context)
    ]
    examples = getattr(command, "examples", ())
    if examples:
        lines = "\n\n".join(f"# {purpose}\n{line}" for purpose, line in examples)
        parts.append(f"**Examples**\n\n```sh\n{lines}\n```")
    return "\n\n".join(parts)


def _options(command: click.Command, context: click.Context) -> list[tuple[str, list[Row]]]:
    """(title, rows) of each group of options; the options without a group come last."""
    groups: dict[str, list[Row]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            title = getattr(parameter, "group", "Options")
            groups.setdefault(title, []).append((f"`{record[0]}`", _escaped(record[1])))
    return sorted(groups.items(), key=lambda group: group[0] in ("Options", "Other"))


def _config_classes() -> list[type]:
    """Dataclasses whose fields have help texts, of every module that was imported."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES]
    values = {id(value): value for module in modules for value in vars(module).values()}
    return [value for value in values.values() if isinstance(value, type) and _has_help(value)]


def _has_help(kind: type) -> bool:
    if kind.__module__.split(".")[0] not in PACKAGES or not dataclasses.is_dataclass(kind):
        return False
    return any("help" in field.metadata for field in dataclasses.fields(kind))


def _package_order(config: type) -> tuple[int, bool, str, int]:
    """The settings of a command come before those of its parts."""
    package, _, module = config.__module__.partition(".")
    return PACKAGES.index(package), module != "config", module, inspect.getsourcelines(config)[1]


def _settings_of(config: type) -> str:
    hints = typing.get_type_hints(config)
    rows = [
        (f"`{field.name}`", _type(hints[field.name]), _default(field), _escaped(field.metadata["help"]))
        for field in dataclasses.fields(config)
        if "help" in field.metadata
    ]
    table = _table(("setting", "type", "default", "meaning"), rows)
    return f"## {config.__name__}\n\n`{config.__module__}`. {_summary(config)}\n\n{table}"


def _type(hint: Any) -> str:
    """A type as a user reads it: the values of a Literal, else its name."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names: list[str] = []
    for part in parts:
        values = typing.get_args(part) if typing.get_origin(part) is typing.Literal else ()
        name = "none" if part is type(None) else getattr(part, "__name__", str(part))
        names += [str(value) for value in values] or [name]
    return ", ".join(f"`{name}`" for name in names)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "required"


def _subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    children: list[type[Exception]] = kind.__subclasses__()
    for child in children:
        if child.__module__ == kind.__module__:
            yield from _subclasses(child)


def _error(kind: type[Exception]) -> str:
    from rsm_common.errors import WIRE_STATUS, RequestError, RsmError

    bases = [base.__name__ for base in kind.__mro__[1:] if issubclass(base, RsmError)]
    parts = [f"## {kind.__name__}", _with_arguments(inspect.cleandoc(kind.__doc__ or ""))]
    if bases:
        parts.append(f"Base class{'es' * (len(bases) > 1)}: {', '.join(f'`{base}`' for base in bases)}.")
    status = WIRE_STATUS.get(kind) if issubclass(kind, RequestError) else None
    if status is not None:
        parts.append(f"gRPC status: `{status.code}`.")
        if status.public:
            parts.append(f"Message to a remote caller: “{status.public}”")
    return "\n\n".join(parts)


def _with_arguments(text: str) -> str:
    """A docstring whose `Args:` is a list of Markdown."""
    text, found, arguments = text.partition("\n\nArgs:\n")
    if not found:
        return text
    return f"{text}\n\nArguments:\n\n" + re.sub(r"^ *(\w+): ", r"- `\1`: ", arguments, flags=re.MULTILINE)


def _summary(thing: Any) -> str:
    return _escaped(inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0])


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
