"""The Open Inference Protocol against a real server, with the real tritonclient where it can say it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import descriptor_pool, json_format, message_factory, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from rsm_export.bundles.triton_config import triton_config
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from rsm_common.errors import BundleError, PolicyNotFoundError
from rsm_common.seeds import DETERMINISTIC_SEED, draw_noise, expand_seed
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import PolicyClient, check_health
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane, Selection
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy, open_policy
from rsm_serve.pb import oip_pb2, oip_pb2_grpc
from rsm_serve.server import PolicyServer, background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_spec, write_bundle
from tests.rsm_serve.test_server import ANY_PORT, Gated, wait_until

DTYPES = {"float32": "FP32", "uint64": "UINT64", "float64": "FP64", "int64": "INT64"}
OBS = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[PolicyServer]:
    """The policies tiny:1, tiny:2 and other:3, which has no critic."""
    repo = tmp_path_factory.mktemp("repository")
    for spec in (
        make_spec("tiny", "1"),
        make_spec("tiny", "2"),
        make_spec("other", "3", obs_size=6, has_q=False),
    ):
        write_bundle(repo, spec)
    policies = (Selection("tiny", 1), Selection("tiny"), Selection("other"))
    config = ServerConfig.from_options(repo=repo, addresses=ANY_PORT, policies=policies, backend="onnxruntime")
    with background_server(config) as server:
        yield server


@pytest.fixture
def address(server) -> str:
    return str(server.addresses[0])


@pytest.fixture
def client(address) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


@contextlib.contextmanager
def raw_stub(address: str) -> Iterator[Any]:
    """tritonclient's own stub and messages: for what its client class cannot say."""
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> LocalPolicy:
    repo = tmp_path_factory.mktemp("local")
    return open_policy(write_bundle(repo, make_spec("tiny", "2")), "onnxruntime")


