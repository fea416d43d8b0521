"""A command that has subcommands, and does its main work where none of them is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from rsm_common.commandline import GroupedCommand, write_examples, write_sections


class _DefaultContext(click.Context):
    """The context of the default command, whose name the user does not type."""

    @property
    def command_path(self) -> str:
        """The path of the group."""
        assert self.parent is not None, "the default command is always one of a group"
        return self.parent.command_path


class DefaultCommand(GroupedCommand):
    """The command that a `DefaultGroup` runs where its name is not given.

    Args:
        usage: what follows the program's name in its usage.
    """

    context_class = _DefaultContext

    def __init__(self, *args: Any, usage: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.usage = usage

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See `click.Command`."""
        formatter.write_usage(ctx.command_path, self.usage)


class DefaultGroup(click.Group):
    """Commands of which one, a `DefaultCommand`, is meant where the first word is none of them.

    Args:
        other_usages: what follows the program's name in the usage of each other command.
    """

    def __init__(self, *args: Any, other_usages: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.other_usages = tuple(other_usages)

    @property
    def default(self) -> DefaultCommand:
        """The command whose name need not be given."""
        (command,) = (made for made in self.commands.values() if isinstance(made, DefaultCommand))
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default command's name. A path that is called like a command is given as ./NAME."""
        own = {*self.commands, *ctx.help_option_names, "--version"}
        name = self.default.name
        assert name is not None, "a command of a group has a name"
        return super().parse_args(ctx, [name, *args] if args and args[0] not in own else args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """All ways of use."""
        formatter.write_usage(ctx.command_path, self.default.usage)
        for usage in self.other_usages:
            formatter.write_usage(ctx.command_path, usage, prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default command's options, the common ones, then the other commands."""
        write_sections([*self.default.params, *self.get_params(ctx)], ctx, formatter)
        with formatter.section("Other commands"):
            others = [(name, made) for name, made in self.commands.items() if made is not self.default]
            formatter.write_dl([(name, made.get_short_help_str(limit=90)) for name, made in others])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default command's examples."""
        write_examples(self.default.examples, formatter)
        super().format_epilog(ctx, formatter)
