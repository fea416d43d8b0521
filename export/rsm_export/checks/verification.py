"""The checks that a graph passes before a bundle is written, in their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from rsm_common.errors import BackendError, BundleError, ParityError
from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import BoxSpec
from rsm_export.checks.accuracy import Accuracy, allowed, compare
from rsm_export.checks.static_rules import check_model, check_static_rules
from rsm_export.checks.tensorrt_rules import check_tensorrt
from rsm_export.config import Precision
from rsm_serve.bundle.probe import Probe
from rsm_serve.sessions import Session
from rsm_train.policy import TorchPolicy

Array = NDArray[np.float32]

ROWS = 256
BATCH_SIZES = (1, 7, 64)
_SEED = 0x5041_5249_5459
_CORNER_DEVIATIONS = 5.0


@dataclass(frozen=True)
class Check:
    """A check that was passed."""

    name: str
    finding: str
    """What was seen, with figures."""


@dataclass(frozen=True)
class Verification:
    """All checks of one graph."""

    checks: tuple[Check, ...]
    accuracy: Accuracy

    def with_check(self, name: str, finding: str) -> Verification:
        """The same and one more."""
        return Verification((*self.checks, Check(name, finding)), self.accuracy)


def verify(
    model: onnx.ModelProto,
    policy: TorchPolicy,
    open_session: Callable[[], Session],
    pool_PO: Array,
    precision: Precision,
    probe: Probe | None = None,
) -> Verification:
    """Check a graph.

    Args:
        model: the graph.
        policy: what it was made from, with the same steps, particles and sampler.
        open_session: opens the graph in a runtime.
        pool_PO: observations that the policy met, to draw on.
        precision: of the graph.
        probe: of the bundle, which a server will replay; None to leave that out.

    Raises:
        ParityError, BundleError: the first check that failed, by name: which tensor and how far.
    """
    checks = []

    def run(name: str, check: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, check()))
        except (BundleError, BackendError) as error:
            kind = ParityError if isinstance(error, ParityError) else BundleError
            raise kind(f"check {name!r} failed: {error}") from error

    run("onnx", lambda: _valid(model))
    run("static rules", lambda: _static(model))
    session = open_session()
    try:
        comparison = _Comparison(policy, session, observations(pool_PO, policy.spec.observation), precision)
        run("parity", comparison.parity)
        run("batches", comparison.batches)
        run("fresh inputs", comparison.fresh_inputs)
        if probe is not None:
            comparison.replay(probe)
    finally:
        session.close()
    return Verification(tuple(checks), comparison.accuracy)


def observations(pool_PO: Array, box: BoxSpec, rows: int = ROWS) -> Array:
    """Observations to compare on, [rows, O]: half met in training, a quarter random around them, then corners.

    A corner is zero, a finite bound of the observation space, or 5 standard deviations from the mean, the signs
    drawn for each element.
    """
    rng = np.random.default_rng(_SEED)
    mean, deviation = pool_PO.mean(axis=0), np.maximum(pool_PO.std(axis=0), 1e-3)
    met = pool_PO[rng.integers(len(pool_PO), size=rows // 2)]
    near = mean + 2 * deviation * rng.standard_normal((rows // 4, box.size))
    low, high = ([np.nan if bound is None else bound for bound in bounds] for bounds in (box.low, box.high))
    bounds = np.nan_to_num(np.array([low, high]), nan=0.0)
    signs = rng.choice([-1.0, 1.0], size=(rows - len(met) - len(near) - len(bounds) - 1, box.size))
    corners = mean + _CORNER_DEVIATIONS * deviation * signs
    return np.concatenate([met, near, np.zeros((1, box.size)), bounds, corners]).astype(np.float32)


def _valid(model: onnx.ModelProto) -> str:
    check_model(model)
    return f"valid, shapes inferred, {model.ByteSize() / 1e3:.0f} kB"


def _static(model: onnx.ModelProto) -> str:
    check_static_rules(model)
    check_tensorrt(model)
    return "no control flow, no randomness, only the batch dynamic, operators and types that TensorRT takes"


class _Comparison:
    """The policy and the graph on the same observations and noise."""

    def __init__(self, policy: TorchPolicy, session: Session, obs_BO: Array, precision: Precision) -> None:
        self._policy, self._session, self._obs = policy, session, obs_BO
        self._noise = draw_noise(expand_seed(_SEED, len(obs_BO)), policy.spec.noise_shape)
        self._tolerance = allowed(policy, obs_BO, self._noise, precision)
        self.accuracy: Accuracy

    def parity(self) -> str:
        """Torch against the runtime, at the largest of the batches."""
        self.accuracy = a = self._compare(slice(None), BATCH_SIZES[-1])
        value = "" if a.max_q_error is None else f", of q {a.max_q_error:.1e} ({a.tolerance.value:.1g})"
        return (
            f"max error {a.max_error:.1e} of the action range ({a.tolerance.action:.1g} allowed){value}, "
            f"another particle in {a.other_particle_rate:.1%} of {a.rows} rows, {self._session.runtime}"
        )

    def batches(self) -> str:
        """Rows do not depend on the batch they are computed in."""
        for size in BATCH_SIZES[:-1]:
            self._compare(slice(BATCH_SIZES[-1]), size)
        return f"the same actions in batches of {', '.join(map(str, BATCH_SIZES))}"

    def fresh_inputs(self) -> str:
        """Two observations in a row give two actions: no runtime may keep the inputs of an earlier call."""
        noise = np.repeat(self._noise[:1], len(self._noise), axis=0)
        wanted = self._policy.act(self._obs, noise=noise).action
        span = self._policy.spec.action_high - self._policy.spec.action_low
        other = int((np.abs(wanted - wanted[0]) / span).max(axis=1).argmax())
        distance = float((np.abs(wanted[other] - wanted[0]) / span).max())
        if distance <= 2 * self._tolerance.action:
            return f"the policy itself gives one action for all {len(self._obs)} observations"
        for row in (0, other, 0):
            action, q = self._run(self._obs[row : row + 1], noise[:1])
            compare(self._policy, self._obs[row : row + 1], noise[:1], action, q, self._tolerance)
        return f"two observations give two actions, {distance:.2g} of the action range apart"

    def replay(self, probe: Probe) -> None:
        """The probe, as a server replays it: there another particle of nearly the best value is an error.

        Raises:
            ParityError: no server would load the bundle.
        """
        spec = self._policy.spec
        action, _ = self._run(probe.obs, probe.noise)
        worst = float((np.abs(action - probe.action) / (spec.action_high - spec.action_low)).max())
        limit = max(spec.tolerance, self._tolerance.action)
        if not worst <= limit:  # also true for NaN
            raise ParityError(
                f"check 'probe' failed: wanted the actions of the probe to within {limit:g} of the action "
                f"range, got an error of {worst:.3g} from {self._session.runtime}, and no server would load "
                "the bundle; use another --precision, or --particles 1"
            )

    def _compare(self, rows: slice, batch: int) -> Accuracy:
        obs, noise = self._obs[rows], self._noise[rows]
        starts = range(0, len(obs), batch)
        answers = [self._run(obs[i : i + batch], noise[i : i + batch]) for i in starts]
        action = np.concatenate([answer[0] for answer in answers])
        values = [answer[1] for answer in answers if answer[1] is not None]
        q = np.concatenate(values) if values else None
        return compare(self._policy, obs, noise, action, q, self._tolerance)

    def _run(self, obs: Array, noise: Array) -> tuple[Array, Array | None]:
        try:
            return self._session.run(obs, noise)
        except Exception as error:  # every runtime has its own
            raise BackendError(f"{self._session.runtime} cannot run the graph: {error}") from error
