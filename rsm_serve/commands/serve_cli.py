"""The command `rsm-serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import click

from rsm_common.commandline import (
    GroupedCommand,
    GroupedOption,
    dataclass_options,
    require_extra,
    run_command,
)
from rsm_serve.commands.process import run_process
from rsm_serve.commands.supervisor import run_processes
from rsm_serve.config import DEFAULT_ADDRESS, VERSIONS, ServerConfig
from rsm_serve.engine.canary import Canary
from rsm_serve.engine.lane import Selection
from rsm_serve.observe.logs import LogFormat, set_up_logging
from rsm_serve.sessions.choice import extra_of, require_backend

EXTRA_MODULES = ("grpc_health", "grpc_reflection", "prometheus_client")


EXAMPLES = (
    (
        "Serve every policy of a repository to this machine, with metrics and a status page",
        "rsm-serve --repo bundles --http 127.0.0.1:8002",
    ),
    (
        "Serve version 3 of one policy to other machines, over TLS and with tokens",
        "rsm-serve --repo bundles --policy pendulum:3 --address 0.0.0.0:8001 \\\n"
        "    --tls-cert server.pem --tls-key server.key --act-token-file tokens",
    ),
)


@click.command("rsm-serve", cls=GroupedCommand, examples=EXAMPLES, context_settings={"max_content_width": 110})
@click.option(
    "--address",
    "addresses",
    multiple=True,
    default=(DEFAULT_ADDRESS,),
    show_default=True,
    metavar="ADDRESS",
    cls=GroupedOption,
    group="Connection",
    help="host:port (port 0: any free one) or unix:/path; may be repeated.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME[:VERSION]",
    cls=GroupedOption,
    group=VERSIONS,
    help="Policy to load; may be repeated.  [default: the current version of every policy]",
)
@click.option(
    "--canary",
    "canaries",
    multiple=True,
    metavar="NAME:VERSION=PERCENT%",
    cls=GroupedOption,
    group=VERSIONS,
    help="Send this share of a policy's clients to another version; may be repeated.",
)
@dataclass_options(ServerConfig)
@click.option(
    "--log-format",
    type=click.Choice(get_args(LogFormat)),
    default="text",
    show_default=True,
    cls=GroupedOption,
    group="Log",
    help="Format of the log on stderr; json: one object per line.",
)
@click.option("--verbose", is_flag=True, cls=GroupedOption, group="Log", help="Log more.")
@click.version_option(package_name="rsm-toolkit")
def command(
    policies: tuple[str, ...],
    canaries: tuple[str, ...],
    log_format: LogFormat,
    verbose: bool,
    **settings: Any,
) -> int:
    """Serve the policies of a repository over gRPC.

    When the server is ready, one line on stdout says so: "rsm-serve ready: address=HOST:PORT
    policies=NAME:VERSION". With --http the line ends in " http=HOST:PORT"; with --processes it has one such
    address per process, separated by commas.

    SIGTERM and SIGINT drain: new requests are refused, queued ones are answered. A second signal ends the
    server at once.
    """
    # gRPC's core does not write to our log. It writes a line for every failed handshake, so that a scan of the
    # port could fill the disk.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    require_extra("rsm-serve", extra_of(settings["backend"]), EXTRA_MODULES)
    require_backend("rsm-serve", settings["backend"])
    config = ServerConfig.from_options(
        policies=tuple(Selection.parse(text) for text in policies),
        canaries=tuple(Canary.parse(text) for text in canaries),
        **settings,
    )
    logs = partial(set_up_logging, log_format, verbose=verbose)
    logs()
    return run_process(config) if config.process.count == 1 else run_processes(config, logs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
