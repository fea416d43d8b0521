"""What `rsm-serve` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rsm_common.errors import ConfigError
from rsm_serve.addresses import unix_path
from rsm_serve.engine.action_guard import Fallback, GuardLimits
from rsm_serve.engine.batcher import BatchLimits
from rsm_serve.engine.canary import Canary, check_shares
from rsm_serve.engine.registry import Selection
from rsm_serve.sessions.choice import Backend

DEFAULT_ADDRESS = "127.0.0.1:8001"
MAX_SECONDS = 86_400
"""A day, the most that a time may be set to: timers overflow somewhere beyond, and nan is in no range."""
MAX_COUNT = 2**31 - 1
"""The largest number that gRPC takes for a limit."""


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    Raises:
        ConfigError: a value is out of range.
    """

    repo: Path = field(metadata={"help": "Repository of bundles, as rsm-export writes it."})
    addresses: tuple[str, ...] = (DEFAULT_ADDRESS,)
    """host:port (port 0: any free one) or unix:/path."""
    tls_cert: Path | None = field(
        default=None,
        metadata={"help": "PEM certificate chain of the server: serve TLS.  [default: none, plaintext]"},
    )
    tls_key: Path | None = field(
        default=None, metadata={"help": "PEM private key of the certificate, without a password."}
    )
    tls_client_ca: Path | None = field(
        default=None,
        metadata={"help": "PEM certificates of authorities: only clients that one of them signed are served."},
    )
    act_token_file: Path | None = field(
        default=None,
        metadata={"help": "File of tokens, one a line: only who shows one of them may act."},
    )
    admin_token_file: Path | None = field(
        default=None,
        metadata={"help": "File of tokens that may act, load and unload.  [default: none, nobody loads]"},
    )
    insecure: bool = field(
        default=False,
        metadata={"help": "Listen without TLS on addresses that other machines reach too."},
    )
    http: str | None = field(
        default=None,
        metadata={
            "help": "host:port (port 0: any free one) of /metrics, /healthz and, on a loopback address, the "
            "status page.  [default: none, and nothing is observed]"
        },
    )
    otel: bool = field(
        default=False,
        metadata={"help": "Send OpenTelemetry traces to where OTEL_EXPORTER_OTLP_ENDPOINT says."},
    )
    policies: tuple[Selection, ...] = ()
    """What to load; empty: the current version of every policy."""
    canaries: tuple[Canary, ...] = ()
    """Versions that get a share of their policy's requests."""
    poll: float | None = field(
        default=None,
        metadata={
            "help": "Look for new, changed and vanished policies and versions every so many seconds.  "
            "[default: never]"
        },
    )
    keep_versions: int = field(
        default=0,
        metadata={"help": "Replaced versions of each policy that stay loaded for requests that name them."},
    )
    backend: Backend = field(
        default="auto", metadata={"help": "Inference runtime; auto takes the best that is present."}
    )
    threads: int = field(default=1, metadata={"help": "CPU threads of one inference."})
    engine_cache: Path | None = field(
        default=None,
        metadata={"help": "Directory where TensorRT keeps the engines that it builds between starts."},
    )
    max_batch_size: int = field(default=64, metadata={"help": "Most rows of one inference and of one request."})
    max_queue_rows: int = field(
        default=1024,
        metadata={"help": "Most rows that wait per policy; more are refused (RESOURCE_EXHAUSTED)."},
    )
    max_queue_delay_us: int = field(
        default=0, metadata={"help": "Microseconds that an idle worker waits for a fuller batch."}
    )
    max_connections: int = field(
        default=16_384, metadata={"help": "Most connections at the same time; further ones are closed."}
    )
    max_calls_per_connection: int = field(
        default=16_384,
        metadata={"help": "Most calls and streams that one connection has open; further ones wait there."},
    )
    max_streams: int = field(
        default=16_384,
        metadata={"help": "Most streams at the same time; further ones are refused (RESOURCE_EXHAUSTED)."},
    )
    max_rate: float | None = field(
        default=None,
        metadata={
            "help": "Most requests a second of one client_id, or of one address without; more are refused "
            "(RESOURCE_EXHAUSTED).  [default: any]"
        },
    )
    latest_wins: bool = field(
        default=False,
        metadata={"help": "Whether a request takes the place of the waiting one of the same client_id."},
    )
    processes: int = field(
        default=1,
        metadata={
            "help": "Server processes that share the port, each with sessions, queues and limits of its own, "
            "for when one event loop is the limit."
        },
    )
    shares_ports: bool = False
    """Other processes listen on the same ports; set for those of `processes`."""
    workers: int | None = field(
        default=None,
        metadata={"help": "Most policies that compute at the same moment, in turn.  [default: all]"},
    )
    max_action_step: float | None = field(
        default=None,
        metadata={
            "help": "Largest change of each action element from one step of a client to its next, as a "
            "fraction of the element's range.  [default: any]"
        },
    )
    fallback: Fallback = field(
        default="fail",
        metadata={
            "help": "What a client gets when the policy fails or its action is unsound: an error, its last "
            "action, or the centre of the bounds."
        },
    )
    record: Path | None = field(
        default=None,
        metadata={"help": "Directory where every request and its answer are recorded.  [default: nowhere]"},
    )
    record_max_mb: int = field(
        default=1024, metadata={"help": "Megabytes of records that are kept; the oldest go first."}
    )
    drain_seconds: float = field(
        default=10.0, metadata={"help": "Seconds that SIGTERM leaves for queued requests to finish."}
    )

    def __post_init__(self) -> None:
        if self.threads < 1 or not 0 <= self.drain_seconds <= MAX_SECONDS:
            raise ConfigError(
                f"wanted threads >= 1 and drain_seconds from 0 to {MAX_SECONDS}, a day, got {self.threads} and "
                f"{self.drain_seconds}"
            )
        if (self.poll is not None and not 0 < self.poll <= MAX_SECONDS) or self.keep_versions < 0:
            raise ConfigError(
                f"wanted poll > 0 and at most {MAX_SECONDS} s, a day, and keep_versions >= 0, got "
                f"{self.poll} s and {self.keep_versions}"
            )
        if not 0 <= self.max_queue_delay_us <= 1_000_000 * MAX_SECONDS:
            raise ConfigError(
                f"wanted max_queue_delay_us from 0 to {1_000_000 * MAX_SECONDS}, a day, got "
                f"{self.max_queue_delay_us!s:.40}; leave it out for none"
            )
        for limit in (self.max_connections, self.max_calls_per_connection, self.max_streams):
            if not 1 <= limit <= MAX_COUNT:
                raise ConfigError(
                    f"wanted max_connections, max_calls_per_connection and max_streams from 1 to {MAX_COUNT}, "
                    f"got {limit!s:.40}; leave it out for the default"
                )
        if self.max_rate is not None and not 0 < self.max_rate < float("inf"):
            raise ConfigError(
                f"wanted a finite max_rate > 0 requests a second, got {self.max_rate:g}; or leave it out"
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"wanted workers >= 1, got {self.workers}; leave it out for no limit")
        if self.record_max_mb < 1:
            raise ConfigError(f"wanted record_max_mb >= 1, got {self.record_max_mb}")
        # What one of the processes is given is its share already.
        if self.record is not None and not self.shares_ports and self.record_max_mb < self.processes:
            raise ConfigError(
                f"wanted record_max_mb of at least 1 for each of {self.processes} processes, got "
                f"{self.record_max_mb}; raise --record-max-mb, or start fewer"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            given = self.tls_cert or self.tls_key
            raise ConfigError(f"wanted --tls-cert and --tls-key together, got only {given}; give both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("wanted --tls-cert and --tls-key beside --tls-client-ca, got none; give both")
        self._check_processes()
        self._check_canaries()
        if not self.addresses:
            raise ConfigError("wanted at least one address such as 127.0.0.1:8001, got none")
        _ = self.limits, self.guard

    @property
    def limits(self) -> BatchLimits:
        """The same limits for every policy."""
        return BatchLimits(
            self.max_batch_size, self.max_queue_rows, 1e-6 * self.max_queue_delay_us, self.latest_wins
        )

    @property
    def guard(self) -> GuardLimits:
        """The same action guard for every policy."""
        return GuardLimits(self.max_action_step, self.fallback)

    @property
    def record_max_bytes(self) -> int:
        """`record_max_mb` in bytes."""
        return self.record_max_mb * 2**20

    def _check_processes(self) -> None:
        if self.processes < 1:
            raise ConfigError(f"wanted processes >= 1, got {self.processes}")
        if self.processes == 1:
            return
        if any(unix_path(address) for address in self.addresses):
            raise ConfigError(
                "wanted --processes 1 beside a unix socket, which processes cannot share; use a port"
            )
        if self.admin_token_file is not None:
            raise ConfigError(
                "wanted --processes 1 beside --admin-token-file, because a request to load would reach one "
                "process alone; let all of them follow the repository with --poll"
            )

    def _check_canaries(self) -> None:
        check_shares(self.canaries)
        served = {selection.name for selection in self.policies}
        strange = [canary for canary in self.canaries if served and canary.name not in served]
        if strange:
            raise ConfigError(
                f"wanted --canary of a policy that is served, got {strange[0]}; "
                f"add --policy {strange[0].name} or leave it out"
            )
