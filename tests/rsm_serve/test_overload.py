"""More than the server can do: every documented limit holds, and nothing is left behind.

A test per documented limit:

| limit | shown by |
|---|---|
| --max-queue-rows rows wait, more are refused with a hint | test_ten_times_the_capacity |
| what is accepted waits for no more than a full queue | test_ten_times_the_capacity |
| a higher priority goes first, also in a full queue | test_priorities_hold_in_a_full_queue |
| what expires is not computed | test_a_flood_that_expires_is_never_computed |
| what is cancelled is not computed | test_a_flood_that_is_cancelled_leaves_the_queue |
| --latest-wins: one request of a client_id waits | test_a_client_that_is_too_fast_has_one_place |
| --max-batch-size rows in one request | test_a_request_of_too_many_rows_names_the_limit |
| 16 MiB in one message | test_a_message_of_more_than_16_mib |
| 64 requests of one stream in flight | test_a_stream_that_is_not_read |
| characters of id and obs_stamp | test_what_comes_back_is_bounded |
| characters of a status | test_fuzz.py, test_absurd_claims |
| bytes of a client_id, range of a priority | test_scheduling.py, test_what_a_request_says_of_itself_... |
| connections, bytes and seconds of the HTTP port | test_telemetry.py, TestPort; test_fuzz.py, test_http_... |
| rows of a sample of the status page | test_telemetry.py, TestSample |
| --drain-seconds | test_server.py, TestDrain |
| --workers | test_scheduling.py, TestTurns |
| lines of the log | test_logs.py; test_cli.py, test_a_flood_of_malformed_messages_... |

Nothing here depends on the speed of the machine: a batch ends when the test says so, and the rest is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest

from rsm_common.errors import (
    DeadlineExpiredError,
    InvalidRequestError,
    QueueFullError,
    RequestError,
    SupersededError,
)
from rsm_common.policy import ActResult
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.engine.lane import Lane
from rsm_serve.engine.queue import BatchLimits
from rsm_serve.local import LocalPolicy
from rsm_serve.pb import oip_pb2, oip_pb2_grpc
from rsm_serve.pb import policy_pb2 as pb
from rsm_serve.rpc.oip.requests import MAX_ECHO
from rsm_serve.rpc.streams import STREAM_WINDOW
from rsm_serve.server import background_server
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_model, make_spec, write_bundle
from tests.hang import HANG_S
from tests.rsm_serve.test_server import ANY_PORT, ZEROS, Gated, Rig, raw_stub, wait_until
from tests.server_process import running_server

MIB = 2**20
BATCH_ROWS, QUEUE_ROWS = 4, 32
BATCH_S = 0.02


class Clock:
    """The time of a lane's queue, which passes only while a batch is computed."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Stepped(Gated):
    """A session that computes one batch whenever the test says so, in `BATCH_S` of its own time."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.clock = Clock()
        self.steps = threading.Semaphore(0)
        self.stepping = False

    def run(self, obs_BO, noise_BTNA):
        answer = super().run(obs_BO, noise_BTNA)
        if self.stepping:
            assert self.steps.acquire(timeout=HANG_S)
        self.clock.now_s += BATCH_S
        return answer


class Overloaded(Rig):
    """A rig that knows the most rows that ever waited."""

    peak = 0

    @property
    def stepped(self) -> Stepped:
        assert isinstance(self.session, Stepped)
        return self.session

    def step_only(self) -> None:
        """From now on a batch ends when `step` says so, and the queue's time stands still in between."""
        self.lane.batcher._clock = self.stepped.clock
        self.stepped.stepping = True

    def step(self, batches: int = 1) -> None:
        self.stepped.steps.release(batches)

    def watch(self) -> None:
        queue = self.lane.batcher._queue
        put = queue.put

        def watched(*arguments: Any, **options: Any) -> Any:
            entry = put(*arguments, **options)
            self.peak = max(self.peak, queue.rows)
            return entry

        queue.put = watched  # type: ignore[method-assign]


