"""The gRPC server of a process: every service, its options, and the addresses that it listens on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from rsm_common.errors import AddressError
from rsm_common.lazy import toolkit_version
from rsm_serve.addresses import UNIX, check_free, with_port
from rsm_serve.engine.intake import Intake
from rsm_serve.engine.lifecycle import RepositoryControl
from rsm_serve.pb import policy_pb2_grpc
from rsm_serve.rpc.auth_interceptor import Gate
from rsm_serve.rpc.bad_messages import GuardedServer
from rsm_serve.rpc.health import HealthService
from rsm_serve.rpc.oip.service import InferenceService
from rsm_serve.rpc.oip.tensors import SERVICE as OIP_SERVICE
from rsm_serve.rpc.policy_service import PolicyService
from rsm_serve.rpc.reflection import METHODS, add_reflection
from rsm_serve.security.access import Access
from rsm_serve.wire.codec import MAX_MESSAGE_BYTES, SERVICE

HANDSHAKE_MS = 10_000
"""Time for a new connection to finish the handshakes of HTTP/2 and TLS; then it is closed."""
MAX_METADATA_BYTES = 16 * 1024
"""Metadata of a call; gRPC refuses more, with RESOURCE_EXHAUSTED."""
FLUSH_S = 0.5
"""Time for the last answers to leave, and for watchers of health to be cut off, after draining."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # With more than 1000 waiting calls, gRPC would cancel some at random, without a reason. So many may
    # come at once.
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A robot that lost its power does not close its connection. The connection and its streams end 40 s after
    # the robot's last message.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A robot may ping an idle connection every 10 s without being cut off.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    # gRPC refuses at random between its soft limit and its hard one, so both are the same.
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
)


class Endpoint:
    """PolicyService, the Open Inference Protocol, health and reflection on the same addresses.

    Belongs to one event loop.

    Args:
        intake: queues the requests.
        control: loads and unloads policies; None: the protocol offers neither.
        access: the rules for tokens; None: no call needs a token.
    """

    def __init__(
        self,
        intake: Intake,
        *,
        control: RepositoryControl | None = None,
        access: Access | None = None,
    ) -> None:
        version = toolkit_version()
        self._policies = PolicyService(intake, version)
        self._inference = InferenceService(intake, version, control)
        self._registry = intake.registry
        self._health = HealthService()
        self._interceptors = () if access is None else (Gate(access, METHODS, intake.counts),)
        self._server: Any = None

    def bind(
        self,
        addresses: Sequence[str],
        credentials: Any | None,
        *,
        shares_ports: bool,
        max_connections: int,
        max_calls_per_connection: int,
    ) -> tuple[str, ...]:
        """Take the addresses, and register the services; calls are answered after `serve`.

        Args:
            addresses: see `rsm_serve.addresses`.
            credentials: for TLS, on every address but unix sockets; None: plaintext.
            shares_ports: whether other processes listen on the same ports.
            max_connections: connections at the same time.
            max_calls_per_connection: open calls of one connection; further ones wait.

        Returns:
            The addresses, with the port filled in.

        Raises:
            AddressError: an address is in use, or is not one.
        """
        options = (
            *CHANNEL_OPTIONS,
            # Otherwise a second server would share the port unnoticed, and take some of the clients.
            ("grpc.so_reuseport", int(shares_ports)),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_allowed_incoming_connections", max_connections),
            ("grpc.max_concurrent_streams", max_calls_per_connection),
        )
        server = grpc.aio.server(
            interceptors=self._interceptors, options=options, compression=grpc.Compression.NoCompression
        )
        guarded = GuardedServer(server)
        add_policy_service: Any = policy_pb2_grpc.add_PolicyServiceServicer_to_server  # untyped, generated
        add_policy_service(self._policies, guarded)
        self._inference.add_to(guarded)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, guarded)
        add_reflection(GuardedServer(server, streams=True))
        if not shares_ports:
            for address in addresses:
                check_free(address)
        self._server = server
        return tuple([_bind(server, address, credentials) for address in addresses])

    async def serve(self) -> None:
        """Answer calls from now on; every loaded policy is ready."""
        await self._server.start()
        self._set_services_ready()
        for name in self._registry.names:
            self._health.set(name, True)

    def set_ready(self, policy: str, ready: bool) -> None:
        """Set the health of a policy that was loaded or unloaded."""
        self._health.set(policy, ready)
        self._set_services_ready()

    def _set_services_ready(self) -> None:
        """Set the health of the services. A server without a policy is alive, and not ready."""
        for name in ("", SERVICE, OIP_SERVICE):
            self._health.set(name, bool(self._registry.names))

    def refuse(self) -> None:
        """Report in health that no requests are taken."""
        self._health.drain()

    def drain(self) -> None:
        """Answer what is in flight, then end the open streams."""
        self._policies.drain()
        self._inference.drain()

    async def stop(self, grace_s: float | None) -> None:
        """Close all connections.

        Args:
            grace_s: seconds for open calls to end; None: they are cancelled at once.
        """
        await self._server.stop(grace_s)


def _bind(server: Any, address: str, credentials: Any | None) -> str:
    """Listen on the address, with TLS if there are credentials; returns it with the port filled in."""
    unix = address.startswith(UNIX)  # the permissions of its file say who may use it
    try:
        if credentials is None or unix:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise AddressError(f"wanted to listen on {address}, got: {error}; choose another --address") from None
    return address if unix else with_port(address, port)
