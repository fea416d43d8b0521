"""OpenTelemetry traces: a span per queued request, with one for the queue and one for the graph inside.

Off unless asked for. A caller's `traceparent` is taken from the gRPC metadata. Where traces go, and how many of
them, is said by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, ...). Told are
policy, version and times, never an observation, noise or an action.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

from rsm_common.errors import MissingExtraError, wire_status
from rsm_common.policy import ActResult
from rsm_common.spec import PolicySpec
from rsm_serve.observe.settled import Answered

CLOSE_S = 2.0
_HEADERS = ("traceparent", "tracestate")


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

    def follow(
        self,
        future: asyncio.Future[Answered[ActResult]],
        name: str,
        spec: PolicySpec,
        metadata: Iterable[tuple[str, Any]] | None,
        *,
        started_s: float,
    ) -> None:
        """Record a queued request when it is settled; `started_s` is `time.perf_counter()` at its arrival."""
        headers = {key: value for key, value in metadata or () if key in _HEADERS}
        start_ns = time.time_ns() - int(1e9 * (time.perf_counter() - started_s))
        span = self._tracer.start_span(
            name,
            context=self._extract(headers),
            kind=self._api.SpanKind.SERVER,
            start_time=start_ns,
            attributes={"rsm.policy": spec.name, "rsm.version": spec.version},
        )
        future.add_done_callback(lambda done: self._settle(span, start_ns, done))

    def close(self) -> None:
        """Send what is left, for at most `CLOSE_S`: a collector that is gone must not hold up an exit."""
        thread = threading.Thread(target=self._provider.shutdown, name="otel", daemon=True)
        thread.start()
        thread.join(CLOSE_S)

    def _settle(self, span: Any, start_ns: int, done: asyncio.Future[Answered[ActResult]]) -> None:
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or error is not None:
            code = "CANCELLED" if error is None else wire_status(error)[0]
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, code))
        elif span.is_recording():
            answered = done.result()
            timing = answered.answer.timing
            span.set_attribute("rsm.batch_rows", timing.batch_rows)
            formed_ns = start_ns + int(1e3 * answered.queue_us)
            stacked_ns = formed_ns + int(1e3 * timing.batch_us)
            self._stage(span, "queue", start_ns, formed_ns)
            self._stage(span, "compute", stacked_ns, stacked_ns + int(1e3 * timing.compute_us))
        span.end()

    def _stage(self, span: Any, name: str, start_ns: int, end_ns: int) -> None:
        context = self._api.set_span_in_context(span)
        self._tracer.start_span(name, context=context, start_time=start_ns).end(end_time=end_ns)


def _exporting_provider() -> Any:
    """Exports in batches, from a thread of its own."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    os.environ.setdefault("OTEL_SERVICE_NAME", "rsm-serve")
    provider = TracerProvider(shutdown_on_exit=False)  # that would retry for half a minute; see Tracer.close
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