@contextlib.contextmanager
def rig_of(repository: Any, limits: BatchLimits) -> Iterator[Overloaded]:
    bundle = load_bundle(repository / "tiny")
    session = Stepped(open_session(bundle, "onnxruntime"))
    lane = Lane(LocalPolicy(bundle, session), limits)
    with background_server(
        ServerConfig.from_options(repo=repository, addresses=ANY_PORT, drain_seconds=HANG_S), [lane]
    ) as server:
        rig = Overloaded(server, session, lane)
        rig.watch()
        session.batches.clear()  # of warming up
        try:
            yield rig
        finally:
            rig.open()
            rig.step(1000)
            rig.pool.shutdown()


@pytest.fixture
def rig(bundle_repo) -> Iterator[Overloaded]:
    with rig_of(bundle_repo, BatchLimits(BATCH_ROWS, QUEUE_ROWS)) as rig:
        yield rig


@pytest.fixture
def roomy_rig(bundle_repo) -> Iterator[Overloaded]:
    """No limit but those of streams is in the way."""
    with rig_of(bundle_repo, BatchLimits(BATCH_ROWS, 4096)) as rig:
        yield rig


@pytest.fixture
def slow_client(request) -> Iterator[PolicyClient]:
    rig = request.getfixturevalue("roomy_rig" if "roomy_rig" in request.fixturenames else "rig")
    with PolicyClient(rig.address, timeout_s=HANG_S) as client:
        yield client


@dataclass
class Load:
    """What became of an open loop's requests."""

    answers: list[ActResult] = field(default_factory=list)
    failures: list[RequestError] = field(default_factory=list)

    @property
    def settled(self) -> int:
        return len(self.answers) + len(self.failures)

    async def ask(self, client: AsyncPolicyClient) -> None:
        try:
            self.answers.append(await client.act(np.zeros(4)))
        except RequestError as error:
            self.failures.append(error)

    def queue_s(self) -> list[float]:
        return [1e-6 * answer.timing.queue_us for answer in self.answers]


async def wait_for(count: Callable[[], int], wanted: int, what: str) -> None:
    """Wait, in the event loop of the clients, until a count is reached."""
    end = time.monotonic() + HANG_S
    while count() != wanted:
        assert time.monotonic() < end, f"waited in vain for {what}: wanted {wanted}, got {count()}"
        await asyncio.sleep(0.001)


