"""Metadata, configuration and statistics of the server and its policies."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import json_format, text_format
from rsm_export.bundles.triton_config import triton_config
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from rsm_serve.client import PolicyClient, check_health
from rsm_serve.pb import oip_pb2, oip_pb2_grpc
from tests.bundles import make_spec
from tests.rsm_serve.rpc.oip.ask import (
    NOT_OFFERED,
    OBS,
    TIMEOUT_S,
    infer_sync,
    parameters,
    raw_stub,
    tensor,
)


class TestDescriptions:
    def test_server(self, client):
        assert client.is_server_live()
        assert client.is_server_ready()
        metadata = client.get_server_metadata()
        assert metadata.name == "rsm-serve"
        assert re.fullmatch(r"\d+\.\d+\.\d+", metadata.version)
        # Each of them has its tests here; the others of Triton's are not offered.
        assert set(metadata.extensions) == {"model_configuration", "parameters", "statistics"}

    def test_readiness_of_models(self, client):
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny", "1")
        assert not client.is_model_ready("tiny", "3")
        assert not client.is_model_ready("nope")

    def test_health_knows_the_service(self, address):
        assert check_health(address, "inference.GRPCInferenceService", timeout_s=TIMEOUT_S) == "SERVING"

    def test_metadata_shows_the_batch_axis(self, client):
        metadata = client.get_model_metadata("tiny", "1")
        assert (metadata.name, list(metadata.versions)) == ("tiny", ["1", "2"])
        assert metadata.platform == "onnxruntime_onnx"
        shown = {t.name: (t.datatype, list(t.shape)) for t in (*metadata.inputs, *metadata.outputs)}
        assert shown == {
            "obs": ("FP32", [-1, 4]),
            "noise": ("FP32", [-1, 3, 2, 2]),
            "seed": ("UINT64", [-1, 1]),
            "action": ("FP32", [-1, 2]),
            "q": ("FP32", [-1, 1]),
        }

    @pytest.mark.parametrize(("name", "version"), [("tiny", "1"), ("other", "3")])
    def test_metadata_configuration_and_answers_agree(self, client, address, name, version):
        metadata = client.get_model_metadata(name, version)
        config = client.get_model_config(name, version).config
        for described, configured in ((metadata.inputs, config.input), (metadata.outputs, config.output)):
            assert {t.name: list(t.shape) for t in described} == {t.name: [-1, *t.dims] for t in configured}
            types = {t.name: f"TYPE_{t.datatype}" for t in described}
            assert types == {t.name: model_config_pb2.DataType.Name(t.data_type) for t in configured}
        obs = np.zeros((5, metadata.inputs[0].shape[1]), np.float32)
        response = infer_sync(address, {"obs": obs}, model_name=name).get_response()
        answered = [(t.name, t.datatype, list(t.shape)) for t in response.outputs]
        assert answered == [(t.name, t.datatype, [5, *t.shape[1:]]) for t in metadata.outputs]

    def test_configuration(self, client, server):
        config = client.get_model_config("tiny", "1").config
        assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 64)
        assert list(config.version_policy.specific.versions) == [1, 2]
        assert {t.name: t.optional for t in config.input} == {"obs": False, "noise": True, "seed": True}
        assert [t.name for t in (*config.input, *config.output) if t.HasField("reshape")] == ["seed", "q"]
        assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
        assert config.dynamic_batching.default_queue_policy.allow_timeout_override
        assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_CPU]
        assert json.loads(config.parameters["policy_json"].string_value)["env_id"] == "Tiny-v0"
        as_dict = client.get_model_config("tiny", as_json=True)["config"]
        assert as_dict["input"][1]["dims"] == ["3", "2", "2"]

    @pytest.mark.parametrize("has_q", [True, False])
    def test_triton_serves_the_same_bundle_with_the_same_shapes(self, client, has_q):
        name, version = ("tiny", "2") if has_q else ("other", "3")
        obs_size = 4 if has_q else 6
        spec = make_spec(name, version, obs_size=obs_size, has_q=has_q)
        tritons = text_format.Parse(triton_config(spec), model_config_pb2.ModelConfig())
        ours = client.get_model_config(name, version).config
        assert list(ours.output) == list(tritons.output)
        # Ours draws noise, so that is optional; and it has seeds.
        ours.input[1].ClearField("optional")
        assert list(ours.input)[:2] == list(tritons.input)
        assert (ours.platform, ours.max_batch_size) == (tritons.platform, tritons.max_batch_size)

    def test_properties(self, address):
        """Not in tritonclient's messages: read with the file in protos/, through our own code."""
        with grpc.insecure_channel(address) as channel:
            stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
            answer = stub.ModelMetadata(oip_pb2.ModelMetadataRequest(name="tiny"), timeout=TIMEOUT_S)
        assert answer.properties["env_id"] == "Tiny-v0"
        assert answer.properties["runtime"].startswith("onnxruntime")

    @pytest.mark.parametrize(
        "call",
        [
            lambda client: client.get_model_metadata("nope"),
            lambda client: client.get_model_config("tiny", "7"),
            lambda client: client.get_inference_statistics("nope"),
            lambda client: client.get_inference_statistics("tiny", "7"),
            lambda client: client.infer("nope", [tensor(triton, "obs", OBS)]),
        ],
    )
    def test_what_is_not_there_is_not_found(self, client, call):
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND\] wanted (policy 'nope'|version '7')"):
            call(client)

    @pytest.mark.parametrize("method", NOT_OFFERED)
    def test_the_rest_of_triton_is_unimplemented(self, client, method):
        text = rf"UNIMPLEMENTED\] wanted one of ServerLive.*, got {method}, which this server does not offer"
        with pytest.raises(InferenceServerException, match=text):
            NOT_OFFERED[method](client)

    def test_all_of_triton_is_offered_or_refused(self):
        theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
        ours = oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
        assert set(theirs) == set(ours) | set(NOT_OFFERED)


