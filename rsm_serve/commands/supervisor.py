"""Several server processes behind one port: `rsm-serve --processes K`.

The kernel assigns every new connection to one of the processes (SO_REUSEPORT). The connection and its streams
stay in this process. Each process is a complete server with its own event loop, batchers and sessions. The
processes share no locks. If a process dies, only its connections are lost, and the supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import click

from rsm_common.commandline import EXIT_OK, EXIT_USER_ERROR
from rsm_common.errors import ConfigError, RsmError
from rsm_serve.addresses import check_free, split_address, with_port
from rsm_serve.commands.process import EXIT_NOT_DRAINED, Ready, Stop, leave_if_loading, serve
from rsm_serve.config import ServerConfig

logger = logging.getLogger(__name__)

RESTART_AFTER_S = 1.0
"""Time between the end of a process and its next start; a process that fails at once then uses little CPU."""


def run_processes(config: ServerConfig, set_up_logging: Callable[[], None]) -> int:
    """Serve in several processes until a signal arrives; return the exit status.

    Args:
        config: settings of the server, with the number of processes.
        set_up_logging: called in each process; it must be picklable.

    Raises:
        AddressError: an address is in use or malformed.
        ConfigError: this system cannot share a port.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("wanted a system with SO_REUSEPORT for --processes, got none; leave it out")
    with contextlib.ExitStack() as stack:
        addresses = tuple([stack.enter_context(reserved(address)) for address in config.addresses])
        shared = replace(config, addresses=addresses, process=replace(config.process, shares_ports=True))
        processes = [
            _Process(_share_of(shared, index), set_up_logging) for index in range(config.process.count)
        ]
        signals = stack.enter_context(_Signals())
        ready = []
        for process in processes:  # one after the other, so that only the first process prints an error
            found = process.start_and_wait(signals)
            if found is None:
                _stop(processes, signals)
                return process.status or EXIT_NOT_DRAINED
            ready.append(found)
        Ready(addresses, ready[0].policies, tuple(http for one in ready for http in one.https)).print()
        while not signals.came:
            due_s = [process.due_s for process in processes if process.due_s is not None]
            timeout_s = max(0.0, min(due_s) - time.monotonic()) if due_s else None
            # The sentinel of a process that has already died ends the wait at once.
            running = [process.sentinel for process in processes if process.due_s is None]
            wait([signals.fd, *running], timeout_s)
            for process in processes:
                process.tend()
        return _stop(processes, signals)


def _share_of(config: ServerConfig, index: int) -> ServerConfig:
    """Return the settings of one process, with its own HTTP port and its own directory of records."""
    http, record = config.monitor.http, config.recording.directory
    if http is not None:
        port = split_address(http, unix=False)[1]
        http = with_port(http, port + index if port else 0)
    if record is not None:
        record = record / str(index)
    max_mb = max(1, config.recording.max_mb // config.process.count)  # also valid without recording
    return replace(
        config,
        monitor=replace(config.monitor, http=http),
        recording=replace(config.recording, directory=record, max_mb=max_mb),
    )


class _Process:
    """One server process; it is started again whenever it dies.

    Args:
        config: settings of this process.
        set_up_logging: the first function that the process calls.
    """

    def __init__(self, config: ServerConfig, set_up_logging: Callable[[], None]) -> None:
        self._config = config
        self._set_up_logging = set_up_logging
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self.due_s: float | None = None
        """Time of the next start, on the clock of `time.monotonic`; None while the process runs."""

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.exitcode is None

    @property
    def sentinel(self) -> int:
        assert self._process is not None
        return self._process.sentinel

    @property
    def status(self) -> int:
        """Exit status of the process; 128 + the signal number if a signal ended it, as in a shell."""
        code = None if self._process is None else self._process.exitcode
        return EXIT_NOT_DRAINED if code is None else 128 - code if code < 0 else code

    def start_and_wait(self, signals: _Signals) -> Ready | None:
        """Start the process and wait until it serves; None if it ends first or if a signal arrives."""
        self._start()
        assert self._pipe is not None
        while self.alive and not signals.came:
            wait([self._pipe, self.sentinel, signals.fd])
            with contextlib.suppress(EOFError):
                if self._pipe.poll():
                    ready: Ready = self._pipe.recv()
                    return ready
        return None

    def tend(self) -> None:
        """Start a dead process again after RESTART_AFTER_S."""
        if self.due_s is None and not self.alive:
            assert self._process is not None
            logger.error("process %s died (status %s); starting another", self._process.pid, self.status)
            self.due_s = time.monotonic() + RESTART_AFTER_S
        elif self.due_s is not None and self.due_s <= time.monotonic():
            self.due_s = None
            self._start()

    def terminate(self) -> None:
        """Send SIGTERM: the first one drains the process, and the second one stops it at once."""
        if self.alive:
            assert self._process is not None
            self._process.terminate()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._config, self._set_up_logging, other_end), daemon=True
        )
        # A terminal sends SIGINT to all processes. Only the supervisor handles it.
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, heard)
        other_end.close()


class _Signals:
    """Context manager that makes SIGTERM and SIGINT available as a file descriptor for `wait`."""

    def __enter__(self) -> _Signals:
        self.fd, self._written = os.pipe()
        os.set_blocking(self._written, False)
        os.set_blocking(self.fd, False)
        self.came = False
        self._heard = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._heard.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._written)

    def clear(self) -> None:
        """Forget the signal, so that the next one can be waited for."""
        self.came = False
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 64)

    def _note(self, number: int, frame: object) -> None:
        self.came = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._written, b"!")


def _sentinels(processes: Sequence[_Process]) -> list[int]:
    return [process.sentinel for process in processes if process.alive]


def _stop(processes: Sequence[_Process], signals: _Signals) -> int:
    """Drain all processes; return the exit status."""
    while sentinels := _sentinels(processes):
        for process in processes:
            process.terminate()
        signals.clear()
        while sentinels and not signals.came:
            wait([signals.fd, *sentinels])
            sentinels = _sentinels(processes)
    drained = all(process.status == EXIT_OK for process in processes)
    return EXIT_OK if drained else EXIT_NOT_DRAINED


@contextlib.contextmanager
def reserved(address: str) -> Iterator[str]:
    """Reserve an address: no other program can take its port until the end of the block.

    Raises:
        AddressError: the address is in use or malformed.
    """
    check_free(address)
    host, port = split_address(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    with contextlib.ExitStack() as stack:
        for family, kind, _, _, where in found if port else found[:1]:
            held = stack.enter_context(socket.socket(family, kind))
            # This socket does not listen, so the kernel gives it no connections.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                held.bind(where)
            except OSError:
                # `check_free` found the port free. Closed connections of an earlier server can still block this
                # socket. They do not block the servers, so a fixed port is accepted.
                if not port:
                    raise
        yield with_port(address, port or held.getsockname()[1])


def _serve(config: ServerConfig, set_up_logging: Callable[[], None], pipe: Any) -> None:
    """Serve until SIGTERM arrives or the supervisor ends; the main function of a process."""
    from rsm_serve.server import run_loop

    set_up_logging()

    def stops(stop: Stop) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop, signal.SIGTERM.name)

        def orphaned() -> None:
            loop.remove_reader(pipe.fileno())
            stop("the main process is gone")

        loop.add_reader(pipe.fileno(), orphaned)

    try:
        status = run_loop(lambda: serve(config, pipe.send, stops))
    except RsmError as error:
        click.echo(f"rsm-serve: {error}", err=True)
        status = EXIT_USER_ERROR
    leave_if_loading(status)
    raise SystemExit(status)