def test_ten_times_the_capacity(rig):
    """While a batch is computed, ten batches come."""
    rig.step_only()
    rounds, burst = 20, 10 * BATCH_ROWS

    async def main() -> Load:
        load, tasks = Load(), list[asyncio.Task[None]]()
        async with AsyncPolicyClient(rig.address, timeout_s=HANG_S) as client:
            rig.step()
            await client.act(np.zeros(4))  # from now on the server can tell when to try again
            for number in range(1, rounds + 1):
                tasks += [asyncio.create_task(load.ask(client)) for _ in range(burst)]
                # One batch is being computed, the queue is full, and all others have their answer.
                await wait_for(lambda: len(rig.session.batches), 1 + number, "a batch")
                asked = len(tasks) - QUEUE_ROWS - rig.session.batches[-1]
                await wait_for(lambda: load.settled, asked, "refusals")
                assert rig.lane.batcher.queued_rows == QUEUE_ROWS
                rig.step()
                await wait_for(lambda: len(rig.session.batches), 2 + number, "the next batch")
            rig.step(1 + QUEUE_ROWS)
            await asyncio.gather(*tasks)
            after = await client.act(np.zeros(4))
            assert after.timing.batch_rows == 1, "nothing else waits any more"
            assert 1e-6 * after.timing.queue_us < 0.5 * statistics.median(load.queue_s())
            return load

    load = asyncio.run(main())
    assert {type(error) for error in load.failures} == {QueueFullError}
    assert load.settled == rounds * burst
    assert len(load.failures) > 3 * len(load.answers)
    assert rig.peak == QUEUE_ROWS
    assert rig.lane.batcher.queued_rows == 0
    # Nobody who was let in waits longer than for the batch that is computed and a full queue before it.
    assert max(load.queue_s()) < (1 + QUEUE_ROWS // BATCH_ROWS) * BATCH_S + 1e-6
    # The hints say how long a full queue takes.
    hints = [error.retry_after_s for error in load.failures if isinstance(error, QueueFullError)]
    assert all(hint is not None and hint > 0 for hint in hints)
    full_queue_s = QUEUE_ROWS / BATCH_ROWS * BATCH_S
    assert statistics.median(filter(None, hints)) == pytest.approx(full_queue_s, rel=0.2)
    # Full batches: shedding load costs no throughput.
    assert sum(rig.session.batches) == 2 + len(load.answers)
    assert statistics.median(rig.session.batches) == BATCH_ROWS


def test_priorities_hold_in_a_full_queue(rig):
    """One urgent request a batch, and more of the others than the queue holds."""
    first = Load()
    urgent, usual = Load(), Load()
    rounds = 30

    async def main() -> None:
        tasks = list[asyncio.Task[None]]()
        async with (
            AsyncPolicyClient(rig.address, timeout_s=HANG_S, priority=10) as hurried,
            AsyncPolicyClient(rig.address, timeout_s=HANG_S) as patient,
        ):
            tasks.append(asyncio.create_task(first.ask(patient)))
            await wait_for(lambda: len(rig.session.batches), 1, "the first batch")
            for number in range(1, rounds + 1):
                queued = rig.lane.batcher.queued_rows
                tasks.append(asyncio.create_task(urgent.ask(hurried)))
                await wait_for(lambda: rig.lane.batcher.queued_rows, queued + 1, "the urgent one")
                tasks += [asyncio.create_task(usual.ask(patient)) for _ in range(QUEUE_ROWS)]
                await wait_for(lambda: rig.lane.batcher.queued_rows, QUEUE_ROWS, "a full queue")
                asked = len(tasks) - QUEUE_ROWS - rig.session.batches[-1]
                await wait_for(lambda: first.settled + urgent.settled + usual.settled, asked, "refusals")
                rig.step()
                await wait_for(lambda: len(rig.session.batches), 1 + number, "the next batch")
            rig.step(1 + QUEUE_ROWS)
            await asyncio.gather(*tasks)

    rig.step_only()
    asyncio.run(main())
    assert len(urgent.answers) == rounds
    assert len(usual.failures) > 50, "the queue was full"
    assert max(urgent.queue_s()) < 0.5 * statistics.median(usual.queue_s())


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of processes")
def test_a_flood_does_not_stay_in_memory(tmp_path):
    """A real process whose graph is slow; the second flood finds the room that the first one left."""
    spec = make_spec("tiny")
    write_bundle(tmp_path / "repository", spec, model=make_model(spec, work=400))
    obs = np.zeros((64, 4))

    async def flood(address: str) -> int:
        async with AsyncPolicyClient(address, timeout_s=HANG_S) as client:
            tasks = [asyncio.create_task(client.act(obs)) for _ in range(1500)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in results} == {ActResult, QueueFullError}
            return sum(isinstance(result, QueueFullError) for result in results)

    with running_server(tmp_path / "repository", tmp_path / "log", "--max-queue-rows", "128") as server:
        refused = asyncio.run(flood(server.address))
        rss = server.rss_bytes
        refused += asyncio.run(flood(server.address))
        assert refused > 300
        assert server.metric("rsm_requests_total", "reason=queue_full") == refused
        assert server.rss_bytes < rss + 24 * MIB
        assert server.metric("rsm_queue_rows") == 0
        assert "Traceback" not in server.log


def infer_request(**fields: Any) -> oip_pb2.ModelInferRequest:
    """For one row of zeros."""
    rows = fields.pop("rows", 1)
    request = oip_pb2.ModelInferRequest(model_name="tiny", **fields)
    request.inputs.add(name="obs", datatype="FP32", shape=[rows, 4])
    request.raw_input_contents.append(ZEROS * rows)
    return request


def test_a_flood_that_expires_is_never_computed(rig, slow_client):
    clock = rig.lane.batcher._clock = rig.stepped.clock
    first = rig.hold_worker(slow_client)
    timed = infer_request()
    timed.parameters["timeout"].int64_param = 100_000

    async def main(timeout_s: float) -> list[Any]:
        async with AsyncPolicyClient(rig.address, timeout_s=timeout_s, connect_timeout_s=HANG_S) as hasty:
            return await asyncio.gather(*(hasty.act(np.zeros(4)) for _ in range(20)), return_exceptions=True)

    with grpc.insecure_channel(rig.address) as channel:
        stub = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        stream = stub.ModelStreamInfer(iter([timed] * 10), timeout=HANG_S)
        rig.wait_queued(10)
        for attempt in range(12):  # on a busy machine short deadlines pass before the flood reaches the queue
            assert {type(result) for result in asyncio.run(main(0.1 * 2**attempt))} == {DeadlineExpiredError}
            rig.wait_queued(10)
            if rig.peak >= 20:
                break
        assert rig.peak >= 20
        rig.wait_queued(10)  # a request's own limit counts when the next batch is formed, not before
        clock.now_s += 0.2
        rig.open()
        errors = [response.error_message.partition(":")[0] for response in stream]
    assert errors == ["DEADLINE_EXCEEDED"] * 10
    first.result(HANG_S)
    slow_client.act(np.zeros(4))
    assert rig.session.batches == [1, 1]


def test_a_flood_that_is_cancelled_leaves_the_queue(rig, slow_client):
    first = rig.hold_worker(slow_client)

    async def main() -> None:
        async with AsyncPolicyClient(rig.address, timeout_s=HANG_S) as client:
            for _ in range(5):
                tasks = [asyncio.create_task(client.act(np.zeros(4))) for _ in range(QUEUE_ROWS)]
                await asyncio.to_thread(rig.wait_queued, QUEUE_ROWS)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.to_thread(rig.wait_queued, 0)

    asyncio.run(main())
    rig.open()
    first.result(HANG_S)
    assert rig.session.batches == [1]


def test_a_client_that_is_too_fast_has_one_place(bundle_repo):
    limits = BatchLimits(BATCH_ROWS, QUEUE_ROWS, latest_wins=True)
    with rig_of(bundle_repo, limits) as rig, PolicyClient(rig.address, timeout_s=HANG_S) as other:
        first = rig.hold_worker(other)

        async def main() -> list[Any]:
            async with AsyncPolicyClient(rig.address, timeout_s=HANG_S, client_id="fast") as fast:
                tasks = [asyncio.create_task(fast.act(np.zeros(4), seed=seed)) for seed in range(300)]
                await wait_for(lambda: sum(task.done() for task in tasks), 299, "the replaced ones")
                rig.open()
                return await asyncio.gather(*tasks, return_exceptions=True)

        results = asyncio.run(main())
        assert [type(result) for result in results].count(SupersededError) == 299
        assert rig.peak == 1
        first.result(HANG_S)
        assert rig.session.batches == [1, 1]


def test_a_request_of_too_many_rows_names_the_limit(rig, slow_client):
    with slow_client.stream() as stream, grpc.insecure_channel(rig.address) as channel:
        for act in (slow_client.act, stream.act):
            with pytest.raises(InvalidRequestError, match="wanted 1 to 4 rows in one request, got 5"):
                act(np.zeros((5, 4)))
        stub = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="1 to 4 rows in one request, got 5"):
            stub.ModelInfer(infer_request(rows=5), timeout=HANG_S)
        (answer,) = stub.ModelStreamInfer(iter([infer_request(rows=5)]), timeout=HANG_S)
        assert "1 to 4 rows in one request, got 5" in answer.error_message
        typed = infer_request(rows=5)
        typed.inputs[0].contents.fp32_contents.extend([0.0] * 20)
        typed.ClearField("raw_input_contents")
        with pytest.raises(grpc.RpcError, match="1 to 4 rows in one request, got 5"):
            stub.ModelInfer(typed, timeout=HANG_S)
    assert rig.session.batches == []


