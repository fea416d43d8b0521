"""What `rsm-serve` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rsm_serve.batcher import BatchLimits
from rsm_serve.errors import ConfigError
from rsm_serve.registry import Selection
from rsm_serve.sessions.choice import Backend

DEFAULT_ADDRESS = "127.0.0.1:8001"


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    Raises:
        ConfigError: a value is out of range.
    """

    repo: Path = field(metadata={"help": "Repository of bundles, as rsm-export writes it."})
    addresses: tuple[str, ...] = (DEFAULT_ADDRESS,)
    """host:port (port 0: any free one) or unix:/path."""
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
    """What to load; empty: the newest version of every policy."""
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
    drain_seconds: float = field(
        default=10.0, metadata={"help": "Seconds that SIGTERM leaves for queued requests to finish."}
    )

    def __post_init__(self) -> None:
        if self.threads < 1 or self.drain_seconds < 0:
            raise ConfigError(
                f"wanted threads >= 1 and drain_seconds >= 0, got {self.threads} and {self.drain_seconds}"
            )
        if not self.addresses:
            raise ConfigError("wanted at least one address such as 127.0.0.1:8001, got none")
        _ = self.limits

    @property
    def limits(self) -> BatchLimits:
        """The same limits for every policy."""
        return BatchLimits(self.max_batch_size, self.max_queue_rows, 1e-6 * self.max_queue_delay_us)
