"""ModelInfer and ModelStreamInfer, with the real tritonclient where it can send the request."""

from __future__ import annotations

import re
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from rsm_common.seeds import DETERMINISTIC_SEED, draw_noise, expand_seed
from tests.rsm_serve.rpc.oip.ask import (
    OBS,
    TIMEOUT_S,
    asked,
    infer_sync,
    parameters,
    raw_stub,
    stream_aio,
    stream_sync,
)


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
                "got its parameter 'classification', which tritonclient calls class_count; leave it out",
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
            ({"parameters": {"seed": ("int64_param", -1)}}, r"seeds from 0 to 2\*\*64 - 1, got -1;"),
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
