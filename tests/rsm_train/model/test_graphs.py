import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsm_train.algorithms.dpmd import DPMD
from rsm_train.config import find_algorithm, resolve
from rsm_train.model.graphs import WARM_UP_CALLS, Captured
from rsm_train.model.kernels import Compute
from tests.rsm_train.algorithms.test_dpmd import SMALL, random_batch
from tests.rsm_train.compiler import needs_compiler
from tests.rsm_train.critic_kinds import KINDS

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


class _Numbers(TorchDispatchMode):
    """The Python numbers that every operation is given."""

    def __init__(self):
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # On CUDA, the learning rate of Adam is a tensor; the temperature is filled in before the graph.
        if "_fused_adam" not in str(func) and "fill_" not in str(func):
            flat = tree_leaves((args, kwargs or {}))
            self.seen.append((str(func), tuple(x for x in flat if isinstance(x, (int, float)))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("algo", "preset", "kind"),
    [
        *[("dpmd", preset, "plain") for preset in ("paper", "reference", "kl")],
        *[(algo, "paper", kind) for algo in ("sdac", "sac") for kind in ("plain", "all at once")],
        ("dpmd", "paper", "all at once"),
    ],
)
def test_an_update_reads_no_python_number_that_changes_and_no_memory_that_moves(algo, preset, kind):
    """A graph freezes both: two updates far apart in temperature and learning rate must not differ in them."""
    settings = {
        "env": "none",
        "algo": algo,
        "preset": preset,
        **{"width": 8, "depth": 1, "policy_lr": 1e-3},
        **({} if algo == "sac" else {"diffusion_steps": 2, "particles": 2, "policy_lr_final": 1e-4}),
        **({} if algo == "sac" else {"policy_lr_decay_start": 0, "policy_lr_decay_updates": 300}),
        **KINDS[kind],
    }
    config: Any = resolve(settings)[1]
    generator = torch.Generator().manual_seed(0)
    algorithm = find_algorithm(algo)(config, 3, 2, generator=generator, device="cpu")
    batch, noise = random_batch(), algorithm.draw_noise(16, generator)

    def numbers():
        with _Numbers() as mode:
            for _ in range(config.policy_every):
                algorithm.update(batch, noise)
        return mode.seen

    def memory():
        params = [value for params in algorithm.agent.networks().values() for value in params.values()]
        return [value.data_ptr() for value in (*params, *algorithm.agent.state().values())]

    for _ in range(4 * config.policy_every):
        algorithm.update(batch, noise)
    first, first_memory = numbers(), memory()
    # Past the temperature's next move, and far into the learning rate's fall.
    while algorithm.agent.updates < 520:
        algorithm.update(batch, noise)
    assert numbers() == first
    assert memory() == first_memory


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

            algorithm._learn_captured.record = record
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


@needs_compiler
@pytest.mark.parametrize(("algo", "kind"), [("dpmd", "all at once"), ("sdac", "batch"), ("sac", "layer")])
def test_compiled_updates_are_the_plain_updates(algo, kind):
    """Losses and their gradients, statistics, temperature and moments, over updates of critics and policy."""
    settings = {"env": "none", "algo": algo, "preset": "quick", "width": 16, "depth": 2, **KINDS[kind]}
    settings |= {"policy_lr": 0.1, "critic_lr": 0.1}
    if algo != "sac":
        settings |= {"diffusion_steps": 2, "particles": 2}
    config: Any = resolve(settings)[1]

    def learn(compile: bool) -> list[dict[str, float]]:
        generator = torch.Generator().manual_seed(0)
        algorithm: Any = find_algorithm(algo)(
            config, 3, 2, generator=generator, compute=Compute(compile=compile)
        )
        for optimizer in algorithm.agent._optimizers.values():
            # Steps in proportion to gradients. Adam's own first steps have one size: where the gradient is
            # zero but for rounding, as of a bias below BatchNorm, their sign would be that of the rounding.
            optimizer.epsilon = 1.0
        history = []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="not compiled")  # the plain functions would take over
            for i in range(2 * config.policy_every):
                metrics = algorithm.update(random_batch(seed=i), algorithm.draw_noise(16, generator))
                history.append({name: float(value) for name, value in metrics.items()})
        return history

    torch._dynamo.utils.counters.clear()
    for plain, fast in zip(learn(False), learn(True), strict=True):
        assert fast == pytest.approx(plain, rel=1e-4, abs=1e-5)
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):
        assert not torch._dynamo.utils.counters["graph_break"]