def tensor(module: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    made = module.InferInput(name, list(array.shape), DTYPES[str(array.dtype)])
    made.set_data_from_numpy(array)
    return made


def asked(module: Any, arrays: dict[str, Any], outputs: list[str] | None) -> dict[str, Any]:
    return {
        "inputs": [tensor(module, name, array) for name, array in arrays.items()],
        "outputs": None if outputs is None else [module.InferRequestedOutput(name) for name in outputs],
    }


def infer_sync(address: str, arrays: dict[str, Any], outputs: list[str] | None = None, **options: Any) -> Any:
    with triton.InferenceServerClient(address) as client:
        return client.infer(
            options.pop("model_name", "tiny"),
            client_timeout=TIMEOUT_S,
            **asked(triton, arrays, outputs),
            **options,
        )


def infer_aio(address: str, arrays: dict[str, Any], outputs: list[str] | None = None, **options: Any) -> Any:
    async def main() -> Any:
        async with triton_aio.InferenceServerClient(address) as client:
            return await client.infer(
                options.pop("model_name", "tiny"),
                client_timeout=TIMEOUT_S,
                **asked(triton_aio, arrays, outputs),
                **options,
            )

    return asyncio.run(main())


def infer_stream(address: str, arrays: dict[str, Any], outputs: list[str] | None = None, **options: Any) -> Any:
    (outcome,) = stream_sync(address, [asked(triton, arrays, outputs) | options])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def infer_aio_stream(
    address: str, arrays: dict[str, Any], outputs: list[str] | None = None, **options: Any
) -> Any:
    (outcome,) = stream_aio(address, [asked(triton_aio, arrays, outputs) | options])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def stream_sync(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    """The results and errors of one stream, in the order in which they came."""
    outcomes: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: outcomes.put(error or result), stream_timeout=TIMEOUT_S)
        for request in requests:
            client.async_stream_infer(**{"model_name": "tiny"} | request)
        answers = [outcomes.get(timeout=TIMEOUT_S) for _ in requests]
        client.stop_stream()
    assert outcomes.empty()
    return answers


def stream_aio(address: str, requests: list[dict[str, Any]]) -> list[Any]:
    async def main() -> list[Any]:
        async def given() -> Any:
            for request in requests:
                yield {"model_name": "tiny"} | request

        async with triton_aio.InferenceServerClient(address) as client:
            answers = client.stream_infer(given(), stream_timeout=TIMEOUT_S)
            return [error or result async for result, error in answers]

    return asyncio.run(main())


def parameters(result: Any) -> dict[str, Any]:
    found = {}
    for name, value in result.get_response().parameters.items():
        found[name] = getattr(value, value.WhichOneof("parameter_choice"))
    return found


Infer = Callable[..., Any]
CLIENTS = [infer_sync, infer_aio, infer_stream, infer_aio_stream]


@pytest.fixture(params=CLIENTS, ids=lambda function: function.__name__.removeprefix("infer_"))
def infer(request, address) -> Infer:
    """Each way in which tritonclient asks."""
    return lambda *arguments, **options: request.param(address, *arguments, **options)


class TestInfer:
    def test_answers_equal_the_local_policys(self, infer, local):
        result = infer({"obs": OBS}, request_id="step 7", parameters={"seed": 5})
        here = local.act(OBS, seed=5)
        assert np.allclose(result.as_numpy("action"), here.action, atol=1e-6)
        assert np.allclose(result.as_numpy("q"), here.q[:, None], atol=1e-6)
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == ("step 7", "tiny", "2")
        told = parameters(result)
        assert told["version"] == "2"
        assert told["seed"] == ",".join(map(str, expand_seed(5, 9)))
        assert told["batch_rows"] == 9
        assert min(told["queue_us"], told["batch_us"], told["compute_us"]) > 0

    def test_contents_are_raw_and_in_the_order_of_the_outputs(self, infer):
        both = infer({"obs": OBS[:2]}).get_response()
        assert [output.name for output in both.outputs] == ["action", "q"]
        assert [len(raw) for raw in both.raw_output_contents] == [16, 8]
        assert [list(output.shape) for output in both.outputs] == [[2, 2], [2, 1]]
        assert not any(output.HasField("contents") for output in both.outputs)
        turned = infer({"obs": OBS[:2]}, ["q", "action"]).get_response()
        assert [output.name for output in turned.outputs] == ["q", "action"]
        assert [len(raw) for raw in turned.raw_output_contents] == [8, 16]
        alone = infer({"obs": OBS[:2]}, ["q"])
        assert np.allclose(alone.as_numpy("q")[:, 0], OBS[:2].sum(1), atol=1e-5)
        assert alone.as_numpy("action") is None

    def test_the_order_of_inputs_is_free(self, infer, local):
        noise = draw_noise(expand_seed(3, 2), local.spec.noise_shape)
        result = infer({"noise": noise, "obs": OBS[:2]})
        assert np.allclose(result.as_numpy("action"), local.act(OBS[:2], noise=noise).action, atol=1e-6)
        assert "seed" not in parameters(result)

    def test_errors_have_a_status_and_both_sides_of_the_story(self, infer):
        with pytest.raises(InferenceServerException) as caught:
            infer({"obs": np.zeros((2, 3), np.float32)})
        message = str(caught.value)
        assert "INVALID_ARGUMENT" in message
        assert "wanted input 'obs' of shape [B, 4] with B >= 1, got [2, 3]" in message

    def test_a_policy_without_critics_has_no_q(self, infer):
        obs = np.zeros((1, 6), np.float32)
        response = infer({"obs": obs}, model_name="other").get_response()
        assert [output.name for output in response.outputs] == ["action"]
        with pytest.raises(InferenceServerException, match="outputs 'action' at most once, got 'q'"):
            infer({"obs": obs}, ["q"], model_name="other")

    def test_versions_are_numeric_strings(self, address):
        for asked_for, answered in (("1", "1"), ("2", "2"), ("", "2")):
            response = infer_sync(address, {"obs": OBS}, model_version=asked_for).get_response()
            assert response.model_version == answered
        for version in ("3", "x", "-1"):
            with pytest.raises(InferenceServerException, match=f"NOT_FOUND.*version '{version}'"):
                infer_sync(address, {"obs": OBS}, model_version=version)


class TestSeeds:
    @pytest.mark.parametrize("shape", [(9,), (9, 1)])
    def test_one_per_row(self, address, local, shape):
        seeds = expand_seed(2**64 - 1, 9)
        result = infer_sync(address, {"obs": OBS, "seed": seeds.reshape(shape)})
        assert np.allclose(result.as_numpy("action"), local.act(OBS, seed=seeds).action, atol=1e-6)

    @pytest.mark.parametrize("seed", [7, 0, "7", str(2**64 - 1)])
    def test_one_for_all_rows(self, address, local, seed):
        result = infer_sync(address, {"obs": OBS}, parameters={"seed": seed})
        assert np.allclose(result.as_numpy("action"), local.act(OBS, seed=int(seed)).action, atol=1e-6)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_what_the_answer_tells_replays_it(self, address, rows):
        first = infer_sync(address, {"obs": OBS[:rows]})
        request = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[OBS[:rows].tobytes()])
        request.inputs.add(name="obs", datatype="FP32", shape=[rows, 4])
        request.parameters["seed"].CopyFrom(first.get_response().parameters["seed"])
        with raw_stub(address) as stub:
            second = triton.InferResult(stub.ModelInfer(request, timeout=TIMEOUT_S))
        assert np.array_equal(first.as_numpy("action"), second.as_numpy("action"))
        third = infer_sync(address, {"obs": OBS[:rows]})
        assert parameters(third)["seed"] != parameters(first)["seed"]

    def test_deterministic(self, address):
        result = infer_sync(address, {"obs": OBS[:1]}, parameters={"deterministic": True})
        assert parameters(result)["seed"] == DETERMINISTIC_SEED


