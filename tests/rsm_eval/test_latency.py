"""Latency of a control loop: how the stages are told apart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rsm_common.errors import ConfigError
from rsm_common.policy import STAGES, Timing
from rsm_eval.latency import Latency, measure_latency
from tests.rsm_eval.policies import FunctionPolicy
from tests.rsm_eval.tiny_env import ENV_ID


def test_network_is_what_the_other_stages_do_not_explain(monkeypatch):
    now_s = 0.0

    def slow(obs, noise):
        nonlocal now_s
        now_s += 0.004
        return noise * 0

    monkeypatch.setattr("rsm_eval.latency.time", SimpleNamespace(perf_counter=lambda: now_s))

    policy = FunctionPolicy(ENV_ID, slow, Timing(queue_us=1000, batch_us=500, compute_us=1500, total_us=9))
    latency = measure_latency(policy, ENV_ID, calls=12, warmup_calls=3)
    assert policy.calls == [1] * 15
    assert latency.calls == 12
    for stage, expected in (("queue", 1.0), ("batch", 0.5), ("compute", 1.5)):
        assert latency.samples_ms[stage].tolist() == [expected] * 12
    np.testing.assert_allclose(latency.samples_ms["total"], 4.0)
    np.testing.assert_allclose(latency.samples_ms["network"], 1.0)


def test_network_is_never_negative():
    policy = FunctionPolicy(ENV_ID, lambda obs, noise: noise * 0, Timing(compute_us=1e9))
    assert measure_latency(policy, ENV_ID, calls=3).samples_ms["network"].tolist() == [0.0] * 3


def test_percentiles():
    samples = {stage: np.arange(101.0) * (index + 1) for index, stage in enumerate(STAGES)}
    percentiles = Latency(samples).percentiles()
    assert percentiles["queue"] == {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0}
    assert percentiles["total"]["p90_ms"] == pytest.approx(450.0)


def test_deterministic_actions_are_asked_for():
    policy = FunctionPolicy(ENV_ID, lambda obs, noise: noise * 0)
    measure_latency(policy, ENV_ID, calls=2, deterministic=True)
    assert all(policy.deterministic)


def test_no_calls_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        measure_latency(FunctionPolicy(ENV_ID, lambda obs, noise: noise * 0), ENV_ID, calls=0)
