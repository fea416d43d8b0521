"""The settings of `rsm-serve`, in groups that each check themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsm_common.commandline import from_options
from rsm_common.errors import ConfigError
from rsm_serve.addresses import unix_path
from rsm_serve.engine.action_guard import GuardLimits
from rsm_serve.engine.canary import Canary, check_shares
from rsm_serve.engine.lane import Selection
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.security.settings import SecuritySettings
from rsm_serve.sessions.choice import Backend

DEFAULT_ADDRESS = "127.0.0.1:8001"
MAX_SECONDS = 86_400
"""The largest time that can be set, a day. Timers overflow at much larger values, and NaN is in no range."""
MAX_COUNT = 2**31 - 1
"""The largest number that gRPC takes for a limit."""

VERSIONS = "Policies and versions"
"""Title of a section of the help text."""


@dataclass(frozen=True)
class VersionSettings:
    """What is loaded, and when that changes.

    Raises:
        ConfigError: a number is out of range, or a canary is not of a policy that is served.
    """

    policies: tuple[Selection, ...] = ()
    """What to load; empty: the current version of every policy."""
    canaries: tuple[Canary, ...] = ()
    """Versions that get a share of their policy's requests."""
    poll: float | None = field(
        default=None,
        metadata={
            "help": "Seconds between two checks for new, changed and removed policies and versions.  "
            "[default: never]"
        },
    )
    keep_versions: int = field(
        default=0,
        metadata={
            "help": "Number of replaced versions per policy that stay loaded, for requests that name them."
        },
    )

    def __post_init__(self) -> None:
        if self.poll is not None and not 0 < self.poll <= MAX_SECONDS:
            raise ConfigError(
                f"wanted poll > 0 and at most {MAX_SECONDS} s, a day, got {self.poll}; leave it out for never"
            )
        if self.keep_versions < 0:
            raise ConfigError(f"wanted keep_versions >= 0, got {self.keep_versions}; leave it out for none")
        check_shares(self.canaries)
        served = {selection.name for selection in self.policies}
        strange = [canary for canary in self.canaries if served and canary.name not in served]
        if strange:
            raise ConfigError(
                f"wanted --canary of a policy that is served, got {strange[0]}; "
                f"add --policy {strange[0].name} or leave it out"
            )


@dataclass(frozen=True)
class InferenceSettings:
    """How a policy computes.

    Raises:
        ConfigError: a number is out of range.
    """

    backend: Backend = field(
        default="auto", metadata={"help": "Inference runtime; auto takes the best that is installed."}
    )
    threads: int = field(default=1, metadata={"help": "CPU threads of one inference."})
    workers: int | None = field(
        default=None,
        metadata={"help": "Largest number of policies that compute at the same moment.  [default: all]"},
    )
    engine_cache: Path | None = field(
        default=None,
        metadata={"help": "Directory where TensorRT keeps the engines that it builds between starts."},
    )

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"wanted threads >= 1, got {self.threads}; leave it out for 1")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"wanted workers >= 1, got {self.workers}; leave it out for no limit")