def message(**fields: Any) -> service_pb2.ModelInferRequest:
    """A good request for two rows of tiny, but for the given fields."""
    parameters = fields.pop("parameters", {})
    obs = {"name": "obs", "datatype": "FP32", "shape": [2, 4]}
    request = service_pb2.ModelInferRequest(
        **{"model_name": "tiny", "inputs": [obs], "raw_input_contents": [bytes(32)]} | fields
    )
    for name, (kind, value) in parameters.items():
        setattr(request.parameters[name], kind, value)
    return request


def obs_input(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "obs", "datatype": "FP32", "shape": [2, 4]} | fields]}


def two_inputs(shape: list[int], content: bytes, name: str = "noise", datatype: str = "FP32") -> dict[str, Any]:
    second = {"name": name, "datatype": datatype, "shape": shape}
    return {"inputs": [*obs_input()["inputs"], second], "raw_input_contents": [bytes(32), content]}


class TestContents:
    def test_typed_contents_are_taken_too(self, address, local):
        seeds = [2**64 - 1, 3]
        request = message(
            inputs=[
                {
                    "name": "obs",
                    "datatype": "FP32",
                    "shape": [2, 4],
                    "contents": {"fp32_contents": OBS[:2].flatten().tolist()},
                },
                {"name": "seed", "datatype": "UINT64", "shape": [2, 1], "contents": {"uint64_contents": seeds}},
            ],
            raw_input_contents=[],
        )
        with raw_stub(address) as stub:
            result = triton.InferResult(stub.ModelInfer(request, timeout=TIMEOUT_S))
        assert np.allclose(result.as_numpy("action"), local.act(OBS[:2], seed=seeds).action, atol=1e-6)

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            (
                obs_input(contents={"fp32_contents": [0.0] * 8}),
                "either raw_input_contents or contents, got both",
            ),
            ({"raw_input_contents": []}, r"wanted 8 numbers in fp32_contents of input 'obs' .*, got 0"),
            (
                obs_input(contents={"fp64_contents": [0.0] * 8}) | {"raw_input_contents": []},
                "wanted 8 numbers in fp32_contents .*, got 0",
            ),
            (
                {"raw_input_contents": [bytes(32), b""]},
                "one of raw_input_contents per input, got 2 for 1 inputs",
            ),
            ({"raw_input_contents": [bytes(31)]}, r"wanted 32 bytes of input 'obs' \(FP32 \[2, 4\]\), got 31"),
            (obs_input(shape=[2**62, 4]), "wanted 73786976294838206464 bytes of input 'obs'.*, got 32"),
            (obs_input(shape=[2, -4]), r"shape \[B, 4\] with B >= 1, got \[2, -4\]"),
            (obs_input(shape=[0, 4]) | {"raw_input_contents": [b""]}, r"B >= 1, got \[0, 4\]"),
            (obs_input(shape=[8]), r"shape \[B, 4\] with B >= 1, got \[8\]"),
            (obs_input(shape=[2, 1, 4]), r"got \[2, 1, 4\]"),
            (obs_input(shape=[1] * 100_000), r"got \[1, 1, 1"),
            (obs_input(shape=[]), r"got \[\]"),
            (obs_input(datatype="BYTES"), "wanted datatype FP32 for input 'obs', got 'BYTES'"),
            (obs_input(datatype="FP64"), "wanted datatype FP32 for input 'obs', got 'FP64'"),
            (obs_input(name="observation"), "inputs 'obs', 'noise', 'seed' at most once, got 'observation'"),
            (two_inputs([2, 4], bytes(32), "obs"), "at most once, got 'obs'"),
            ({"inputs": [], "raw_input_contents": []}, r"wanted the input 'obs' .*got no inputs"),
            ({"raw_input_contents": [np.full(8, np.nan, "<f4").tobytes()]}, "wanted finite numbers, got nan"),
            ({"raw_input_contents": [np.full(8, -np.inf, "<f4").tobytes()]}, "wanted finite numbers, got -inf"),
            (
                two_inputs([3, 3, 2, 2], bytes(144)),
                r"wanted noise of shape \[2, 3, 2, 2\] .*got \[3, 3, 2, 2\]",
            ),
            (two_inputs([2, 12], bytes(96)), r"'noise' of shape \[B, 3, 2, 2\] with B >= 1, got \[2, 12\]"),
            (two_inputs([3, 1], bytes(24), "seed", "UINT64"), r"wanted 2 seeds \(one per observation\), got 3"),
            (two_inputs([2, 2], bytes(32), "seed", "UINT64"), r"'seed' of shape \[B, 1\].* got \[2, 2\]"),
            (
                two_inputs([2], bytes(16), "seed", "INT64"),
                "wanted datatype UINT64 for input 'seed', got 'INT64'",
            ),
            (
                two_inputs([2], bytes(16), "seed", "UINT64") | {"parameters": {"seed": ("int64_param", 1)}},
                "wanted the seeds once, got an input and a parameter",
            ),
            (
                two_inputs([2, 3, 2, 2], bytes(96)) | {"parameters": {"seed": ("int64_param", 1)}},
                "wanted noise or a seed, got both",
            ),
            ({"outputs": [{"name": "value"}]}, "outputs 'action', 'q' at most once, got 'value'"),
            ({"outputs": [{"name": "q"}, {"name": "q"}]}, "at most once, got 'q'"),
            (
                {"outputs": [{"name": "q", "parameters": {"classification": {"int64_param": 1}}}]},
                "wanted output 'q' as numbers, got class_count",
            ),
            (
                {"outputs": [{"name": "q", "parameters": {"shared_memory_region": {"string_param": "x"}}}]},
                "got a shared memory region, which this server does not offer",
            ),
            (
                obs_input(parameters={"shared_memory_region": {"string_param": "x"}}),
                "wanted input 'obs' inside the message, got a shared memory region",
            ),
            ({"parameters": {"seed": ("double_param", 1.0)}}, "'seed' as int64_param or .*, got double_param"),
            ({"parameters": {"seed": ("bool_param", True)}}, "'seed' as int64_param or .*, got bool_param"),
            ({"parameters": {"seed": ("int64_param", -1)}}, r"seeds from 0 to 2\*\*64 - 1, got \[-1\]"),
            ({"parameters": {"seed": ("string_param", "1,2,3")}}, "wanted 2 seeds .*, got 3"),
            ({"parameters": {"seed": ("string_param", "1,2,3,4")}}, "or 2 with commas .*, got '1,2,3,4'"),
            ({"parameters": {"seed": ("string_param", "9" * 5_000)}}, "'seed' as a whole number"),
            ({"parameters": {"seed": ("string_param", str(2**64))}}, r"from 0 to 2\*\*64 - 1"),
            ({"parameters": {"seed": ("string_param", "")}}, "'seed' as a whole number"),
            (
                {"parameters": {"deterministic": ("string_param", "yes")}},
                "'deterministic' as bool_param, got string",
            ),
            (
                {"parameters": {"deterministic": ("bool_param", True), "seed": ("int64_param", 1)}},
                "either a seed or deterministic=True, got both",
            ),
            (
                {"parameters": {"timeout": ("string_param", "5")}},
                "'timeout' as int64_param or .*got string_param",
            ),
            ({"parameters": {"timeout": ("int64_param", -5)}}, "'timeout' as a number >= 0, got -5"),
            ({"parameters": {"priority": ("double_param", 1.0)}}, "'priority' as int64_param or .*got double"),
            (
                {"parameters": {"client_id": ("double_param", 1.0)}},
                "'client_id' as string_param or .*got double",
            ),
            (obs_input(shape=[65, 4]) | {"raw_input_contents": [bytes(65 * 16)]}, "1 to 64 rows .* got 65"),
        ],
    )
    def test_a_wrong_request_is_told_what_was_wanted_and_what_came(self, address, fields, text):
        with raw_stub(address) as stub:
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(message(**fields), timeout=TIMEOUT_S)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert re.search(text, caught.value.details())
            wrong, right = stub.ModelStreamInfer(
                iter([message(id="7", **fields), message(id="8")]), timeout=TIMEOUT_S
            )
        assert wrong.error_message == f"INVALID_ARGUMENT: {caught.value.details()}"
        assert (wrong.infer_response.id, wrong.infer_response.model_name) == ("7", "tiny")
        assert (right.error_message, right.infer_response.id) == ("", "8")
        assert len(right.infer_response.raw_output_contents[0]) == 16

    def test_what_is_unknown_among_the_parameters_is_ignored(self, address):
        known = {
            "priority": ("uint64_param", 3),
            "timeout": ("int64_param", 60_000_000),
            "client_id": ("string_param", "arm"),
        }
        unknown = {
            "triton_enable_empty_final_response": ("bool_param", True),
            "triton_anything": ("string_param", "x"),
            "sequence_id": ("int64_param", 5),
            "Seed": ("double_param", 0.5),
        }
        with raw_stub(address) as stub:
            for parameters in ({}, known, known | unknown, {"timeout": ("int64_param", 0)}):
                answer = stub.ModelInfer(message(parameters=parameters), timeout=TIMEOUT_S)
                assert len(answer.raw_output_contents) == 2

    def test_the_stamp_of_the_observation_comes_back(self, address):
        for stamp in (1763800000.25, 1763800000250000000, "frame 5"):
            result = infer_sync(address, {"obs": OBS}, parameters={"obs_stamp": stamp})
            assert parameters(result)["obs_stamp"] == stamp


