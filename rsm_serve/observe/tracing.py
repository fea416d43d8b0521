"""OpenTelemetry traces: a span for each queued request, with a span for the queue and one for the graph inside.

Off by default. The gRPC metadata of a call gives its `traceparent`. OpenTelemetry's own variables say where the
traces go and how many are kept (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, ...). A span holds policy,
version and times, never an observation, noise or an action.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from rsm_common.errors import MissingExtraError
from rsm_serve.observe.settled import Settled

CLOSE_S = 2.0
TRACE_HEADERS = frozenset(("traceparent", "tracestate"))
"""Metadata of a call by which its trace goes on."""


class Tracer:
    """Records how requests spend their time.

    Args:
        provider: an OpenTelemetry TracerProvider; None: one that exports by OTLP over gRPC.

    Raises:
        MissingExtraError: OpenTelemetry, or a part of it, is not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            provider = provider or _exporting_provider()
        except ImportError as error:
            needed = 'rsm-serve --otel needs: pip install "rsm-toolkit[otel]"'
            raise MissingExtraError(f"{needed} ({error})") from None
        self._provider: Any = provider
        self._api: Any = trace
        self._extract: Any = TraceContextTextMapPropagator().extract
        self._tracer: Any = provider.get_tracer("rsm_serve")

    def settled(self, event: Settled) -> None:
        """Record a request that was queued; a request that was refused before has no span."""
        if event.rows is None:
            return
        headers = {key: value for key, value in event.metadata if key in TRACE_HEADERS}
        start_ns = event.arrived_unix_ns
        span = self._tracer.start_span(
            f"{event.service}/{event.method}",
            context=self._extract(headers),
            kind=self._api.SpanKind.SERVER,
            start_time=start_ns,
            attributes={"rsm.policy": event.policy, "rsm.version": event.version},
        )
        if event.given is None:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, event.code))
        elif span.is_recording():
            timing = event.given.answer.timing
            span.set_attribute("rsm.batch_rows", timing.batch_rows)
            formed_ns = start_ns + int(1e3 * event.given.queue_us)
            stacked_ns = formed_ns + int(1e3 * timing.batch_us)
            self._stage(span, "queue", start_ns, formed_ns)
            self._stage(span, "compute", stacked_ns, stacked_ns + int(1e3 * timing.compute_us))
        span.end()

    def close(self) -> None:
        """Send the last spans within `CLOSE_S`, so that a collector that is gone does not hold up an exit."""
        thread = threading.Thread(target=self._provider.shutdown, name="otel", daemon=True)
        thread.start()
        thread.join(CLOSE_S)

    def _stage(self, span: Any, name: str, start_ns: int, end_ns: int) -> None:
        context = self._api.set_span_in_context(span)
        self._tracer.start_span(name, context=context, start_time=start_ns).end(end_time=end_ns)


def _exporting_provider() -> Any:
    """Make a provider that exports in batches, from a thread of its own."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "rsm-serve")
    provider = TracerProvider(shutdown_on_exit=False)  # it would retry for half a minute; see Tracer.close
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