@dataclass(frozen=True)
class BatchSettings:
    """How requests are gathered into batches; the same for every policy.

    Raises:
        ConfigError: a number is out of range.
    """

    max_batch_size: int = field(
        default=BatchLimits.max_batch_size,
        metadata={"help": "Largest number of rows of one inference, and of one request."},
    )
    max_queue_rows: int = field(
        default=BatchLimits.max_queue_rows,
        metadata={
            "help": "Largest number of rows that wait per policy; further ones are refused "
            "(RESOURCE_EXHAUSTED)."
        },
    )
    max_queue_delay_us: int = field(
        default=0, metadata={"help": "Microseconds that an idle worker waits for a fuller batch."}
    )
    latest_wins: bool = field(
        default=False,
        metadata={"help": "Replace the waiting request of a client_id by its newer request."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.max_queue_delay_us <= 1_000_000 * MAX_SECONDS:
            raise ConfigError(
                f"wanted max_queue_delay_us from 0 to {1_000_000 * MAX_SECONDS}, a day, got "
                f"{self.max_queue_delay_us!s:.40}; leave it out for none"
            )
        _ = self.limits

    @property
    def limits(self) -> BatchLimits:
        """The settings as a queue takes them."""
        return BatchLimits(
            self.max_batch_size, self.max_queue_rows, 1e-6 * self.max_queue_delay_us, self.latest_wins
        )


@dataclass(frozen=True)
class LimitSettings:
    """How much callers may ask for.

    Raises:
        ConfigError: a number is out of range.
    """

    max_connections: int = field(
        default=16_384,
        metadata={"help": "Largest number of connections at the same time; further ones are closed."},
    )
    max_calls_per_connection: int = field(
        default=16_384,
        metadata={"help": "Largest number of open calls and streams of one connection; further ones wait."},
    )
    max_streams: int = field(
        default=16_384,
        metadata={
            "help": "Largest number of streams at the same time; further ones are refused (RESOURCE_EXHAUSTED)."
        },
    )
    max_rate: float | None = field(
        default=None,
        metadata={
            "help": "Largest number of requests a second of one client_id, or of one address where requests "
            "have no client_id; further ones are refused (RESOURCE_EXHAUSTED).  [default: any]"
        },
    )

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class RecordingSettings:
    """Where requests and answers are recorded.

    Raises:
        ConfigError: a number is out of range.
    """

    directory: Path | None = field(
        default=None,
        metadata={
            "option": "record",
            "help": "Directory where every request and its answer are recorded.  [default: no recording]",
        },
    )
    max_mb: int = field(
        default=1024,
        metadata={
            "option": "record_max_mb",
            "help": "Megabytes of records that are kept; the oldest are removed first.",
        },
    )

    def __post_init__(self) -> None:
        if self.max_mb < 1:
            raise ConfigError(f"wanted record_max_mb >= 1, got {self.max_mb}")

    @property
    def max_bytes(self) -> int:
        """`max_mb` in bytes."""
        return self.max_mb * 2**20


@dataclass(frozen=True)
class MonitorSettings:
    """How the server can be observed."""

    http: str | None = field(
        default=None,
        metadata={
            "help": "host:port (port 0: any free one) of /metrics, /healthz and, on a loopback address, the "
            "status page.  [default: none]"
        },
    )
    otel: bool = field(
        default=False,
        metadata={"help": "Send OpenTelemetry traces to the address in OTEL_EXPORTER_OTLP_ENDPOINT."},
    )


@dataclass(frozen=True)
class ProcessSettings:
    """Number of server processes, and the time to drain them.

    Raises:
        ConfigError: a number is out of range.
    """

    count: int = field(
        default=1,
        metadata={
            "option": "processes",
            "help": "Server processes that share the port. Each has its own sessions, queues and limits. Use "
            "them if one event loop limits the throughput.",
        },
    )
    shares_ports: bool = False
    """Other processes listen on the same ports; set for each of the processes."""
    drain_seconds: float = field(
        default=10.0, metadata={"help": "Seconds that queued requests have after SIGTERM to finish."}
    )

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"wanted processes >= 1, got {self.count}")
        if not 0 <= self.drain_seconds <= MAX_SECONDS:
            raise ConfigError(
                f"wanted drain_seconds from 0 to {MAX_SECONDS}, a day, got {self.drain_seconds}; "
                "0 answers nothing that waits"
            )


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    Raises:
        ConfigError: two settings contradict each other.
    """

    repo: Path = field(
        metadata={"help": "Repository of bundles, as rsm-export writes it.", "group": VERSIONS},
    )
    versions: VersionSettings = field(default=VersionSettings(), metadata={"group": VERSIONS})
    addresses: tuple[str, ...] = (DEFAULT_ADDRESS,)
    """host:port (port 0: any free one) or unix:/path."""
    security: SecuritySettings = field(default=SecuritySettings(), metadata={"group": "Security"})
    inference: InferenceSettings = field(default=InferenceSettings(), metadata={"group": "Inference"})
    batching: BatchSettings = field(default=BatchSettings(), metadata={"group": "Batching"})
    limits: LimitSettings = field(default=LimitSettings(), metadata={"group": "Limits"})
    guard: GuardLimits = field(default=GuardLimits(), metadata={"group": "Action guard"})
    recording: RecordingSettings = field(default=RecordingSettings(), metadata={"group": "Recording"})
    monitor: MonitorSettings = field(default=MonitorSettings(), metadata={"group": "Monitoring"})
    process: ProcessSettings = field(default=ProcessSettings(), metadata={"group": "Processes"})

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ConfigError("wanted at least one address such as 127.0.0.1:8001, got none")
        if self.process.count > 1:
            self._check_shared()

    @classmethod
    def from_options(cls, repo: Path, **options: Any) -> ServerConfig:
        """Make a configuration of values by option name: `from_options(repo, max_batch_size=8, poll=1.0)`.

        Raises:
            TypeError: there is no such option.
            ConfigError: a value is out of range, or two contradict each other.
        """
        return from_options(cls, {"repo": repo, **options})

    def _check_shared(self) -> None:
        """Check that several processes can share what is configured."""
        if any(unix_path(address) for address in self.addresses):
            raise ConfigError(
                "wanted --processes 1 beside a unix socket, which processes cannot share; use a port"
            )
        if self.security.admin_token_file is not None:
            raise ConfigError(
                "wanted --processes 1 beside --admin-token-file, because a request to load would reach one "
                "process alone; let all of them follow the repository with --poll"
            )
        # The setting of a process that shares its ports is its share already.
        shares = not self.process.shares_ports and self.recording.directory is not None
        if shares and self.recording.max_mb < self.process.count:
            raise ConfigError(
                f"wanted record_max_mb of at least 1 for each of {self.process.count} processes, got "
                f"{self.recording.max_mb}; raise --record-max-mb, or start fewer"
            )