class TestStatistics:
    def test_counts_by_request_row_and_batch(self, rig):
        (fresh,) = rig.client.get_inference_statistics("tiny").model_stats
        assert (fresh.last_inference, fresh.inference_count, fresh.execution_count) == (0, 0, 0)
        rig.hold_worker()
        for rows in (1, 3, 2):
            rig.ask(rows)
            rig.wait_queued({1: 1, 3: 4, 2: 6}[rows])
        rig.ask(1)
        assert "RESOURCE_EXHAUSTED" in rig.outcome().status()
        rig.session.open.set()
        assert {parameters(rig.outcome())["batch_rows"] for _ in range(4)} == {1, 4, 2}
        (stats,) = rig.client.get_inference_statistics().model_stats
        assert (stats.name, stats.version) == ("tiny", "1")
        assert (stats.inference_count, stats.execution_count) == (7, 3)
        totals = stats.inference_stats
        assert (totals.success.count, totals.fail.count) == (4, 1)
        parts = [totals.queue, totals.compute_input, totals.compute_infer, totals.compute_output]
        assert [part.count for part in parts] == [4, 4, 4, 4]
        assert min(part.ns for part in parts[:3]) > 0
        assert sum(part.ns for part in parts) <= totals.success.ns
        assert {batch.batch_size: batch.compute_infer.count for batch in stats.batch_stats} == {
            1: 1,
            4: 1,
            2: 1,
        }
        # The batch of 4 had two requests: its time counts once per request, and once per batch.
        by_size = {batch.batch_size: batch.compute_infer.ns for batch in stats.batch_stats}
        assert totals.compute_infer.ns == by_size[1] + 2 * by_size[4] + by_size[2]
        assert stats.last_inference > 1_600_000_000_000

    def test_failed_batches_are_failures(self, rig):
        rig.session.failure = RuntimeError("secret")
        rig.ask(2)
        failed = rig.outcome()
        assert "INTERNAL" in failed.status()
        assert "secret" not in failed.message()
        (stats,) = rig.client.get_inference_statistics("tiny", "1").model_stats
        assert (stats.inference_stats.fail.count, stats.inference_stats.queue.count) == (1, 0)
        assert (stats.inference_count, stats.execution_count) == (0, 0)

    def test_every_version_has_its_own(self, client, address):
        def successes() -> dict[tuple[str, str], int]:
            stats = client.get_inference_statistics().model_stats
            return {(s.name, s.version): s.inference_stats.success.count for s in stats}

        before = successes()
        assert set(before) == {("tiny", "1"), ("tiny", "2"), ("other", "3")}
        for _ in range(3):
            infer_sync(address, {"obs": OBS}, model_version="1")
        with PolicyClient(address, policy="tiny", version=1, timeout_s=TIMEOUT_S) as own:
            own.act(OBS[0])
        after = successes()
        assert {key: after[key] - before[key] for key in after} == {
            ("tiny", "1"): 4,
            ("tiny", "2"): 0,
            ("other", "3"): 0,
        }
        assert [s.version for s in client.get_inference_statistics("tiny").model_stats] == ["1", "2"]
        assert [s.version for s in client.get_inference_statistics("tiny", "2").model_stats] == ["2"]

    def test_aio(self, address):
        async def main() -> Any:
            async with triton_aio.InferenceServerClient(address) as client:
                return await client.get_inference_statistics("other", as_json=True)

        (stats,) = asyncio.run(main())["model_stats"]
        assert (stats["name"], stats["version"]) == ("other", "3")