class TestStream:
    def test_answers_come_in_the_order_of_the_requests(self, address, local):
        requests = [
            asked(triton, {"obs": OBS[:rows]}, None) | {"request_id": str(rows), "parameters": {"seed": rows}}
            for rows in (1, 9, 2, 3)
        ]
        for answer, rows in zip(stream_sync(address, requests), (1, 9, 2, 3), strict=True):
            assert answer.get_response().id == str(rows)
            here = local.act(OBS[:rows], seed=rows)
            assert np.allclose(answer.as_numpy("action"), here.action, atol=1e-6)

    def test_a_wrong_request_does_not_end_the_stream(self, address):
        good, bad = asked(triton_aio, {"obs": OBS}, None), asked(triton_aio, {"obs": OBS[:, :3]}, None)
        unknown = good | {"model_name": "nope"}
        answers = stream_aio(address, [good, bad, unknown, good])
        assert [isinstance(answer, InferenceServerException) for answer in answers] == [
            False,
            True,
            True,
            False,
        ]
        assert str(answers[2]).startswith("NOT_FOUND: wanted policy 'nope'")

    def test_more_requests_than_the_window_holds(self, address):
        request = message()
        with raw_stub(address) as stub:
            answers = list(stub.ModelStreamInfer(iter([request] * 300), timeout=TIMEOUT_S))
        assert len(answers) == 300
        assert not any(answer.error_message for answer in answers)

    def test_every_answer_says_that_it_is_the_last_one_of_its_request(self, address):
        asks = asked(triton, {"obs": OBS}, None) | {"enable_empty_final_response": True}
        (answer,) = stream_sync(address, [asks])
        assert parameters(answer)["triton_final_response"] is True


