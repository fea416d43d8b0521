"""The command `rsm-serve`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import click

from rsm_serve.canary import Canary
from rsm_serve.commandline import EXIT_INTERRUPTED, EXIT_OK, dataclass_options, require_extra, run_command
from rsm_serve.config import DEFAULT_ADDRESS, ServerConfig
from rsm_serve.lifecycle import LOADER, in_thread
from rsm_serve.logs import LogFormat, set_up_logging
from rsm_serve.registry import Selection
from rsm_serve.sessions.choice import extra_of, require_backend

if TYPE_CHECKING:
    from rsm_serve.server import PolicyServer

logger = logging.getLogger("rsm_serve")

EXIT_NOT_DRAINED = 1
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
    " http=HOST:PORT" at its end if --http is given.
    SIGTERM and SIGINT drain: new requests are refused, queued ones are answered; a second signal ends the
    server at once.
    """
    # gRPC's own core would write what callers say when they hang up, line feeds and all, past our log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    require_extra("rsm-serve", extra_of(settings["backend"]), EXTRA_MODULES)
    require_backend("rsm-serve", settings["backend"])
    from rsm_serve.server import run_loop

    set_up_logging(log_format, verbose=verbose)
    config = ServerConfig(
        policies=tuple(Selection.parse(text) for text in policies),
        canaries=tuple(Canary.parse(text) for text in canaries),
        **settings,
    )
    try:
        status: int = run_loop(lambda: serve(config))
    except KeyboardInterrupt:
        leave_if_loading(EXIT_INTERRUPTED, "rsm-serve: interrupted")
        raise
    leave_if_loading(status)
    return status


async def serve(config: ServerConfig) -> int:
    """Load, announce, serve until a signal; returns the exit status."""
    from rsm_serve.server import PolicyServer

    server = await load_monitored(config) if config.http is not None else PolicyServer(config)
    await server.start()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    # What has been loaded stays: the collector need not walk it again, a pause of milliseconds each time.
    gc.collect()
    gc.freeze()
    announce(server)
    first = await signals.get()
    logger.info("%s: draining for at most %g s", first.name, config.drain_seconds)
    drain = asyncio.ensure_future(server.drain())
    second = asyncio.ensure_future(signals.get())
    await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
    if drain.done() and drain.result():
        second.cancel()
        logger.info("drained")
        return EXIT_OK
    logger.warning("stopped with requests unanswered")
    if not drain.done():
        drain.cancel()
        await server.close()
    second.cancel()
    return EXIT_NOT_DRAINED


async def load_monitored(config: ServerConfig) -> PolicyServer:
    """Load while the HTTP port says that the server is loading."""
    from rsm_serve.monitor import Monitor
    from rsm_serve.server import PolicyServer

    assert config.http is not None
    monitor = Monitor()
    await monitor.open(config.http)
    return await in_thread(lambda: PolicyServer(config, monitor=monitor))


def leave_if_loading(status: int, message: str = "") -> None:
    """End the process at once: a runtime that is torn down in the midst of a load would abort it."""
    if any(thread.name == LOADER for thread in threading.enumerate()):
        if message:
            click.echo(message, err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def announce(server: PolicyServer) -> None:
    """The one machine-readable line on stdout."""
    policies = ",".join(f"{lane.spec.name}:{lane.spec.version}" for lane in server.registry.lanes)
    http = f" http={server.monitor.address}" if server.monitor is not None else ""
    print(f"rsm-serve ready: address={','.join(server.addresses)} policies={policies}{http}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
