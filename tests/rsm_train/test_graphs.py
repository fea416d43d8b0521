from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rsm_train.algorithms.dpmd import DPMD
from rsm_train.graphs import WARM_UP_CALLS, Captured
from tests.rsm_train.test_dpmd import SMALL, random_batch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    a: Tensor
    b: Tensor


def record_directly(function):
    """What a CUDA graph does: the function's buffers are fixed when recorded, a replay computes into them."""
    outputs = {name: value.clone() for name, value in function().items()}

    def replay():
        for name, value in function().items():
            outputs[name].copy_(value)

    return replay, outputs


def test_a_replay_sees_new_arguments_in_the_old_buffers():
    seen = []

    def add(pair):
        seen.append(pair.a.data_ptr())
        return {"sum": pair.a + pair.b}

    captured = Captured(add, CPU, record=record_directly)
    for i in range(WARM_UP_CALLS + 3):
        out = captured(Pair(torch.full((2,), float(i)), torch.ones(2)))
        assert out["sum"].tolist() == [i + 1.0] * 2
    assert len(set(seen[WARM_UP_CALLS:])) == 1, "a graph reads the same memory every time"


def test_without_a_device_to_capture_on_every_call_runs():
    calls = []

    def count(pair):
        calls.append(pair)
        return {}

    captured = Captured(count, CPU)
    for _ in range(WARM_UP_CALLS + 2):
        captured(Pair(torch.zeros(1), torch.zeros(1)))
    assert len(calls) == WARM_UP_CALLS + 2


def test_captured_updates_are_the_plain_updates():
    """The path a GPU takes, with a direct call for the capture: temperature, moments and batch move on."""

    def train(captured):
        algorithm = DPMD(
            SMALL.__class__(**{**vars(SMALL), "temperature_schedule": "entropy", "policy_every": 2}),
            *(3, 2),
            generator=torch.Generator().manual_seed(0),
        )
        if captured:
            undo = []

            def record(function):
                # Recording a real graph runs nothing: put back what this run of the function changed.
                agent = algorithm.agent
                saved = [
                    value.detach().clone() for params in agent.networks().values() for value in params.values()
                ]
                state = {name: value.clone() for name, value in agent.state().items()}
                replay, outputs = record_directly(function)
                undo.append(1)
                values = [value for params in agent.networks().values() for value in params.values()]
                with torch.no_grad():
                    for value, old in zip(values, saved, strict=True):
                        value.copy_(old)
                    for name, value in agent.state().items():
                        value.copy_(state[name])
                return replay, outputs

            for one in algorithm._captured.values():
                one._record = record
        generator = torch.Generator().manual_seed(1)
        history = []
        for i in range(12):
            noise = algorithm.draw_noise(16, generator)
            metrics = algorithm.update(random_batch(seed=i), noise)
            history.append({name: float(value) for name, value in metrics.items()})
        if captured:
            assert len(undo) == 2
        return history

    plain, replayed = train(False), train(True)
    for wanted, got in zip(plain, replayed, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)
