"""The gRPC server: `rsm.v1.PolicyService`, health and reflection on one port, over one batcher per policy."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from rsm_common.errors import AddressError, RequestError, retry_after_ms, wire_status
from rsm_common.policy import ActResult, ActRows
from rsm_serve.addresses import UNIX, check_free, check_unexposed, with_port
from rsm_serve.config import ServerConfig
from rsm_serve.engine.guarded_answers import GuardedAnswers
from rsm_serve.engine.intake import Intake
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.lifecycle import LifeCycle
from rsm_serve.engine.registry import Registry
from rsm_serve.observe.settled import Answered
from rsm_serve.observe.tracing import Tracer
from rsm_serve.pb import oip_pb2, policy_pb2_grpc
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.rpc import oip_service as oip
from rsm_serve.rpc.auth_interceptor import Gate
from rsm_serve.rpc.bad_messages import GuardedServer
from rsm_serve.rpc.health import HealthService
from rsm_serve.rpc.streams import OpenStreams, OrderedStream, Submitted
from rsm_serve.security.access import Access
from rsm_serve.security.server_tls import server_credentials
from rsm_serve.startup import load_repository, make_loader, wishes_of
from rsm_serve.wire.caller import Caller, check_client_id
from rsm_serve.wire.codec import (
    ERROR_MARK,
    MAX_MESSAGE_BYTES,
    RETRY_AFTER,
    decode_request,
    encode_error,
    encode_response,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rsm_serve.http.endpoints import Monitor
    from rsm_serve.recording.recorder import Recorder

logger = logging.getLogger(__name__)

_Context = Any  # grpc has no type stubs

SERVICE = "rsm.v1.PolicyService"
HANDSHAKE_MS = 10_000
"""For a new connection to become one of HTTP/2, and of TLS; then it is closed."""
MAX_METADATA_BYTES = 16 * 1024
"""Of a call; gRPC itself refuses more, with RESOURCE_EXHAUSTED."""
IDLE_S = 0.05
FLUSH_S = 0.5
"""Time for the last answers to leave, and for watchers of health to be cut off, after draining."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # From 1000 on, gRPC would cancel some of the calls that wait to be read, by lot and in nobody's words;
    # as many may come at once.
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A robot that lost its power says no goodbye: its connection and streams end 40 s after its last sign.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A robot may ping an idle connection every 10 s without being cut off.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)

_FILES = [file.DESCRIPTOR for file in (pb, oip_pb2, health_pb2, reflection_pb2)]
_METHODS = frozenset(
    f"/{service.full_name}/{method}"
    for file in _FILES
    for service in file.services_by_name.values()
    for method in service.methods_by_name
)
"""Full names of all that the server answers."""


@dataclass(frozen=True)
class _Decoded:
    """A request of rsm.v1, which has no time limit but the call's."""

    rows: ActRows
    timeout_s: None = None


_ActStream = OrderedStream[pb.ActRequest, Answered[ActResult], pb.ActResponse]


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """`rsm.v1.PolicyService`."""

    def __init__(self, intake: Intake, server_version: str) -> None:
        self._intake = intake
        self._server_version = server_version
        self._streams = OpenStreams(intake.streams)

    async def GetSpec(  # noqa: N802
        self, request: pb.GetSpecRequest, context: _Context
    ) -> pb.GetSpecResponse:
        """What a policy takes and gives."""
        try:
            # What a caller meets who is no canary's; nobody in particular asks here.
            lane = self._intake.registry.find(request.policy, request.version, fixed=True)
        except RequestError as error:
            await _abort(context, error)
        return pb.GetSpecResponse(
            spec_json=lane.spec_json,
            max_batch_size=lane.limits.max_batch_size,
            server_version=self._server_version,
        )

    async def Act(self, request: pb.ActRequest, context: _Context) -> pb.ActResponse:  # noqa: N802
        """Sample actions once."""
        try:
            # Cancelling this handler (the caller left, or its deadline passed) cancels the future, which
            # takes the request out of the queue.
            answered = await self._submit("Act", request, context)
        except Exception as error:
            await _abort(context, error, request_id=request.request_id)
        return encode_response(request.request_id, answered.answer, answered.queue_us)

    async def ActStream(  # noqa: N802
        self, requests: AsyncIterator[pb.ActRequest], context: _Context
    ) -> AsyncIterator[pb.ActResponse]:
        """Sample actions at every control step, in order, several in flight."""

        identity = object()

        def submit(request: pb.ActRequest) -> Submitted[Answered[ActResult], pb.ActResponse]:
            future = self._submit("ActStream", request, context, identity)
            request_id = request.request_id  # not the request, which may be large
            return Submitted(
                future,
                lambda done: encode_response(request_id, done.answer, done.queue_us),
                partial(_refused, request_id),
            )

        stream: _ActStream = OrderedStream(submit, lambda request, error: _refused(request.request_id, error))
        try:
            async with self._streams.open(stream, requests, context.add_done_callback) as responses:
                async for response in responses:
                    yield response
        except RequestError as error:
            await _abort(context, error)

    def drain(self) -> None:
        """Answer what is in flight, then end the open streams."""
        self._streams.drain()

    def _submit(
        self, method: str, request: pb.ActRequest, context: _Context, stream: object | None = None
    ) -> asyncio.Future[Answered[ActResult]]:
        _, _, future = self._intake.submit(
            f"{SERVICE}/{method}",
            context,
            request.policy,
            request.version,
            lambda: _caller(request),
            lambda lane: _Decoded(decode_request(lane.spec, request, lane.limits.max_batch_size)),
            stream,
        )
        return future