def as_perf_analyzer_reads(message: Any) -> dict[str, Any]:
    """Its JSON: names of the fields as they are, and fields without presence always there."""
    read: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return read


class TestPerfAnalyzer:
    """Its sequence of calls, and what it takes from each, with observations from a JSON file (--input-data)."""

    def test_its_calls(self, address):
        with raw_stub(address) as stub:
            extensions = stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=TIMEOUT_S).extensions
            ask = service_pb2.ModelMetadataRequest(name="tiny", version="1")
            metadata = as_perf_analyzer_reads(stub.ModelMetadata(ask, timeout=TIMEOUT_S))
            ask = service_pb2.ModelConfigRequest(name="tiny", version="1")
            config = as_perf_analyzer_reads(stub.ModelConfig(ask, timeout=TIMEOUT_S))["config"]
            assert "statistics" in extensions  # or it asks for none
            assert "sequence_batching" not in config
            assert "dynamic_batching" in config
            assert config["model_transaction_policy"]["decoupled"] is False
            assert int(config["max_batch_size"]) >= 8
            optional = {tensor["name"]: tensor["optional"] for tensor in config["input"]}
            requests = self.requests(metadata, [name for name in optional if not optional[name]])
            before = self.statistics(stub)
            for request in requests:
                stub.ModelInfer(request, timeout=TIMEOUT_S)
            streamed = list(stub.ModelStreamInfer(iter(requests), timeout=TIMEOUT_S))
            after = self.statistics(stub)
        assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in streamed)
        assert [answer.infer_response.id for answer in streamed] == [request.id for request in requests]
        changes = {key: after[key] - before[key] for key in after}
        assert changes["success"] == changes["queue"] == changes["compute_infer"] == 2 * len(requests)
        assert changes["inference_count"] == 2 * 8 * len(requests)
        assert 0 < changes["execution_count"] <= 2 * len(requests)
        assert changes["fail"] == 0

    @staticmethod
    def requests(metadata: dict[str, Any], names: list[str]) -> list[Any]:
        """Five with a batch of 8, of the inputs that are not optional."""
        requests = []
        for number in range(5):
            request = service_pb2.ModelInferRequest(model_name="tiny", model_version="1", id=str(number))
            request.parameters["triton_enable_empty_final_response"].bool_param = True
            for given in metadata["inputs"]:
                batch_axis, *dims = map(int, given["shape"])
                assert batch_axis == -1
                if given["name"] in names:
                    request.inputs.add(name=given["name"], datatype=given["datatype"], shape=[8, *dims])
                    request.raw_input_contents.append(bytes(8 * 4 * int(np.prod(dims))))
            for output in metadata["outputs"]:
                request.outputs.add(name=output["name"])
            requests.append(request)
        return requests

    @staticmethod
    def statistics(stub: Any) -> dict[str, int]:
        ask = service_pb2.ModelStatisticsRequest(name="tiny", version="1")
        (stats,) = stub.ModelStatistics(ask, timeout=TIMEOUT_S).model_stats
        totals = stats.inference_stats
        return {
            "inference_count": stats.inference_count,
            "execution_count": stats.execution_count,
            "success": totals.success.count,
            "fail": totals.fail.count,
            "queue": totals.queue.count,
            "compute_infer": totals.compute_infer.count,
        }
