"""Hostile input to a real server process: whatever comes, it goes on, says what is wrong, and leaks nothing.

Cases are drawn from a seed: a failure names its case, and RSM_FUZZ_SEED=N draws others. After every test the
server answers good requests rightly, through all four methods, with no stream, connection, thread or memory
left behind, and with nothing in its log but what it says at its start.
"""

from __future__ import annotations

import os
import queue
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from rsm_common.errors import MAX_SENTENCE, InvalidRequestError, RequestError, wire_status
from rsm_common.seeds import DETERMINISTIC_SEED, draw_noise, expand_seed
from rsm_common.spec import PolicySpec
from rsm_serve.client import PolicyClient
from rsm_serve.pb import oip_pb2
from rsm_serve.pb import policy_pb2 as pb
from tests.bundles import make_spec, reference_action, write_bundle
from tests.hang import HANG_S
from tests.server_process import ServerProcess, running_server, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of processes")

SEED = int(os.environ.get("RSM_FUZZ_SEED", "1"))
SPECS = {"tiny": make_spec("tiny"), "other": make_spec("other", obs_size=6, has_q=False)}

OURS = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "UNAVAILABLE",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "UNIMPLEMENTED",
}
"""The statuses of the error catalogue, without those that no input alone may cause."""

MIB = 2**20
TIMEOUT_S = HANG_S
IN_FLIGHT = 32

Case = tuple[str, random.Random]


def cases(what: str, count: int) -> Iterator[Case]:
    """Names of cases, with the generator of each."""
    for number in range(count):
        name = f"{SEED}/{what}/{number}"
        yield name, random.Random(name)


@dataclass(frozen=True)
class Outcome:
    """What became of a call."""

    code: str
    details: str
    answers: list[bytes]


@dataclass(frozen=True)
class Method:
    """An RPC by its descriptor, called with bytes."""

    descriptor: MethodDescriptor

    @property
    def path(self) -> str:
        return f"/{self.descriptor.containing_service.full_name}/{self.descriptor.name}"

    def start(self, channel: Any, messages: Sequence[bytes], timeout_s: float, **options: Any) -> Any:
        """The call; one request only unless the method takes a stream."""
        kind = self.descriptor
        if kind.client_streaming:
            return channel.stream_stream(self.path)(iter(messages), timeout=timeout_s, **options)
        if kind.server_streaming:
            return channel.unary_stream(self.path)(messages[0], timeout=timeout_s, **options)
        return channel.unary_unary(self.path).future(messages[0], timeout=timeout_s, **options)

    def finish(self, call: Any) -> Outcome:
        """Wait for it."""
        answers: list[bytes] = []
        try:
            if not self.descriptor.server_streaming:
                return Outcome("OK", "", [call.result()])
            for answer in call:
                answers.append(answer)
                if not self.descriptor.client_streaming:
                    call.cancel()  # Health.Watch has no end
        except (grpc.RpcError, grpc.FutureCancelledError):
            pass
        return Outcome(call.code().name, call.details() or "", answers)


