"""The command `rsm-serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import click

from rsm_common.commandline import dataclass_options, require_extra, run_command
from rsm_serve.commands.process import run_process
from rsm_serve.commands.supervisor import run_processes
from rsm_serve.config import DEFAULT_ADDRESS, ServerConfig
from rsm_serve.engine.canary import Canary
from rsm_serve.engine.registry import Selection
from rsm_serve.observe.logs import LogFormat, set_up_logging
from rsm_serve.sessions.choice import extra_of, require_backend

EXTRA_MODULES = ("grpc_health", "grpc_reflection", "prometheus_client")


@click.command("rsm-serve", context_settings={"max_content_width": 110})
@dataclass_options(ServerConfig)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME[:VERSION]",
    help="What to load; may be repeated.  [default: the current version of every policy]",
)
@click.option(
    "--canary",
    "canaries",
    multiple=True,
    metavar="NAME:VERSION=PERCENT%",
    help="Send that share of a policy's clients to another version; may be repeated.",
)
@click.option(
    "--address",
    "addresses",
    multiple=True,
    default=(DEFAULT_ADDRESS,),
    show_default=True,
    metavar="ADDRESS",
    help="host:port (port 0: any free one) or unix:/path; may be repeated.",
)
@click.option(
    "--log-format",
    type=click.Choice(get_args(LogFormat)),
    default="text",
    show_default=True,
    help="Of the log on stderr; json: one object per line.",
)
@click.option("--verbose", is_flag=True, help="Log more.")
@click.version_option(package_name="rsm-toolkit")
def command(
    policies: tuple[str, ...],
    canaries: tuple[str, ...],
    log_format: LogFormat,
    verbose: bool,
    **settings: Any,
) -> int:
    """Serve the policies of a repository over gRPC.

    Prints one line on stdout when it serves: "rsm-serve ready: address=HOST:PORT policies=NAME:VERSION", with
    " http=HOST:PORT" at its end if --http is given (one per process, with commas between, of --processes).
    SIGTERM and SIGINT drain: new requests are refused, queued ones are answered; a second signal ends the
    server at once.
    """
    # Past our log, gRPC's core would write a line for every failed handshake, and what callers say when they
    # hang up: whoever scans the port would fill the disk.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    require_extra("rsm-serve", extra_of(settings["backend"]), EXTRA_MODULES)
    require_backend("rsm-serve", settings["backend"])
    config = ServerConfig(
        policies=tuple(Selection.parse(text) for text in policies),
        canaries=tuple(Canary.parse(text) for text in canaries),
        **settings,
    )
    logs = partial(set_up_logging, log_format, verbose=verbose)
    logs()
    return run_process(config) if config.processes == 1 else run_processes(config, logs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
