"""The graph of a Gaussian policy, against torch and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.checker import check_model
from rsm_export.checks.static_rules import check_static_rules
from rsm_export.checks.tensorrt_rules import check_tensorrt
from rsm_export.config import Precision
from rsm_export.graph.fold import fold
from rsm_export.graph.onnx_graph import build_graph

from rsm_train.model.samplers.gaussian import GaussianWeights
from tests.rsm_export.graph.test_onnx_graph import RUNTIMES, follows, in_onnxruntime
from tests.rsm_export.policies import inputs, random_gaussian


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"depth": 1},
        {"kind": {"norm": "layer"}},
        {"kind": {"norm": "batch", "atoms": 21, "input_norm": True, "unit": 3.0}},
        {"selection": "mean"},
        {"selection": "mean_std", "selection_std": -1.5},
        {"action_size": 1, "obs_size": 1},
    ],
)
def test_the_graph_acts_like_the_policy(particles, settings):
    policy = random_gaussian(particles=particles, **settings)
    model = build_graph(fold(policy.weights))
    check_model(model)
    check_static_rules(model)
    check_tensorrt(model)
    for rows in (1, 33):
        feeds = inputs(policy.spec, rows)
        answer = in_onnxruntime(model, feeds)
        assert follows(policy, "fp32", answer, feeds).max_error <= 1e-5
    assert answer[0].std() > 0.05, "a constant policy would agree with anything"


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_every_runtime_and_precision(runtime, precision: Precision):
    if (runtime, precision) == ("onnxruntime", "bf16"):
        pytest.skip("onnxruntime has no bf16 kernels on a CPU")
    policy = random_gaussian(particles=4)
    feeds = inputs(policy.spec, 40)
    answer = RUNTIMES[runtime](build_graph(fold(policy.weights), precision), feeds)
    assert (follows(policy, precision, answer, feeds).max_error > 1e-5) == (precision != "fp32")


def test_noise_moves_the_action_by_sigma_and_zero_noise_gives_the_mean():
    policy = random_gaussian()
    weights = policy.weights
    assert isinstance(weights, GaussianWeights)
    feeds = inputs(policy.spec, 9)
    params = {name: value.double().numpy() for name, value in weights.policy.items()}
    hidden = feeds["obs"].astype(np.float64)
    for i in range(2):
        pre = hidden @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"]
        hidden = pre * np.tanh(np.logaddexp(0, pre))  # mish
    mean, log_std = np.split(hidden @ params["layers.2.weight"].T + params["layers.2.bias"], 2, axis=1)
    model = build_graph(fold(weights))
    low, high = policy.spec.action_low, policy.spec.action_high
    for factor in (0.0, 1.0):
        (action,) = in_onnxruntime(model, {"obs": feeds["obs"], "noise": factor * feeds["noise"]})
        squashed = np.tanh(mean + factor * np.exp(np.clip(log_std, -20, 2)) * feeds["noise"][:, 0, 0])
        assert action == pytest.approx(low + (high - low) * (squashed + 1) / 2, abs=2e-5)