METHODS = [
    Method(method)
    for file in (pb, oip_pb2, health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def good_act(generator: random.Random, policy: str = "tiny") -> pb.ActRequest:
    """A request that must be answered."""
    spec, rows = SPECS[policy], generator.choice((1, 1, 2, 3, 64))
    obs = np.array([generator.gauss(0, 1) for _ in range(rows * spec.observation.size)], "<f4")
    request = pb.ActRequest(policy=policy, rows=rows, obs=obs.tobytes(), request_id=generator.getrandbits(64))
    kind = generator.randrange(5)
    if kind == 1:
        request.seeds.append(generator.getrandbits(64))
    elif kind == 2:
        request.seeds.extend(generator.getrandbits(64) for _ in range(rows))
    elif kind == 3:
        request.deterministic = True
    elif kind == 4:
        request.noise = draw_noise(expand_seed(generator.getrandbits(64), rows), spec.noise_shape).tobytes()
    request.client_id, request.priority = generator.choice(("", "arm")), generator.randint(-10, 10)
    return request


def good_infer(generator: random.Random, policy: str = "tiny") -> oip_pb2.ModelInferRequest:
    """The same of the Open Inference Protocol."""
    act = good_act(generator, policy)
    spec, rows = SPECS[policy], act.rows
    request = oip_pb2.ModelInferRequest(model_name=policy, id=str(generator.getrandbits(16)))
    tensors = [("obs", "FP32", [rows, spec.observation.size], act.obs)]
    if act.noise:
        tensors.append(("noise", "FP32", [rows, *spec.noise_shape], act.noise))
    elif len(act.seeds) == rows:
        tensors.append(("seed", "UINT64", [rows, 1], np.array(act.seeds[:], "<u8").tobytes()))
    elif act.deterministic:
        request.parameters["deterministic"].bool_param = True
    generator.shuffle(tensors)
    for name, datatype, shape, content in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(content)
    return request


def act_is_right(request: pb.ActRequest, response: pb.ActResponse) -> bool:
    """Whether the answer is the reference's, by its seeds or the request's noise."""
    spec = SPECS[request.policy]
    obs = np.frombuffer(request.obs, "<f4").reshape(request.rows, -1)
    if request.noise:
        noise = np.frombuffer(request.noise, "<f4").reshape(request.rows, *spec.noise_shape)
    else:
        noise = draw_noise(_seeds(request, response), spec.noise_shape)
    return response.request_id == request.request_id and _agrees(spec, obs, noise, response.action)


def _seeds(request: pb.ActRequest, response: pb.ActResponse) -> np.ndarray[Any, np.dtype[np.uint64]]:
    told = np.array(response.seeds[:], np.uint64)
    if request.deterministic:
        wanted = np.full(request.rows, DETERMINISTIC_SEED, np.uint64)
    elif len(request.seeds) == 1:
        wanted = expand_seed(request.seeds[0], request.rows)
    else:
        wanted = np.array(request.seeds[:], np.uint64) if request.seeds else told
    assert np.array_equal(told, wanted)
    return told


def infer_is_right(request: oip_pb2.ModelInferRequest, response: oip_pb2.ModelInferResponse) -> bool:
    """The same of the Open Inference Protocol."""
    spec = SPECS[request.model_name]
    given = {tensor.name: _content(request, index) for index, tensor in enumerate(request.inputs)}
    obs = given["obs"].reshape(-1, spec.observation.size)
    if "noise" in given:
        noise = given["noise"].reshape(len(obs), *spec.noise_shape)
    else:
        seed = response.parameters["seed"]
        told = [seed.uint64_param] if len(obs) == 1 else [int(text) for text in seed.string_param.split(",")]
        noise = draw_noise(np.array(told, np.uint64), spec.noise_shape)
    names = [tensor.name for tensor in response.outputs]
    if "action" not in names:
        return names == ["q"]
    action = response.raw_output_contents[names.index("action")]
    return response.id == request.id and _agrees(spec, obs, noise, action)


def _content(request: oip_pb2.ModelInferRequest, index: int) -> np.ndarray[Any, np.dtype[Any]]:
    tensor = request.inputs[index]
    dtype = "<f4" if tensor.datatype == "FP32" else "<u8"
    if request.raw_input_contents:
        return np.frombuffer(request.raw_input_contents[index], dtype)
    contents = tensor.contents.fp32_contents if dtype == "<f4" else tensor.contents.uint64_contents
    return np.array(contents[:], dtype)


def _agrees(spec: PolicySpec, obs: Any, noise: Any, action: bytes) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = reference_action(spec, obs, noise)
    return np.allclose(np.frombuffer(action, "<f4").reshape(wanted.shape), wanted, atol=1e-5)


ACT, ACT_STREAM, INFER, INFER_STREAM = (
    next(method for method in METHODS if method.descriptor.name == name)
    for name in ("Act", "ActStream", "ModelInfer", "ModelStreamInfer")
)


def assert_answers(address: str) -> None:
    """Good requests, through all four methods, are answered rightly."""
    generator = random.Random(7)
    acts = [good_act(generator, policy) for policy in ("tiny", "other", "tiny")]
    infers = [good_infer(generator, policy) for policy in ("tiny", "other", "tiny")]
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        for method, requests in ((ACT, acts), (ACT_STREAM, acts), (INFER, infers), (INFER_STREAM, infers)):
            sent = [request.SerializeToString() for request in requests]
            batches = [sent] if method.descriptor.client_streaming else [[one] for one in sent]
            answers = []
            for batch in batches:
                outcome = method.finish(method.start(channel, batch, TIMEOUT_S))
                assert outcome.code == "OK", (method.path, outcome)
                answers += outcome.answers
            assert len(answers) == len(requests)
            for request, answer in zip(requests, answers, strict=True):
                assert is_right(method, request, answer), method.path


def sheds_nothing(address: str) -> bool:
    """Whether gRPC has less than a thousand calls to read: of more it cancels some, whoever they are of."""
    request = good_act(random.Random(1)).SerializeToString()
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        return ACT.finish(ACT.start(channel, [request], TIMEOUT_S)).code == "OK"


def is_right(method: Method, request: Any, answer: bytes) -> bool:
    """Whether one answer is the reference's; False for an error inside a stream."""
    if method in (ACT, ACT_STREAM):
        act = pb.ActResponse.FromString(answer)
        return not act.HasField("error") and act_is_right(request, act)
    if method is INFER:
        return infer_is_right(request, oip_pb2.ModelInferResponse.FromString(answer))
    streamed = oip_pb2.ModelStreamInferResponse.FromString(answer)
    return not streamed.error_message and infer_is_right(request, streamed.infer_response)


def error_in(method: Method, answer: bytes) -> str:
    """The status of an error inside a stream; OK if it is an answer."""
    if method is ACT_STREAM:
        return pb.ActResponse.FromString(answer).error.code or "OK"
    assert method is INFER_STREAM
    return oip_pb2.ModelStreamInferResponse.FromString(answer).error_message.partition(":")[0] or "OK"


@pytest.fixture(scope="module")
def process(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("fuzz")
    for spec in SPECS.values():
        write_bundle(folder / "repository", spec)
    with running_server(folder / "repository", folder / "log") as server:
        assert_answers(server.address)
        yield server


@pytest.fixture
def server(process) -> Iterator[ServerProcess]:
    """The server, which must be as it was when the test is over."""
    threads, files, rss, log = process.threads, process.open_files, process.rss_bytes, process.log
    yield process
    assert process.process.poll() is None, process.log
    wait_until(lambda: sheds_nothing(process.address), "gRPC to have read what waits")
    assert_answers(process.address)
    wait_until(lambda: _scraped(process), "the HTTP port")
    wait_until(lambda: process.metric("rsm_streams_open") == 0, "all streams to be closed")
    wait_until(lambda: process.metric("rsm_queue_rows") == 0, "an empty queue")
    wait_until(lambda: process.open_files <= files + 4, "connections to be closed")
    assert process.threads <= threads + 16, "gRPC's own pool grows a little under load"
    # gRPC keeps up to 5 MiB per connection that does not read, and up to 10,000 calls that wait to be read.
    assert process.rss_bytes < rss + 384 * MIB
    assert process.log == log, process.log[len(log) :]


def _scraped(process: ServerProcess) -> bool:
    try:
        return process.get("/healthz") == (200, "serving\n")
    except OSError:  # its few connections are taken
        return False


@pytest.fixture
def channel(server) -> Iterator[Any]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 * MIB)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        yield channel


Check = Callable[[str, Outcome], None]


class Calls:
    """Many calls at once, each checked when it is done."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._open: list[tuple[str, Method, Any, Check]] = []
        self.codes: Counter[str] = Counter()

    def start(
        self, name: str, method: Method, messages: Sequence[bytes], check: Check | None = None, **options: Any
    ) -> None:
        call = method.start(self._channel, messages, options.pop("timeout_s", TIMEOUT_S), **options)
        self._open.append((name, method, call, check or (lambda name, outcome: None)))
        if len(self._open) == IN_FLIGHT:
            self.finish()

    def finish(self) -> None:
        for name, method, call, check in self._open:
            outcome = method.finish(call)
            assert outcome.code in OURS, (name, method.path, outcome.code, outcome.details)
            # What gRPC says by itself about a message of ours hides what we say.
            assert "Stream removed (received metadata" not in outcome.details, (
                name,
                method.path,
                outcome.details,
            )
            assert "Sent message larger" not in outcome.details, (name, method.path, outcome.details)
            self.codes[outcome.code] += 1
            check(name, outcome)
        self._open.clear()


# ---------------------------------------------------------------------------------------------- bytes


def mutated(generator: random.Random, content: bytes) -> bytes:
    """A message with a few faults."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        at = generator.randrange(len(changed) + 1)
        kind = generator.randrange(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at:at] = generator.randbytes(generator.randrange(1, 9))
        elif kind == 3:
            del changed[at : at + generator.randrange(1, 9)]
        elif kind == 4:
            changed[at:at] = changed[: generator.randrange(len(changed) + 1)]
        else:  # a length, or a number, that is huge
            changed[at : at + 1] = generator.choice(
                (b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\xff" * 12)
            )
    return bytes(changed)


def seed_message(generator: random.Random, method: Method) -> Message:
    """A valid request of a method."""
    if method in (ACT, ACT_STREAM):
        return good_act(generator)
    if method in (INFER, INFER_STREAM):
        return good_infer(generator)
    message = GetMessageClass(method.descriptor.input_type)()
    for field in message.DESCRIPTOR.fields:
        if field.type == field.TYPE_STRING and not field.is_repeated:
            setattr(message, field.name, generator.choice(("tiny", "1", "", "grpc.health.v1.Health")))
    return message


def hostile_bytes(generator: random.Random, method: Method) -> bytes:
    """Random bytes, or a valid message that was damaged."""
    if generator.random() < 0.3:
        return generator.randbytes(generator.choice((0, 1, 2, 10, 100, 5000)))
    return mutated(generator, seed_message(generator, method).SerializeToString())


def throw_bytes(channel: Any, what: str, rounds: int) -> Counter[str]:
    calls = Calls(channel)
    for name, generator in cases(what, rounds):
        for method in METHODS:
            count = generator.randrange(1, 6) if method.descriptor.client_streaming else 1
            calls.start(name, method, [hostile_bytes(generator, method) for _ in range(count)])
    calls.finish()
    return calls.codes


def test_bytes_that_are_no_messages_or_damaged_ones_on_every_method(channel, server):
    first = throw_bytes(channel, "bytes-a", 60)
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"} <= set(first)
    # The first half has filled pools and caches; the second must not need more.
    rss = server.rss_bytes
    second = throw_bytes(channel, "bytes-b", 60)
    assert sum(second.values()) == 60 * len(METHODS)
    assert server.rss_bytes < rss + 12 * MIB


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path)
def test_what_cannot_be_read_is_an_invalid_argument(channel, method):
    outcome = method.finish(method.start(channel, [b"\xff" * 9], TIMEOUT_S))
    assert outcome.code in ("INVALID_ARGUMENT", "UNIMPLEMENTED"), outcome
    if outcome.code == "INVALID_ARGUMENT":
        assert "one that cannot be read" in outcome.details


def test_methods_that_do_not_exist(channel):
    for name, generator in cases("methods", 60):
        service = generator.choice(
            ("rsm.v1.PolicyService", "inference.GRPCInferenceService", "grpc.health.v1.Health", "a.B", "")
        )
        method = "".join(generator.choices("abAB01_./%", k=generator.choice((1, 10, 500))))
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{service}/{method}")(b"", timeout=TIMEOUT_S)
        assert caught.value.code().name == "UNIMPLEMENTED", name


# ----------------------------------------------------------------------------------------- claims

ODD_NAMES = (
    "",
    "nope",
    "tiny\x00",
    "tiny\n",
    "../tiny",
    "TINY",
    "tiny:1",
    "%s%n{0}",
    "\U0001f916" * 40,
    "\u202e" * 9,
    "é" * 5000,
    "a" * 5000,
    "\x00" * 5000,
    "'\"\\" * 3000,
    "n" * 300_000,
)
ODD_VERSIONS = ("0", "-1", "01", "1.0", "１", "9" * 40, "latest", *ODD_NAMES[2:])
ODD_FLOATS = (np.nan, np.inf, -np.inf, 1e-45, -0.0, 1e37, -1e37)


def odd_floats(generator: random.Random, count: int) -> bytes:
    values = np.zeros(count, "<f4")
    for _ in range(generator.randrange(1, 4)):
        values[generator.randrange(count)] = generator.choice(ODD_FLOATS)
    return values.tobytes()


def spoil_act(generator: random.Random, request: pb.ActRequest) -> None:
    """One absurd claim."""
    kind = generator.randrange(9)
    if kind == 0:
        request.rows = generator.choice((0, 2, 65, 2**31, 2**32 - 1))
    elif kind == 1:
        request.policy = generator.choice(ODD_NAMES)
    elif kind == 2:
        request.version = generator.choice(ODD_VERSIONS)
    elif kind == 3:
        request.obs = odd_floats(generator, len(request.obs) // 4 or 1)
    elif kind == 4:
        request.obs = request.obs[: generator.randrange(len(request.obs) + 1)] + b"x" * generator.randrange(2)
    elif kind == 5:
        count = generator.choice((1, 2, 3, 64, 5000))
        request.seeds.extend(generator.choice((0, 1, 2**63, 2**64 - 1)) for _ in range(count))
    elif kind == 6:
        size = generator.choice((1, 4, 48, 100_000))
        request.noise = odd_floats(generator, size // 4) if size > 1 else b"x"
    elif kind == 7:
        request.client_id = generator.choice(("x" * 128, "x" * 129, "é" * 65, "\x00\n", "a" * 300_000))
    else:
        request.priority = generator.choice((11, -11, 2**31 - 1, -(2**31)))


def spoil_infer(generator: random.Random, request: oip_pb2.ModelInferRequest) -> None:
    """One absurd claim."""
    kind = generator.randrange(12)
    tensor = (
        request.inputs[generator.randrange(len(request.inputs))] if request.inputs else request.inputs.add()
    )
    if kind == 0:
        request.model_name = generator.choice(ODD_NAMES)
    elif kind == 1:
        request.model_version = generator.choice(ODD_VERSIONS)
    elif kind == 2:
        dims = (0, -1, 1, 2, 65, 2**31, 2**62, 2**63 - 1, -(2**63))
        tensor.shape[:] = [generator.choice(dims) for _ in range(generator.choice((0, 1, 2, 4, 5000)))]
    elif kind == 3:
        tensor.datatype = generator.choice(("", "FP64", "BYTES", "INT8", "UINT64", "FP32", "x" * 9000, "\x00"))
    elif kind == 4:
        tensor.name = generator.choice(("obs", "seed", "noise", "action", "", "o" * 9000, "\n"))
    elif kind == 5:
        for number in range(generator.choice((1, 3000))):
            request.inputs.add(name=f"input{number}", datatype="FP32", shape=[1, 4])
    elif kind == 6:  # raw and typed together, or too many or few raw
        tensor.contents.fp32_contents.extend([0.0] * 4)
    elif kind == 7:
        del request.raw_input_contents[generator.randrange(len(request.raw_input_contents) + 1) :]
        request.raw_input_contents.extend([b""] * generator.choice((0, 1, 3000)))
    elif kind == 8:
        for index, raw in enumerate(request.raw_input_contents):
            request.raw_input_contents[index] = odd_floats(generator, len(raw) // 4 or 1)
    elif kind == 9:
        for _ in range(generator.choice((1, 1, 2000))):
            request.outputs.add(name=generator.choice(("action", "q", "", "x" * 9000)))
    elif kind == 10:
        request.id = generator.choice(("\x00", "\n" * 9, "é" * 3000, "i" * 300_000))
    else:
        spoil_parameters(generator, request)


def spoil_parameters(generator: random.Random, request: oip_pb2.ModelInferRequest) -> None:
    for _ in range(generator.choice((1, 1, 3, 2000))):
        known = ("seed", "timeout", "priority", "client_id", "obs_stamp", "deterministic", "triton_x")
        key = generator.choice((*known, f"odd{generator.random()}", "\x00", "k" * 3000))
        parameter = request.parameters[key]
        field, values = generator.choice(PARAMETER_VALUES)
        setattr(parameter, field, generator.choice(values))


PARAMETER_VALUES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("bool_param", (True, False)),
    ("int64_param", (0, 1, -1, 2**63 - 1, -(2**63))),
    ("uint64_param", (0, 21, 22, 2**64 - 1)),
    ("double_param", (0.0, float("nan"), float("inf"), -1e308)),
    ("string_param", ("", "7", "7,8", "," * 5000, "9" * 21, "-1", "0x7", "１", "7," * 5000, "é" * 300_000)),
)


@pytest.mark.parametrize("method", [ACT, INFER], ids=lambda method: method.descriptor.name)
def test_absurd_claims(channel, method):
    good: Any
    spoil: Any
    good, spoil = (good_act, spoil_act) if method is ACT else (good_infer, spoil_infer)
    calls, right = Calls(channel), 0
    for name, generator in cases(method.path, 1200):
        request: Any = good(generator, generator.choice(("tiny", "other")))
        faults = generator.choice((0, 1, 1, 2, 3))
        for _ in range(faults):
            spoil(generator, request)

        def check(name: str, outcome: Outcome, request: Any = request, faults: int = faults) -> None:
            nonlocal right
            assert faults or outcome.code == "OK", (name, outcome)
            assert len(outcome.details) < 2000, (name, len(outcome.details))
            if outcome.code == "OK":
                assert is_right(method, request, outcome.answers[0]), name
                right += 1

        calls.start(name, method, [request.SerializeToString()], check)
    calls.finish()
    assert right > 250
    assert calls.codes["INVALID_ARGUMENT"] > 300
    assert calls.codes["NOT_FOUND"] > 50


@pytest.mark.parametrize("method", [ACT_STREAM, INFER_STREAM], ids=lambda method: method.descriptor.name)
def test_absurd_claims_in_a_stream_do_not_end_it(channel, method):
    good: Any
    spoil: Any
    good, spoil = (good_act, spoil_act) if method is ACT_STREAM else (good_infer, spoil_infer)
    calls, right = Calls(channel), 0
    for name, generator in cases(method.path, 60):
        requests: list[tuple[int, Any]] = []
        for _ in range(20):
            request = good(generator, generator.choice(("tiny", "other")))
            faults = generator.choice((0, 1, 1, 2))
            for _ in range(faults):
                spoil(generator, request)
            requests.append((faults, request))

        def check(name: str, outcome: Outcome, requests: Any = tuple(requests)) -> None:
            nonlocal right
            assert (outcome.code, len(outcome.answers)) == ("OK", len(requests)), (name, outcome.details)
            for (faults, request), answer in zip(requests, outcome.answers, strict=True):
                code = error_in(method, answer)
                assert code in OURS, (name, code)
                assert faults or code == "OK", (name, code)
                if code == "OK":
                    assert is_right(method, request, answer), name
                    right += 1
                else:
                    assert len(answer) < 8000, (name, len(answer))

        calls.start(name, method, [request.SerializeToString() for _, request in requests], check)
    calls.finish()
    assert right > 300


def test_a_sentence_repeats_one_wrong_seed_and_not_all(channel):
    request = oip_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="obs", datatype="FP32", shape=[64, 4])
    request.raw_input_contents.append(bytes(64 * 16))
    request.parameters["seed"].string_param = ",".join(["9" * 20] * 64)
    outcome = INFER.finish(INFER.start(channel, [request.SerializeToString()], TIMEOUT_S))
    assert outcome.code == "INVALID_ARGUMENT"
    assert outcome.details.startswith("wanted seeds from 0 to")
    assert outcome.details.count("9" * 20) == 1


def test_a_sentence_that_repeats_what_was_sent_is_cut():
    code, sentence = wire_status(InvalidRequestError("wanted a seed, got " + 1000 * "9"))
    assert code == "INVALID_ARGUMENT"
    assert len(sentence) == MAX_SENTENCE
    assert sentence.endswith("…")


@pytest.mark.parametrize("method", [ACT_STREAM, INFER_STREAM], ids=lambda method: method.descriptor.name)
def test_requests_do_not_stay_in_memory(channel, server, method):
    good: Any
    spoil: Any
    good, spoil = (good_act, spoil_act) if method is ACT_STREAM else (good_infer, spoil_infer)
    contents = []
    for _, generator in cases(f"memory {method.path}", 100):
        request = good(generator)
        contents.append(request.SerializeToString())
        spoil(generator, request)
        if request.ByteSize() < 10_000:  # large ones move the heap about
            contents.append(request.SerializeToString())
    rss = []
    for rounds in (10, 20):  # the first ones fill pools and caches
        outcome = method.finish(method.start(channel, rounds * contents, TIMEOUT_S))
        assert (outcome.code, len(outcome.answers)) == ("OK", rounds * len(contents))
        rss.append(server.rss_bytes)
    assert rss[1] < rss[0] + 16 * MIB


def test_messages_at_the_limit_of_their_size(channel, server):
    """16 MiB of anything is refused in a sentence, and does not come back."""
    size = 16 * MIB - 100
    name, obs = "n" * size, np.zeros(4, "<f4").tobytes()
    tensors = [oip_pb2.ModelInferRequest.InferInputTensor(name="obs", datatype="FP32", shape=[1, 4])]
    infer: dict[str, Any] = {"model_name": "tiny", "inputs": tensors, "raw_input_contents": [obs]}
    messages: list[tuple[Method, Message]] = [
        (ACT, pb.ActRequest(policy=name)),
        (ACT, pb.ActRequest(policy="tiny", rows=size // 16, obs=bytes(size // 16 * 16))),
        (ACT, pb.ActRequest(policy="tiny", rows=1, obs=obs, noise=bytes(size))),
        (ACT, pb.ActRequest(policy="tiny", rows=1, obs=obs, seeds=[1] * (size // 8 - 8))),
        (ACT_STREAM, pb.ActRequest(policy=name)),
        (INFER, oip_pb2.ModelInferRequest(model_name=name)),
        (INFER, oip_pb2.ModelInferRequest(**infer, id=name[:-50])),
        (INFER_STREAM, oip_pb2.ModelInferRequest(**infer, id=name[:-50])),
        (INFER_STREAM, oip_pb2.ModelInferRequest(model_name=name)),
    ]
    contents = [(method, message.SerializeToString()) for method, message in messages]
    throw_large(channel, contents)
    rss = server.rss_bytes
    for _ in range(2):
        throw_large(channel, contents)
    assert server.rss_bytes < rss + 128 * MIB, "what was refused is kept"


def throw_large(channel: Any, contents: Sequence[tuple[Method, bytes]]) -> None:
    for method, content in contents:
        outcome = method.finish(method.start(channel, [content], TIMEOUT_S))
        codes = [outcome.code, *(error_in(method, answer) for answer in outcome.answers)]
        assert codes in (["INVALID_ARGUMENT"], ["NOT_FOUND"], ["OK", "INVALID_ARGUMENT"], ["OK", "NOT_FOUND"])
        assert len(outcome.details) < 2000
        assert all(len(answer) < 4000 for answer in outcome.answers)


def test_metadata_of_all_sizes(channel):
    calls, request = Calls(channel), good_act(random.Random(1)).SerializeToString()
    for name, generator in cases("metadata", 300):
        metadata: list[tuple[str, str | bytes]] = [
            (
                f"x-{generator.randrange(9)}-bin",
                generator.randbytes(generator.choice((0, 10, 1000))),
            )
            for _ in range(generator.choice((0, 1, 5, 100)))
        ]
        metadata.append(("traceparent", generator.choice(("", "00-0-0-0", "x" * 3000, "x" * 100_000))))
        calls.start(name, ACT, [request], metadata=metadata)
    calls.finish()
    assert calls.codes["OK"] > 50
    assert calls.codes["RESOURCE_EXHAUSTED"] > 50, "gRPC's own limit is 16 KiB"


def test_deadlines_of_all_sizes(channel):
    calls = Calls(channel)
    for name, generator in cases("deadlines", 400):
        timeout_s = generator.choice((0.0, 1e-9, 1e-6, 1e-4, 1e-3, 1e4, 1e9, None))
        calls.start(name, ACT, [good_act(generator).SerializeToString()], timeout_s=timeout_s)
    calls.finish()
    assert set(calls.codes) == {"OK", "DEADLINE_EXCEEDED"}


# ------------------------------------------------------------------------------------ connections

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """An HTTP/2 frame; `length` is what it claims."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _header(name: bytes, value: bytes) -> bytes:
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


ACT_HEADERS = b"".join(
    _header(*pair)
    for pair in (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/rsm.v1.PolicyService/Act"),
        (b":authority", b"x"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)
SETTINGS = frame(4, 0, 0, b"")


def hostile_opening(generator: random.Random) -> bytes:
    """What a connection sends at once."""
    kind, garbage = generator.randrange(7), generator.randbytes(generator.choice((1, 30, 5000)))
    if kind == 0:
        return garbage
    if kind == 1:
        return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    if kind == 2:
        return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + garbage  # TLS's hello
    if kind == 3:
        return PREFACE + garbage
    opening = PREFACE + SETTINGS
    if kind == 4:
        for _ in range(generator.randrange(1, 20)):
            length = generator.choice((None, 0, 2**24 - 1))
            opening += frame(
                generator.randrange(12),
                generator.randrange(256),
                generator.choice((0, 1, 3, 2**31 - 1)),
                garbage[:50],
                length,
            )
        return opening
    message = good_act(generator).SerializeToString()
    prefixed = b"\x00" + struct.pack(">I", generator.choice((len(message), 2**32 - 1, 2**24))) + message
    for stream in range(1, generator.choice((3, 99, 999)), 2):  # many calls, each cut off at once
        opening += frame(1, 4, stream, ACT_HEADERS)
        if kind == 5:
            opening += frame(3, 0, stream, struct.pack(">I", 8))
        else:
            opening += frame(0, 0, stream, prefixed)
    return opening


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def reset(connection: socket.socket) -> None:
    """End a connection by RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def send(connection: socket.socket, content: bytes) -> None:
    """Send as much as the other side takes before it hangs up."""
    with suppress(OSError):
        connection.sendall(content)


def test_connections_that_speak_something_else(server):
    with ExitStack() as left_open:
        for _, generator in cases("connections", 300):
            connection = connect(server.address)
            send(connection, hostile_opening(generator))
            end = generator.randrange(4)
            if end == 0:
                reset(connection)
            elif end == 1:
                connection.close()
            else:
                left_open.enter_context(connection)
        wait_until(lambda: sheds_nothing(server.address), "gRPC to have read what waits")
        assert_answers(server.address)


def test_last_words_do_not_reach_the_log(server):
    with connect(server.address) as connection:
        goodbye = struct.pack(">II", 0, 0xDEAD) + b"first\nsecond line\xff"
        send(connection, PREFACE + SETTINGS + frame(7, 0, 0, goodbye))
        connection.settimeout(1)
        with suppress(OSError):
            while connection.recv(4096):
                pass
    assert "second line" not in server.log


def test_a_flood_of_connections_that_say_nothing(server):
    with ExitStack() as left_open:
        for number in range(400):
            connection = left_open.enter_context(connect(server.address))
            send(connection, (b"", PREFACE[:9], PREFACE, PREFACE + SETTINGS)[number % 4])
        assert_answers(server.address)
        assert server.process.poll() is None


class CuttingProxy:
    """Forwards to a server, and resets both sides of each connection after so many bytes."""

    def __init__(self, address: str, limits: Callable[[], int]) -> None:
        self._target = address
        self._limits = limits
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            pair = (client, connect(self._target))
            left = [self._limits()]
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._forward, args=(source, sink, left), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        try:
            while content := source.recv(4096):
                left[0] -= len(content)
                if left[0] < 0:
                    self.cut += 1
                    break
                sink.sendall(content)
        except OSError:
            pass
        for connection in (source, sink):
            try:
                connection.shutdown(socket.SHUT_RD)
                reset(connection)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_connections_that_are_cut_in_the_middle(server):
    generator = random.Random(f"{SEED}/cut")
    proxy = CuttingProxy(server.address, lambda: generator.randrange(200, 20_000))
    answered = failed = 0
    try:
        for number in range(60):
            try:
                with PolicyClient(proxy.address, "tiny", timeout_s=HANG_S) as client, client.stream() as stream:
                    act = stream.act if number % 2 else client.act
                    for seed in range(40):
                        obs = np.full((1 + seed, 4), 0.1, np.float32)
                        answer = act(obs, seed=seed)
                        noise = draw_noise(expand_seed(seed, len(obs)), SPECS["tiny"].noise_shape)
                        assert np.allclose(
                            answer.action, reference_action(SPECS["tiny"], obs, noise), atol=1e-5
                        )
                        answered += 1
            except RequestError:
                failed += 1
    finally:
        proxy.close()
    assert proxy.cut >= 30
    assert min(answered, failed) >= 30


# ---------------------------------------------------------------------------------------- streams

SMALL_WINDOW = [
    ("grpc.http2.lookahead_bytes", 0),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


@pytest.mark.parametrize("method", [ACT_STREAM, INFER_STREAM], ids=lambda method: method.descriptor.name)
def test_callers_that_send_and_never_read(server, method):
    good: Any = good_act if method is ACT_STREAM else good_infer
    drawn = (good(generator).SerializeToString() for _, generator in cases("slow", 99))
    content = next(content for content in drawn if len(content) > 1500)
    with ExitStack() as left_open:
        sent = Counter[int]()
        for number in range(20):
            channel = left_open.enter_context(grpc.insecure_channel(server.address, options=SMALL_WINDOW))

            def requests(number: int = number) -> Iterator[bytes]:
                while sent[number] < 20_000:
                    sent[number] += 1
                    yield content

            call = channel.stream_stream(method.path)(requests(), timeout=TIMEOUT_S)
            left_open.callback(call.cancel)
        wait_until(lambda: server.metric("rsm_streams_open") == 20, "all streams")
        before, same = (-1.0, -1), 0
        while same < 20:  # until no caller can send any more, and the server answers nothing but scrapes
            now = server.metric("rsm_requests_total"), sent.total()
            before, same = now, same + 1 if now == before else 0
            time.sleep(0.02)
        assert max(sent.values()) < 20_000, "flow control stops a caller that does not read"
        assert server.metric("rsm_streams_open") == 20
        wait_until(lambda: server.metric("rsm_queue_rows") == 0, "an empty queue")
        assert_answers(server.address)


def test_streams_that_end_abruptly(server):
    for name, generator in cases("abrupt", 60):
        channel = grpc.insecure_channel(server.address, options=SMALL_WINDOW[2:])
        calls = []
        for _ in range(5):
            method = generator.choice((ACT_STREAM, INFER_STREAM))
            good: Any = good_act if method is ACT_STREAM else good_infer
            todo: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            count = generator.randrange(0, 100)
            for _ in range(count):
                todo.put(good(generator).SerializeToString())
            call = channel.stream_stream(method.path)(iter(todo.get, None), timeout=TIMEOUT_S)
            calls.append((call, todo, count))
        for call, _, count in calls:
            if generator.random() < 0.5 and count:
                assert next(call), name
            if generator.random() < 0.5:
                call.cancel()
        channel.close()  # what is open is cut off
        for _, todo, _ in calls:
            todo.put(None)


# ------------------------------------------------------------------------------------------- HTTP


def hostile_head(generator: random.Random) -> bytes:
    kind = generator.randrange(8)
    odd = generator.randbytes(generator.choice((1, 50, 3000)))
    paths = (
        "/metrics",
        "/healthz/",
        "/api/sample?policy=tiny&obs=",
        "/api/spec?policy=",
        "//[",
        "/%00",
        "/\xff",
    )
    path = generator.choice(paths).encode("latin-1") + odd.hex().encode()[: generator.choice((0, 9, 4000))]
    if kind == 0:
        return odd
    if kind == 1:
        return b"GET " + odd + b" HTTP/1.1\r\n\r\n"
    if kind == 2:
        return b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n"
    if kind == 3:
        return b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 9000 + b"\r\n"
    if kind == 4:
        return generator.choice((b"POST", b"GET\x00", b"", b"PRI")) + b" /metrics HTTP/1.1\r\n\r\n"
    if kind == 5:
        return b"GET /metrics HTTP/1.1\r\nHost: " + odd.replace(b"\r\n", b"") + b"\r\n\r\n"
    fields = b"&".join(
        b"n=%d" % generator.choice((-1, 0, 1, 513, 10**30)) for _ in range(generator.choice((1, 40)))
    )
    return b"GET " + path + b"&" + fields + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"


def http_status(address: str, head: bytes) -> int:
    """The status of an answer; 0 if the server hung up."""
    with connect(address) as connection:
        send(connection, head)
        try:
            connection.shutdown(socket.SHUT_WR)
            first = connection.makefile("rb").readline()
        except OSError:
            return 0
    return int(first.split()[1]) if first else 0


def test_http_garbage(server):
    statuses = Counter(http_status(server.http, hostile_head(generator)) for _, generator in cases("http", 400))
    assert set(statuses) <= {0, 200, 400, 403, 404, 405, 431}, statuses
    assert statuses[400] > 20
    assert statuses[431] + statuses[0] > 20


def test_http_connections_that_are_slow_or_many(server):
    with ExitStack() as left_open:
        for number in range(1000):
            connection = left_open.enter_context(connect(server.http))
            send(connection, b"GET /metrics HT"[: number % 16])
        assert_answers(server.address)
        # Those that were let in and say nothing more are cut off, and others get their turn.
        wait_until(lambda: _scraped(server), "a place on the HTTP port")
