"""The clients of benchmarks/soak.py, each of which runs as a process of its own.

    python benchmarks/soak_clients.py KIND ADDRESS SEED

A client checks each answer by its seeds and version, because the graphs compute a known function. It reports on
standard output, a JSON object a line, until SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import queue
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import RequestError
from rsm_common.policy import ActResult
from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import PolicySpec
from rsm_serve.client import AsyncPolicyClient, PolicyClient
from tests.bundles import make_model, make_spec, reference_action, write_bundle
from tests.hang import HANG_S

MAX_BATCH = 16
WORK = 150
"""Makes alpha slow enough that something waits when a version is replaced; see `make_model`."""
TOLERANCE = 1e-5
REPORT_S = 0.25
PATIENT: dict[str, Any] = {"timeout_s": HANG_S, "connect_timeout_s": HANG_S}
"""A request that is not answered in this time is lost."""


def spec_of(policy: str, version: int) -> PolicySpec:
    """The specification of a version; versions of alpha alternate between two graphs with different noise."""
    sizes: dict[str, dict[str, Any]] = {
        "alpha": {"steps": 3, "particles": 2} if version % 2 else {"steps": 5, "particles": 4},
        "beta": {"obs_size": 6, "has_q": False},
        "gamma": {"obs_size": 17, "action_size": 6, "particles": 8},
    }
    return make_spec(policy, str(version), **sizes[policy])


def write_policy(repository: Path, policy: str, version: int) -> Path:
    """Write the bundle of a version; returns its directory."""
    spec = spec_of(policy, version)
    return write_bundle(repository, spec, model=make_model(spec, work=WORK if policy == "alpha" else 0))


Step = tuple[float, float, str, float]
"""When it was answered, microseconds in all, version, and microseconds of the batch."""


class Ledger:
    """The requests of a client and their outcomes."""

    def __init__(self) -> None:
        self.started = 0
        self.outcomes: Counter[str] = Counter()
        self.details: list[str] = []
        self.steps: list[Step] = []
        """Of the steady client."""

    def settle(self, outcome: str, detail: str = "") -> None:
        """One request has ended."""
        self.outcomes[outcome] += 1
        if detail and len(self.details) < 5:
            self.details.append(f"{outcome}: {detail:.300}")

    def answered(self, policy: str, obs_BO: NDArray[np.float32], seeds: Any, version: str, action: Any) -> None:
        """Check an answer by its seeds and version."""
        spec = spec_of(policy, int(version))
        noise = draw_noise(np.asarray(seeds, np.uint64).reshape(-1), spec.noise_shape)
        wanted = reference_action(spec, obs_BO, noise)
        if np.allclose(np.asarray(action).reshape(wanted.shape), wanted, atol=TOLERANCE):
            self.settle("answered")
        else:
            self.settle("wrong", f"{policy}:{version} gave {np.asarray(action)!s:.100}")

    def failed(self, error: BaseException, expected: tuple[str, ...]) -> None:
        """A request ended in an error; `expected` are the types that it may have."""
        kind = type(error).__name__
        if kind in expected:
            self.settle(kind)
        else:
            self.settle("unexpected", f"{kind}: {error}")

    def write(self, out: IO[str], *, final: bool = False) -> None:
        """Write one line with all counts."""
        steps = self.steps if final else []
        line = {"started": self.started, "outcomes": self.outcomes, "details": self.details, "final": final}
        version = self.steps[-1][2] if self.steps else ""
        print(json.dumps({**line, "steps": steps, "version": version}), file=out, flush=True)


@dataclass
class Worker:
    """One client process."""

    address: str
    generator: random.Random
    ledger: Ledger = field(default_factory=Ledger)
    stopped: bool = False
    reported_s: float = 0.0

    def obs(self, policy: str, rows: int) -> NDArray[np.float32]:
        """Observations [rows, O]."""
        size = spec_of(policy, 1).observation.size
        values = [self.generator.gauss(0, 1) for _ in range(rows * size)]
        return np.array(values, np.float32).reshape(rows, size)

    def seed(self) -> int | None:
        """A seed, or sometimes None, for which the server draws one."""
        return self.generator.choice((None, self.generator.getrandbits(64)))

    def steps(self, pause_s: float) -> Iterator[int]:
        """Yield steps until the stop signal, with pauses and reports in between."""
        number = 0
        while not self.stopped:
            yield number
            number += 1
            time.sleep(self.generator.uniform(0, 2 * pause_s))
            self.report()

    def report(self) -> None:
        """Report the counts every `REPORT_S`."""
        if time.monotonic() > self.reported_s + REPORT_S:
            self.reported_s = time.monotonic()
            self.ledger.write(sys.stdout)

    def ask(
        self, policy: str, rows: int, act: Callable[..., ActResult], expected: tuple[str, ...] = ()
    ) -> ActResult | None:
        """One request and its check."""
        obs, seed = self.obs(policy, rows), self.seed()
        self.ledger.started += 1
        try:
            answer = act(obs, seed=seed)
        except RequestError as error:
            self.ledger.failed(error, expected)
            return None
        if seed is not None and not np.array_equal(np.asarray(answer.seed), expand_seed(seed, rows)):
            self.ledger.settle("wrong", f"the seeds are not those of {seed}")
            return None
        self.ledger.answered(policy, obs, answer.seed, answer.version, answer.action)
        return answer


GONE = ("PolicyNotFoundError", "NotReadyError")
"""What a request for a version may meet that has just been replaced."""


def unary(worker: Worker) -> None:
    """Call `PolicyClient.act` on two policies, sometimes for the version that answered last."""
    with (
        PolicyClient(worker.address, "alpha", **PATIENT) as alpha,
        PolicyClient(worker.address, "beta", priority=3, **PATIENT) as beta,
    ):
        for number in worker.steps(0.02):
            answer = worker.ask("alpha", worker.generator.randint(1, 4), alpha.act)
            worker.ask("beta", 1, beta.act)
            if number % 50 == 0 and answer is not None:
                ask_by_version(worker, answer.version)


def ask_by_version(worker: Worker, version: str) -> None:
    """A client of its own for one version."""
    try:
        with PolicyClient(worker.address, "alpha", version, **PATIENT) as client:
            answer = worker.ask("alpha", 1, client.act, GONE)
            if answer is not None and answer.version != version:
                worker.ledger.settle("unexpected", f"wanted version {version}, got {answer.version}")
    except RequestError as error:  # it was replaced before the client was connected
        worker.ledger.started += 1
        worker.ledger.failed(error, GONE)


def steady(worker: Worker) -> None:
    """A control loop at 50 Hz on one stream, whose latency is recorded."""
    with PolicyClient(worker.address, "alpha", priority=5, **PATIENT) as client, client.stream() as stream:
        for _ in worker.steps(0.0):
            time.sleep(0.02)
            answer = worker.ask("alpha", 1, stream.act)
            if answer is not None:
                timing = answer.timing
                batch_us = timing.batch_us + timing.compute_us
                worker.ledger.steps.append(
                    (time.time(), round(timing.total_us, 1), answer.version, round(batch_us, 1))
                )


def vector(worker: Worker) -> None:
    """Send many rows in one request, as vectorised environments do, alone and in a stream."""
    with PolicyClient(worker.address, "gamma", **PATIENT) as client, client.stream() as stream:
        for number in worker.steps(0.05):
            worker.ask(
                "gamma", worker.generator.choice((4, 8, MAX_BATCH)), (client.act, stream.act)[number % 2]
            )


def many(worker: Worker) -> None:
    """Use `AsyncPolicyClient` in bursts, with some short deadlines and some cancelled requests."""
    asyncio.run(bursts(worker))


async def bursts(worker: Worker) -> None:
    async with (
        AsyncPolicyClient(worker.address, "alpha", priority=-2, **PATIENT) as patient,
        AsyncPolicyClient(worker.address, "gamma", timeout_s=0.004, connect_timeout_s=HANG_S) as hasty,
    ):
        while not worker.stopped:
            count = worker.generator.choice((4, 16, 64))
            tasks = [asyncio.create_task(ask_async(worker, patient, hasty)) for _ in range(count)]
            await asyncio.sleep(worker.generator.uniform(0, 0.004))
            for task in tasks:
                if worker.generator.random() < 0.1:
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            worker.report()
            await asyncio.sleep(worker.generator.uniform(0, 0.4))


async def ask_async(worker: Worker, patient: AsyncPolicyClient, hasty: AsyncPolicyClient) -> None:
    policy, client = worker.generator.choice((("alpha", patient), ("alpha", patient), ("gamma", hasty)))
    obs = worker.obs(policy, worker.generator.choice((1, 1, 8)))
    worker.ledger.started += 1
    try:
        answer = await client.act(obs, seed=worker.seed())
    except asyncio.CancelledError:
        worker.ledger.settle("cancelled")
        raise
    except RequestError as error:
        late = ("DeadlineExpiredError",) if client is hasty else ()
        worker.ledger.failed(error, late)
    else:
        worker.ledger.answered(policy, obs, answer.seed, answer.version, answer.action)


def triton(worker: Worker) -> None:
    """Use `tritonclient`: single requests, and several at once in a stream."""
    import tritonclient.grpc as grpcclient

    client = grpcclient.InferenceServerClient(worker.address)
    results: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.start_stream(callback=lambda result, error: results.put((result, error)))
    for _ in worker.steps(0.04):
        obs = worker.obs("beta", worker.generator.randint(1, 3))
        worker.ledger.started += 1
        result = client.infer("beta", [tensor(obs)], priority=worker.generator.randrange(22))
        check_triton(worker, "beta", obs, result)
        asked = {str(number): worker.obs("alpha", 1) for number in range(4)}
        for request_id, one in asked.items():
            worker.ledger.started += 1
            client.async_stream_infer("alpha", [tensor(one)], request_id=request_id)
        for request_id, one in asked.items():
            streamed, error = results.get(timeout=HANG_S)
            if error is not None or streamed.get_response().id != request_id:
                worker.ledger.settle("unexpected", f"{error} instead of the answer to {request_id}")
            else:
                check_triton(worker, "alpha", one, streamed)
    client.stop_stream()
    client.close()


def tensor(obs: NDArray[np.float32]) -> Any:
    import tritonclient.grpc as grpcclient

    value = grpcclient.InferInput("obs", list(obs.shape), "FP32")
    value.set_data_from_numpy(obs)
    return value


def check_triton(worker: Worker, policy: str, obs: NDArray[np.float32], result: Any) -> None:
    parameters = result.get_response().parameters
    seed = parameters["seed"]
    seeds = [seed.uint64_param] if len(obs) == 1 else [int(text) for text in seed.string_param.split(",")]
    version = parameters["version"].string_param
    worker.ledger.answered(policy, obs, seeds, version, result.as_numpy("action"))


def leaver(worker: Worker) -> None:
    """Open streams, read some answers, and leave by cancelling or closing the connection."""
    import grpc

    from rsm_serve.pb import policy_pb2 as pb
    from rsm_serve.wire.codec import SERVICE

    for _ in worker.steps(0.1):
        with grpc.insecure_channel(worker.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
            asked = [worker.obs("alpha", 1) for _ in range(worker.generator.randint(1, 30))]
            for obs in asked:
                todo.put(pb.ActRequest(policy="alpha", rows=1, obs=obs.tobytes(), client_id="leaver"))
            worker.ledger.started += len(asked)
            act = channel.stream_stream(
                f"/{SERVICE}/ActStream", pb.ActRequest.SerializeToString, pb.ActResponse.FromString
            )
            call = act(iter(todo.get, None), timeout=HANG_S)
            read = worker.generator.randint(0, len(asked))
            for obs in asked[:read]:
                answer = next(call)
                if answer.HasField("error"):
                    worker.ledger.settle("unexpected", answer.error.message)
                else:
                    action = np.frombuffer(answer.action, "<f4")
                    worker.ledger.answered("alpha", obs, answer.seeds[:], answer.version, action)
            for _ in asked[read:]:
                worker.ledger.settle("abandoned")
            if worker.generator.random() < 0.5:
                call.cancel()
            todo.put(None)


KINDS: dict[str, Callable[[Worker], None]] = {
    "steady": steady,
    "unary": unary,
    "vector": vector,
    "many": many,
    "triton": triton,
    "leaver": leaver,
}


def work(kind: str, address: str, seed: str) -> None:
    """The main program of a client process; SIGTERM ends it cleanly."""
    worker = Worker(address, random.Random(seed))

    def stop(*_: object) -> None:
        worker.stopped = True

    signal.signal(signal.SIGTERM, stop)
    try:
        KINDS[kind](worker)
    except Exception as error:
        worker.ledger.settle("unexpected", f"{kind} ended: {type(error).__name__}: {error}")
    worker.ledger.write(sys.stdout, final=True)


if __name__ == "__main__":
    work(*sys.argv[1:])
