"""Traces of a real server, by OpenTelemetry's own SDK where it is installed."""

from __future__ import annotations

import sys
import threading

import grpc
import numpy as np
import pytest

from rsm_serve.commands import serve_cli as cli
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import open_policy
from rsm_serve.observe import tracing
from rsm_serve.observe.tracing import Tracer
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.pb import policy_pb2_grpc
from rsm_serve.server import PolicyServer, background_server
from tests.hang import HANG_S

ZEROS = np.zeros(4, "<f4").tobytes()
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_off_by_default_and_a_missing_extra_is_named(bundle_repo, capsys, monkeypatch):
    assert PolicyServer(ServerConfig(repo=bundle_repo))._tracer is None
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # as if it were not installed
    assert cli.main(["--repo", str(bundle_repo), "--otel"]) == 2
    assert capsys.readouterr().err.startswith('rsm-serve --otel needs: pip install "rsm-toolkit[otel]"')


def test_a_collector_that_is_gone_does_not_hold_up_the_exit(bundle_repo, monkeypatch):
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel, which the lock leaves out")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tracing, "CLOSE_S", 0.1)
    gone = threading.Event()
    config = ServerConfig.from_options(repo=bundle_repo, addresses=("127.0.0.1:0",), otel=True)
    with background_server(config) as server, grpc.insecure_channel(server.addresses[0]) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        assert len(stub.Act(pb.ActRequest(rows=1, obs=ZEROS), timeout=HANG_S).action) == 8
        assert server._tracer is not None
        monkeypatch.setattr(server._tracer._provider, "shutdown", gone.wait)
    assert not gone.is_set(), "the server ends while the last spans are still being sent"
    gone.set()


def test_a_request_is_a_span_with_queue_and_compute_under_the_callers(bundle_repo):
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel, which the lock leaves out")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    lane = Lane(open_policy(bundle_repo / "tiny"), BatchLimits())
    config = ServerConfig(repo=bundle_repo, addresses=("127.0.0.1:0",))
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("authorization", "Bearer secret"))
    with (
        background_server(config, [lane], tracer=Tracer(provider)) as server,
        grpc.insecure_channel(server.addresses[0]) as channel,
    ):
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        stub.Act(pb.ActRequest(rows=1, obs=ZEROS), timeout=HANG_S, metadata=metadata)
        requests = [pb.ActRequest(rows=1, obs=ZEROS)] * 2
        assert len(list(stub.ActStream(iter(requests), timeout=HANG_S))) == 2
        lane._policy.close()
        with pytest.raises(grpc.RpcError):
            stub.Act(pb.ActRequest(rows=1, obs=ZEROS), timeout=HANG_S)
    spans = exporter.get_finished_spans()
    names = [span.name for span in spans]
    assert names.count("rsm.v1.PolicyService/ActStream") == 2
    assert names.count("queue") == names.count("compute") == 3
    outer = next(span for span in spans if span.name == "rsm.v1.PolicyService/Act")
    assert (f"{outer.context.trace_id:032x}", f"{outer.parent.span_id:016x}") == (TRACE, PARENT)
    inner = {s.name: s for s in spans if s.parent and s.parent.span_id == outer.context.span_id}
    assert set(inner) == {"queue", "compute"}
    assert outer.start_time <= inner["queue"].start_time < inner["queue"].end_time
    assert inner["queue"].end_time <= inner["compute"].start_time < inner["compute"].end_time <= outer.end_time
    assert dict(outer.attributes) == {"rsm.policy": "tiny", "rsm.version": "1", "rsm.batch_rows": 1}
    assert spans[-1].status.description == "INTERNAL"