NOT_OFFERED: dict[str, Callable[[Any], Any]] = {
    "SystemSharedMemoryStatus": lambda client: client.get_system_shared_memory_status(),
    "SystemSharedMemoryRegister": lambda client: client.register_system_shared_memory("a", "b", 8),
    "SystemSharedMemoryUnregister": lambda client: client.unregister_system_shared_memory(),
    "CudaSharedMemoryStatus": lambda client: client.get_cuda_shared_memory_status(),
    "CudaSharedMemoryRegister": lambda client: client.register_cuda_shared_memory("a", b"YQ==", 0, 8),
    "CudaSharedMemoryUnregister": lambda client: client.unregister_cuda_shared_memory(),
    "TraceSetting": lambda client: client.get_trace_settings(),
    "LogSettings": lambda client: client.get_log_settings(),
}


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


class TestRepository:
    def test_without_control_it_is_read_only(self, client):
        index = client.get_model_repository_index().models
        assert [(m.name, m.version, m.state, m.reason) for m in index] == [
            ("other", "3", "READY", ""),
            ("tiny", "1", "READY", ""),
            ("tiny", "2", "READY", ""),
        ]
        for call in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="UNIMPLEMENTED.*switched off.*admin token"):
                call("tiny")
        assert client.is_model_ready("tiny")

    def test_there_is_one_repository(self, address):
        with raw_stub(address) as stub, pytest.raises(grpc.RpcError) as caught:
            stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(repository_name="x"), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "wanted no repository_name" in caught.value.details()