def _caller(request: pb.ActRequest) -> Caller:
    return Caller(
        client_id=check_client_id(request.client_id),
        priority=request.priority,
        seed=request.seeds[0] if request.seeds else None,
        fixed=request.deterministic or bool(request.noise),
    )


def _refused(request_id: int, error: Exception) -> pb.ActResponse:
    _log_fault(error, request_id=request_id)
    return encode_error(request_id, error)


class PolicyServer:
    """A loaded repository behind gRPC; runs in the event loop that calls `start`.

    Args:
        config: what to serve, and where.
        lanes: what to serve instead of the repository's policies.
        monitor: observes the server and has its HTTP port, open already; None: made here if the
            configuration has an HTTP address.
        tracer: records requests; None: made here if the configuration says so.

    Raises:
        BundleError: a policy does not load.
        ConfigError: certificates or tokens cannot be used.
        AddressError: other machines reach an address, and there is neither TLS nor `insecure`.
        MissingExtraError: the backend is not installed.
        ConfigError: the directory for records cannot be written to.
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
        tokens = (config.security.act_token_file, config.security.admin_token_file)
        access = None if tokens == (None, None) else Access(*tokens)
        self.monitor = monitor or (None if config.monitor.http is None else _new_monitor())
        observer = None if self.monitor is None else self.monitor.telemetry
        self._tracer = tracer or (Tracer() if config.monitor.otel else None)
        load = make_loader(config, observer)
        if lanes is None:
            self.registry, wishes = load_repository(config, load, observer)
        else:
            self.registry, wishes = Registry(lanes, observer, config.versions.canaries), wishes_of(config)
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
        """Where it listens, ports filled in; empty before `start`."""
        self._recorder = (
            None
            if config.recording.directory is None
            else _new_recorder(config.recording.directory, config.recording.max_bytes)
        )
        if self.monitor is not None and self._recorder is not None:
            self.monitor.telemetry.recorded = self._recorder.counts
        intake = Intake(
            self.registry,
            observer,
            self._tracer,
            self._recorder,
            GuardedAnswers(config.guard) if config.guard.active else None,
            max_streams=config.limits.max_streams,
            max_rate=config.limits.max_rate,
        )
        version = metadata.version("rsm-toolkit")
        self._service = PolicyService(intake, version)
        self._inference = oip.InferenceService(
            intake,
            version,
            abort=_abort,
            log_fault=_log_fault,
            control=None if config.security.admin_token_file is None else self.lifecycle,
        )
        self._interceptors = () if access is None else (Gate(access, _abort, _METHODS, observer),)
        self._health = HealthService()

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            AddressError: an address is in use, or is not one.
        """
        if self.monitor is not None and self.config.monitor.http is not None and not self.monitor.address:
            await self.monitor.open(self.config.monitor.http)
        server = grpc.aio.server(
            interceptors=self._interceptors,
            options=_channel_options(self.config),
            compression=grpc.Compression.NoCompression,
        )
        add_policy_service: Any = policy_pb2_grpc.add_PolicyServiceServicer_to_server  # untyped, generated
        guarded = GuardedServer(server, _abort)
        add_policy_service(self._service, guarded)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, guarded)
        oip.add_to_server(self._inference, guarded)
        _describe(GuardedServer(server, _abort, streams=True))
        if not self.config.process.shares_ports:
            for address in self.config.addresses:
                check_free(address)
        self.addresses = tuple([_bind(server, address, self._credentials) for address in self.config.addresses])
        self.lifecycle.start(self._tell_health)
        await server.start()
        self._server = server
        if self._recorder is not None:
            self._recorder.start()
        self._tell_readiness()
        for name in self.registry.names:
            self._health.set(name, True)
        if self.monitor is not None:
            self.monitor.serving(self.registry, self.addresses)

    async def drain(self, seconds: float | None = None) -> bool:
        """Stop: refuse new requests, finish what is queued for at most `seconds`, then close.

        Returns:
            Whether everything was answered in time.
        """
        limit_s = self.config.process.drain_seconds if seconds is None else seconds
        self._health.drain()
        if self.monitor is not None:
            self.monitor.draining()
        lanes = await self.lifecycle.stop()
        for lane in lanes:
            lane.batcher.close()
        self._service.drain()
        self._inference.drain()
        waits = asyncio.gather(*(lane.batcher.drained() for lane in lanes))
        finished = True
        try:
            # An idle worker needs a moment to say that it has nothing left.
            await asyncio.wait_for(waits, max(limit_s, IDLE_S))
        except asyncio.TimeoutError:
            finished = False
        # The answers have been computed; what is open after the flush is watchers and idle streams.
        await self._server.stop(FLUSH_S)
        if finished:  # otherwise a worker may still be in the midst of a run
            for lane in lanes:
                lane.close()
        if self.monitor is not None:
            self.monitor.close()
        if self._tracer is not None:
            self._tracer.close()
        self._stop_recording()
        return finished

    async def close(self) -> None:
        """Stop at once; open calls are cancelled."""
        for lane in await self.lifecycle.stop():
            lane.batcher.close()
        await self._server.stop(None)
        if self.monitor is not None:
            self.monitor.close()
        self._stop_recording()

    def _stop_recording(self) -> None:
        if self._recorder is not None:
            self._recorder.close()

    def _tell_health(self, policy: str, ready: bool) -> None:
        self._health.set(policy, ready)
        self._tell_readiness()

    def _tell_readiness(self) -> None:
        """A server without any policy is alive, and not ready."""
        for name in ("", SERVICE, oip.SERVICE):
            self._health.set(name, bool(self.registry.names))


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