@pytest.mark.parametrize(
    "method",
    ["rsm.v1.PolicyService/Act", "rsm.v1.PolicyService/ActStream", "inference.GRPCInferenceService/ModelInfer"],
)
def test_a_message_of_more_than_16_mib(rig, slow_client, method):
    with grpc.insecure_channel(rig.address) as channel:

        def send(size: int) -> grpc.RpcError:
            content = b"\xff" * size
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.stream_stream(f"/{method}")(iter([content]), timeout=HANG_S))
            return caught.value

        assert send(16 * MIB).code().name == "INVALID_ARGUMENT", "it was let in, and is no message"
        refused = send(16 * MIB + 1)
    assert refused.code().name == "RESOURCE_EXHAUSTED"
    assert f"larger than max ({16 * MIB + 1} vs. {16 * MIB})" in refused.details()
    assert slow_client.act(np.zeros(4)).action.shape == (2,)


@pytest.mark.parametrize("protocol", ["rsm", "oip"])
def test_a_stream_that_is_not_read(roomy_rig, slow_client, protocol):
    """As many as the window are taken in, whether they wait or are answered and not fetched."""
    first = roomy_rig.hold_worker(slow_client)
    count = 5 * STREAM_WINDOW
    with raw_stub(roomy_rig.address) as act, grpc.insecure_channel(roomy_rig.address) as channel:
        if protocol == "rsm":
            asked = [pb.ActRequest(rows=1, obs=ZEROS, request_id=number) for number in range(count)]
            responses = act.ActStream(iter(asked), timeout=HANG_S)
        else:
            infers = [infer_request(id=str(number)) for number in range(count)]
            stub = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
            responses = stub.ModelStreamInfer(iter(infers), timeout=HANG_S)
        roomy_rig.wait_queued(STREAM_WINDOW)
        more = threading.Event()
        more.wait(0.3)  # whoever takes more in would have done so by now
        assert roomy_rig.lane.batcher.queued_rows == roomy_rig.peak == STREAM_WINDOW
        roomy_rig.open()
        order = [int(r.request_id if protocol == "rsm" else r.infer_response.id) for r in responses]
    assert order == list(range(count))
    assert roomy_rig.peak == STREAM_WINDOW
    first.result(HANG_S)


def test_what_comes_back_is_bounded(rig):
    with grpc.insecure_channel(rig.address) as channel:
        stub = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelInfer(infer_request(id="i" * MAX_ECHO), timeout=HANG_S).id == "i" * MAX_ECHO
        with pytest.raises(grpc.RpcError, match="wanted an id of at most 1024 characters, got 1025"):
            stub.ModelInfer(infer_request(id="i" * (MAX_ECHO + 1)), timeout=HANG_S)
        stamped = infer_request()
        stamped.parameters["obs_stamp"].string_param = "s" * (MAX_ECHO + 1)
        with pytest.raises(grpc.RpcError, match="wanted an obs_stamp of at most 1024 characters"):
            stub.ModelInfer(stamped, timeout=HANG_S)
        long = infer_request(id="i" * 16 * MIB)
        long.id = long.id[:-200]
        (answer,) = stub.ModelStreamInfer(iter([long]), timeout=HANG_S)
        assert answer.error_message.startswith("INVALID_ARGUMENT: wanted an id")
        assert answer.infer_response.id == "i" * MAX_ECHO
    wait_until(lambda: rig.lane.batcher.queued_rows == 0, "an empty queue")
