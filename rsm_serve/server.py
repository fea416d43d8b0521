"""A server from its configuration: what it loads, what watches it, and its way from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from rsm_serve.addresses import check_unexposed
from rsm_serve.config import RecordingSettings, ServerConfig
from rsm_serve.engine.guarded_answers import GuardedAnswers
from rsm_serve.engine.intake import Intake
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.lifecycle import LifeCycle
from rsm_serve.engine.registry import Registry
from rsm_serve.observe.counts import ServerCounts
from rsm_serve.observe.tracing import TRACE_HEADERS, Tracer
from rsm_serve.rpc.endpoint import FLUSH_S, Endpoint
from rsm_serve.security.access import Access
from rsm_serve.security.server_tls import server_credentials
from rsm_serve.security.settings import SecuritySettings
from rsm_serve.startup import load_repository, make_loader, wishes_of

if TYPE_CHECKING:
    from rsm_serve.http.endpoints import Monitor
    from rsm_serve.recording.recorder import Recorder

IDLE_S = 0.05
"""Time for an idle worker to report that its queue is empty."""


class PolicyServer:
    """A loaded repository behind gRPC; runs in the event loop that calls `start`.

    Args:
        config: what to serve, and where.
        lanes: replace the repository's policies.
        monitor: observes the server; its HTTP port is open already. None: the server makes one if the
            configuration has an HTTP address.
        tracer: records requests; None: the server makes one if the configuration asks for traces.

    Raises:
        BundleError: a policy does not load.
        ConfigError: certificates or tokens cannot be used, or the directory for records cannot be written to.
        AddressError: other machines reach an address, and there is neither TLS nor `insecure`.
        MissingExtraError: the backend is not installed.
    """

    def __init__(
        self,
        config: ServerConfig,
        lanes: Sequence[Lane] | None = None,
        monitor: Monitor | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.config = config
        self._credentials = server_credentials(config.security)
        if self._credentials is None and not config.security.insecure:
            for address in config.addresses:
                check_unexposed(address)
        access = _access(config.security)
        self.monitor = monitor or (None if config.monitor.http is None else _new_monitor())
        counts = ServerCounts() if self.monitor is None else self.monitor.counts
        self._tracer = tracer or (Tracer() if config.monitor.otel else None)
        self._recorder = _new_recorder(config.recording)  # before the load, which is slow
        if self._recorder is not None:
            counts.recorded = self._recorder.counts
        load = make_loader(config, counts)
        try:
            if lanes is None:
                self.registry, wishes = load_repository(config, load, counts)
            else:
                self.registry, wishes = Registry(lanes, counts, config.versions.canaries), wishes_of(config)
        except Exception:
            self._stop_observing()
            raise
        self.lifecycle = LifeCycle(
            self.registry,
            config.repo,
            load,
            wishes,
            poll_s=config.versions.poll,
            keep_versions=config.versions.keep_versions,
        )
        """A `RepositoryControl`."""
        self.addresses: tuple[str, ...] = ()
        """The addresses that it listens on, ports filled in; empty before `start`."""
        intake = Intake(
            self.registry,
            counts,
            [part.settled for part in (self._recorder, self._tracer) if part is not None],
            GuardedAnswers(config.guard) if config.guard.active else None,
            metadata_keys=frozenset() if self._tracer is None else TRACE_HEADERS,
            max_streams=config.limits.max_streams,
            max_rate=config.limits.max_rate,
        )
        control = None if config.security.admin_token_file is None else self.lifecycle
        self._endpoint = Endpoint(intake, control=control, access=access)

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            AddressError: an address is in use, or is not one.
        """
        try:
            await self._start()
        except BaseException:
            self._stop_observing()
            raise

    async def _start(self) -> None:
        config = self.config
        if self.monitor is not None and config.monitor.http is not None and not self.monitor.address:
            await self.monitor.open(config.monitor.http)
        self.addresses = self._endpoint.bind(
            config.addresses,
            self._credentials,
            shares_ports=config.process.shares_ports,
            max_connections=config.limits.max_connections,
            max_calls_per_connection=config.limits.max_calls_per_connection,
        )
        self.lifecycle.start(self._endpoint.set_ready)
        if self._recorder is not None:
            self._recorder.start()
        await self._endpoint.serve()
        if self.monitor is not None:
            self.monitor.serving(self.registry, self.addresses)

    async def drain(self, seconds: float | None = None) -> bool:
        """Stop: refuse new requests, finish what is queued for at most `seconds`, then close.

        Returns:
            Whether everything was answered in time.
        """
        limit_s = self.config.process.drain_seconds if seconds is None else seconds
        self._endpoint.refuse()
        if self.monitor is not None:
            self.monitor.draining()
        lanes = await self._stop_loading()
        self._endpoint.drain()
        waits = asyncio.gather(*(lane.batcher.drained() for lane in lanes))
        finished = True
        try:
            await asyncio.wait_for(waits, max(limit_s, IDLE_S))
        except asyncio.TimeoutError:
            finished = False
        # All answers are computed. Calls that are still open after the flush are watchers and idle streams.
        await self._endpoint.stop(FLUSH_S)
        if finished:  # otherwise a worker may still compute
            for lane in lanes:
                lane.close()
        if self._tracer is not None:
            self._tracer.close()
        self._stop_observing()
        return finished

    async def close(self) -> None:
        """Stop at once; open calls are cancelled."""
        await self._stop_loading()
        await self._endpoint.stop(None)
        self._stop_observing()

    async def _stop_loading(self) -> Sequence[Lane]:
        """End the life cycle and the queues; returns the lanes, which finish what they have."""
        lanes = await self.lifecycle.stop()
        for lane in lanes:
            lane.batcher.close()
        return lanes

    def _stop_observing(self) -> None:
        for part in (self.monitor, self._recorder):
            if part is not None:
                part.close()


def _access(security: SecuritySettings) -> Access | None:
    """The rules for tokens; None if no call needs one."""
    tokens = (security.act_token_file, security.admin_token_file)
    return None if tokens == (None, None) else Access(*tokens)


@contextlib.contextmanager
def background_server(
    config: ServerConfig, lanes: Sequence[Lane] | None = None, *, tracer: Tracer | None = None
) -> Iterator[PolicyServer]:
    """A server in a thread of this process, for tests and notebooks; drains at exit.

    Raises:
        BundleError, AddressError, MissingExtraError: as `PolicyServer`.
    """
    server = PolicyServer(config, lanes, tracer=tracer)
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        try:
            await server.start()
        except BaseException as error:
            if server.monitor is not None:
                server.monitor.close()
            ready.set_exception(error)
            return
        ready.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()
        await server.drain()

    thread = threading.Thread(target=run_loop, args=(serve,), name="rsm-serve", daemon=True)
    thread.start()
    loop, stop = ready.result()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def run_loop(main: Callable[[], Any]) -> Any:
    """Run a coroutine function in a new event loop, of uvloop if installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main())
    loop = uvloop.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


def _new_monitor() -> Monitor:
    from rsm_serve.http.endpoints import Monitor  # prometheus_client alone takes 0.06 s to import

    return Monitor()


def _new_recorder(settings: RecordingSettings) -> Recorder | None:
    if settings.directory is None:
        return None
    from rsm_serve.recording.recorder import Recorder  # only where requests are recorded

    return Recorder(settings.directory, settings.max_bytes)