def _new_recorder(directory: Path, max_bytes: int) -> Recorder:
    from rsm_serve.recording.recorder import Recorder  # file locks, which not every system has

    return Recorder(directory, max_bytes)


def _channel_options(config: ServerConfig) -> tuple[tuple[str, int], ...]:
    return (
        *CHANNEL_OPTIONS,
        # Otherwise a second server would silently share the port, and clients be split between two policies.
        ("grpc.so_reuseport", int(config.process.shares_ports)),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # Below the hard limit gRPC refuses by lot from its soft one on; what is refused is not to be a lot's.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_allowed_incoming_connections", config.limits.max_connections),
        ("grpc.max_concurrent_streams", config.limits.max_calls_per_connection),
    )


def _bind(server: Any, address: str, credentials: Any | None) -> str:
    """Listen on the address, with TLS if there are credentials; returns it with the port filled in."""
    unix = address.startswith(UNIX)  # who may use one is a matter of its file's permissions
    try:
        if credentials is None or unix:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise AddressError(f"wanted to listen on {address}, got: {error}; choose another --address") from None
    return address if unix else with_port(address, port)


def _describe(server: Any) -> None:
    """Server reflection for every service."""
    names = [service.full_name for file in _FILES for service in file.services_by_name.values()]
    servicer = reflection.aio.ReflectionServicer(names, pool=oip.reflection_pool(_FILES))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)


def _log_fault(error: BaseException, **fields: object) -> None:
    """Our own faults are told in the log; what a caller did wrong is told to the caller."""
    if wire_status(error)[0] == "INTERNAL":
        known = isinstance(error, RequestError)
        logger.error("request failed: %s", error, exc_info=None if known else error, extra=fields)


async def _abort(context: _Context, error: Exception, **fields: object) -> NoReturn:
    _log_fault(error, **fields)
    code, message = wire_status(error)
    retry_ms = retry_after_ms(error)
    hint = () if retry_ms is None else ((RETRY_AFTER, str(retry_ms)),)
    try:
        await context.abort(grpc.StatusCode[code], message, (ERROR_MARK, *hint))
    except grpc.aio.AbortError as abort:
        # The call keeps its exception, whose frames keep the call and the request: a circle that only the
        # collector would open, while refused messages of 16 MiB pile up.
        asyncio.get_running_loop().call_soon(_forget, abort)
        raise
    raise AssertionError("abort raises")


def _forget(error: BaseException) -> None:
    """Let go of what an exception that nobody looks at any more holds."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