class Control:
    """Remembers what it was told; a RepositoryControl."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def load(self, name: str, version: int | None) -> None:
        self.calls.append(("load", name, version))
        if name == "broken":
            raise BundleError(
                "bundle broken/3: wanted the sha256 of the manifest, got another; export it again"
            )
        if name == "fault":
            raise ZeroDivisionError("secret")

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))
        if name == "nope":
            raise PolicyNotFoundError("wanted policy 'nope', this server has tiny; name one of them")

    def index(self) -> list[tuple[str, str, str, str]]:
        return [("tiny", "1", "READY", ""), ("tiny", "2", "UNAVAILABLE", "wanted a graph, got none")]


class TestControl:
    @pytest.fixture
    def control(self, server, monkeypatch) -> Control:
        control = Control()
        monkeypatch.setattr(server._endpoint._inference._repository, "_control", control)
        return control

    def test_load_and_unload_reach_it(self, client, control):
        client.load_model("tiny")
        client.unload_model("tiny")
        assert control.calls == [("load", "tiny", None), ("unload", "tiny")]

    def test_aio(self, address, control):
        async def main() -> None:
            async with triton_aio.InferenceServerClient(address) as client:
                await client.load_model("tiny")
                await client.unload_model("tiny")

        asyncio.run(main())
        assert control.calls == [("load", "tiny", None), ("unload", "tiny")]

    def test_the_index_is_its_own(self, client, address, control):
        index = client.get_model_repository_index().models
        assert [(m.version, m.state, m.reason) for m in index] == [
            ("1", "READY", ""),
            ("2", "UNAVAILABLE", "wanted a graph, got none"),
        ]
        with raw_stub(address) as stub:
            ready = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=TIMEOUT_S)
        assert [m.version for m in ready.models] == ["1"]

    @pytest.mark.parametrize(("kind", "value"), [("int64_param", 3), ("string_param", "3")])
    def test_a_version_can_be_named(self, address, control, kind, value):
        request = service_pb2.RepositoryModelLoadRequest(model_name="tiny")
        setattr(request.parameters["version"], kind, value)
        with raw_stub(address) as stub:
            stub.RepositoryModelLoad(request, timeout=TIMEOUT_S)
        assert control.calls == [("load", "tiny", 3)]

    @pytest.mark.parametrize(
        ("parameter", "kind", "value", "text"),
        [
            ("version", "int64_param", 0, "a number such as 3 as version, got '0'"),
            ("version", "string_param", "x", "got 'x'"),
            ("version", "bool_param", True, "got ''"),
            ("version", "string_param", "9" * 5000, "got '999"),
            ("config", "string_param", "{}", "wanted no parameter but version, got config"),
            ("file:1/model.onnx", "bytes_param", b"", "got file:1/model.onnx"),
        ],
    )
    def test_nothing_else_can_be_brought_along(self, address, control, parameter, kind, value, text):
        request = service_pb2.RepositoryModelLoadRequest(model_name="tiny")
        setattr(request.parameters[parameter], kind, value)
        with raw_stub(address) as stub, pytest.raises(grpc.RpcError) as caught:
            stub.RepositoryModelLoad(request, timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert text in caught.value.details()
        assert control.calls == []

    def test_what_is_wrong_with_a_bundle_is_told(self, client, control):
        with pytest.raises(InferenceServerException, match="FAILED_PRECONDITION.*sha256 of the manifest"):
            client.load_model("broken")
        with pytest.raises(InferenceServerException, match="NOT_FOUND.*policy 'nope'"):
            client.unload_model("nope")
        with pytest.raises(InferenceServerException) as caught:
            client.load_model("fault")
        assert "INTERNAL" in str(caught.value)
        assert "secret" not in str(caught.value)


class TestReflection:
    def test_a_client_that_knows_nothing_learns_enough_to_ask(self, address):
        """What grpcurl does: find the service, fetch its file, build messages, call."""
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="rsm.v1.PolicyService"),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health"),
            ]
            listed, *files = stub.ServerReflectionInfo(iter(requests), timeout=TIMEOUT_S)
            names = {service.name for service in listed.list_services_response.service}
            assert "inference.GRPCInferenceService" in names
            pool = descriptor_pool.DescriptorPool()
            for answer in files:
                for content in answer.file_descriptor_response.file_descriptor_proto:
                    pool.Add(FileDescriptorProto.FromString(content))
            assert pool.FindServiceByName("rsm.v1.PolicyService")
            method = pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelInfer"]
            ask: Any = message_factory.GetMessageClass(method.input_type)
            answered: Any = message_factory.GetMessageClass(method.output_type)
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=ask.SerializeToString,
                response_deserializer=answered.FromString,
            )
            body = {
                "model_name": "tiny",
                "inputs": [
                    {
                        "name": "obs",
                        "datatype": "FP32",
                        "shape": [1, 4],
                        "contents": {"fp32_contents": [0, 0, 0, 0]},
                    }
                ],
            }
            response = call(json_format.ParseDict(body, ask()), timeout=TIMEOUT_S)
        assert [output.name for output in response.outputs] == ["action", "q"]

    def test_it_describes_only_what_is_offered(self, address):
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(
                file_containing_symbol="inference.SystemSharedMemoryStatusRequest"
            )
            (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT_S)
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


class Rig:
    """A server whose only policy computes when the test says so, at most 4 rows at a time."""

    def __init__(self, server: PolicyServer, session: Gated, lane: Lane) -> None:
        self.server, self.session, self.lane = server, session, lane
        self.address = server.addresses[0]
        self.client = triton.InferenceServerClient(self.address)
        self.outcomes: queue.Queue[Any] = queue.Queue()

    def ask(self, rows: int, **options: Any) -> Any:
        """Send a request; its outcome will be in `outcomes`."""
        return self.client.async_infer(
            "tiny",
            [tensor(triton, "obs", OBS[:rows])],
            lambda result, error: self.outcomes.put(error or result),
            client_timeout=TIMEOUT_S,
            **options,
        )

    def outcome(self) -> Any:
        return self.outcomes.get(timeout=TIMEOUT_S)

    def hold_worker(self) -> None:
        """Let one request of one row occupy the worker."""
        self.session.open.clear()
        self.ask(1)
        assert self.session.entered.acquire(timeout=TIMEOUT_S)

    def wait_queued(self, rows: int) -> None:
        wait_until(lambda: self.lane.batcher.queued_rows == rows, f"{rows} queued rows")


@pytest.fixture
def rig(bundle_repo) -> Iterator[Rig]:
    bundle = load_bundle(bundle_repo / "tiny")
    session = Gated(open_session(bundle, "onnxruntime"))
    lane = Lane(LocalPolicy(bundle, session), BatchLimits(max_batch_size=4, max_queue_rows=6))
    session.batches.clear()
    while session.entered.acquire(blocking=False):
        pass
    config = ServerConfig.from_options(repo=bundle_repo, addresses=ANY_PORT, drain_seconds=30)
    with background_server(config, [lane]) as server:
        rig = Rig(server, session, lane)
        try:
            yield rig
        finally:
            session.open.set()
            rig.client.close()


class TestQueue:
    def test_a_timeout_in_the_request_is_a_deadline(self, rig):
        rig.hold_worker()
        rig.ask(2, timeout=1)
        rig.ask(3, timeout=60_000_000)
        rig.wait_queued(5)
        rig.session.open.set()
        outcomes = [rig.outcome() for _ in range(3)]
        (late,) = [outcome for outcome in outcomes if isinstance(outcome, InferenceServerException)]
        assert "DEADLINE_EXCEEDED" in late.status()
        assert "the deadline passed" in late.message()
        assert rig.session.batches == [1, 3], "the late one was not computed"

    def test_a_full_queue_sheds_load(self, rig):
        rig.hold_worker()
        rig.ask(4)
        rig.wait_queued(4)
        rig.ask(3)
        refused = rig.outcome()
        assert "RESOURCE_EXHAUSTED" in refused.status()
        rig.session.open.set()
        assert sorted(parameters(rig.outcome())["batch_rows"] for _ in range(2)) == [1, 4]

    def test_who_cancels_frees_the_queue(self, rig):
        rig.hold_worker()
        waiting = rig.ask(2)
        rig.wait_queued(2)
        waiting.cancel()
        rig.wait_queued(0)
        rig.client.start_stream(lambda result, error: None)
        rig.client.async_stream_infer("tiny", [tensor(triton, "obs", OBS[:3])])
        rig.client.async_stream_infer("tiny", [tensor(triton, "obs", OBS[:2])])
        rig.wait_queued(5)
        rig.client.stop_stream(cancel_requests=True)
        rig.wait_queued(0)
        rig.session.open.set()
        wait_until(lambda: rig.lane.counts.request_s.count == 1, "the first answer")
        assert rig.session.batches == [1]

    def test_requests_of_both_protocols_share_batches(self, rig):
        rig.hold_worker()
        with PolicyClient(rig.address, timeout_s=TIMEOUT_S) as own, ThreadPoolExecutor(1) as pool:
            rig.ask(2)
            rig.wait_queued(2)
            other = pool.submit(own.act, OBS[:2])
            rig.wait_queued(4)
            rig.session.open.set()
            assert other.result(TIMEOUT_S).timing.batch_rows == 4
        assert rig.session.batches == [1, 4]

    def test_draining_answers_what_is_queued_and_is_no_longer_ready(self, rig):
        rig.hold_worker()
        streamed: queue.Queue[Any] = queue.Queue()
        rig.client.start_stream(lambda result, error: streamed.put(error or result))
        rig.client.async_stream_infer("tiny", [tensor(triton, "obs", OBS[:2])], request_id="queued")
        rig.wait_queued(2)
        drained = asyncio.run_coroutine_threadsafe(rig.server.drain(), rig.lane.batcher._loop)
        wait_until(lambda: not rig.client.is_server_ready(), "draining")
        assert rig.client.is_server_live()
        assert not rig.client.is_model_ready("tiny")
        (entry,) = rig.client.get_model_repository_index().models
        assert (entry.state, "shutting down" in entry.reason) == ("UNAVAILABLE", True)
        with pytest.raises(InferenceServerException, match="UNAVAILABLE.*shutting down"):
            rig.client.infer("tiny", [tensor(triton, "obs", OBS[:1])])
        with raw_stub(rig.address) as stub, pytest.raises(grpc.RpcError) as caught:
            list(stub.ModelStreamInfer(iter([]), timeout=TIMEOUT_S))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        rig.session.open.set()
        assert streamed.get(timeout=TIMEOUT_S).get_response().id == "queued"
        assert rig.outcome().as_numpy("action").shape == (1, 2)
        end = streamed.get(timeout=TIMEOUT_S)
        assert ("UNAVAILABLE" in end.status(), "shutting down" in end.message()) == (True, True)
        assert drained.result(TIMEOUT_S) is True


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
