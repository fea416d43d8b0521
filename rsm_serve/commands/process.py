"""Run one server process: load, serve, drain and return the exit status."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from rsm_common.commandline import EXIT_INTERRUPTED, EXIT_OK
from rsm_serve.config import ServerConfig
from rsm_serve.engine.background import LOADER, in_thread

if TYPE_CHECKING:
    from rsm_serve.server import PolicyServer

logger = logging.getLogger(__name__)

EXIT_NOT_DRAINED = 1

Stop = Callable[[str], None]
"""Function that stops a server, called in its event loop with the reason."""


@dataclass(frozen=True)
class Ready:
    """Addresses and policies of a server that is ready."""

    addresses: tuple[str, ...]
    policies: tuple[str, ...]
    """NAME:VERSION of each policy."""
    https: tuple[str, ...]
    """Addresses of the HTTP ports; empty without --http."""

    @classmethod
    def of(cls, server: PolicyServer) -> Ready:
        """Return the addresses and policies of a started server."""
        names = [f"{lane.spec.name}:{lane.spec.version}" for lane in server.registry.lanes]
        http = () if server.monitor is None else (server.monitor.address,)
        return cls(server.addresses, tuple(names), http)

    def print(self) -> None:
        """Print the machine-readable line on stdout."""
        http = f" http={','.join(self.https)}" if self.https else ""
        addresses, policies = ",".join(self.addresses), ",".join(self.policies)
        print(f"rsm-serve ready: address={addresses} policies={policies}{http}", flush=True)


def run_process(config: ServerConfig) -> int:
    """Serve in this process until a signal arrives; return the exit status."""
    from rsm_serve.server import run_loop

    # SIGTERM ends the process while it loads. Without a handler, the first process of a
    # container ignores SIGTERM.
    signal.signal(signal.SIGTERM, _end)
    try:
        status: int = run_loop(lambda: serve(config, Ready.print, on_signals))
    except KeyboardInterrupt:
        leave_if_loading(EXIT_INTERRUPTED, "rsm-serve: interrupted")
        raise
    leave_if_loading(status)
    return status


def _end(number: int, frame: object) -> None:
    """End the process by the signal, or exit with 128 + the signal number if the signal is ignored."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def on_signals(stop: Stop) -> None:
    """Call `stop` at each SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)


async def serve(config: ServerConfig, announce: Callable[[Ready], None], stops: Callable[[Stop], None]) -> int:
    """Load the policies and serve them until the server is stopped; return the exit status.

    Args:
        config: settings of the server.
        announce: called with the addresses and policies when the server is ready.
        stops: called with the function that stops the server; a second call of this function stops it at once.
    """
    server = await _load(config)
    await server.start()
    reasons: asyncio.Queue[str] = asyncio.Queue()
    stops(reasons.put_nowait)
    # Loaded objects stay alive. The freeze excludes them from later garbage collections, each of which would
    # otherwise take milliseconds more.
    gc.collect()
    gc.freeze()
    announce(Ready.of(server))
    logger.info("%s: draining for at most %g s", await reasons.get(), config.process.drain_seconds)
    drain = asyncio.ensure_future(server.drain())
    second = asyncio.ensure_future(reasons.get())
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


async def _load(config: ServerConfig) -> PolicyServer:
    """Load the policies in a thread; meanwhile the event loop handles signals and the HTTP port."""
    from rsm_serve.server import PolicyServer

    monitor = None
    if config.monitor.http is not None:
        from rsm_serve.http.endpoints import Monitor

        monitor = Monitor()
        await monitor.open(config.monitor.http)
    return await in_thread(lambda: PolicyServer(config, monitor=monitor))


def leave_if_loading(status: int, message: str = "") -> None:
    """End the process at once if a load is in progress; a normal exit would abort in the runtime."""
    if any(thread.name == LOADER for thread in threading.enumerate()):
        if message:
            click.echo(message, err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
