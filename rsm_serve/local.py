"""A policy in this process: a bundle and the session that runs it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsm_common.errors import BackendError, BundleError
from rsm_common.policy import ActResult, ActRows, Seed, Timing, act_rows
from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import PolicySpec
from rsm_serve.bundle.contract import Bundle, load_bundle
from rsm_serve.sessions import Session
from rsm_serve.sessions.batch_sizes import bucket_sizes
from rsm_serve.sessions.choice import open_session, probe_tolerance

logger = logging.getLogger(__name__)

BOUND_TOLERANCE = 1e-5
"""Largest distance out of the bounds, as a fraction of the action range, that counts as rounding and is
clipped. A larger one is a fault of the graph or the backend."""

MAX_NOISE_AT_ONCE = 4096
"""Most random numbers that `LocalPolicy.prepare` draws in the event loop of a server; the worker thread draws
the noise of larger requests. numpy releases the interpreter's lock for every row. Under load the worker would
wait for the event loop to return the lock, which cost a tenth of the throughput of 64 clients."""


def open_policy(
    path: str | Path, backend: str = "auto", *, threads: int = 1, cache_dir: Path | None = None
) -> LocalPolicy:
    """Load, verify, warm up and probe a bundle: a version directory, or a policy directory (its current one).

    A model.onnx of rsm-export without a bundle runs too, unverified, with a warning.

    Raises:
        UsageError, MissingExtraError, BundleError: see `load_bundle`, `open_session` and `LocalPolicy`.
    """
    return run_bundle(load_bundle(path), backend, threads=threads, cache_dir=cache_dir)


def run_bundle(
    bundle: Bundle,
    backend: str = "auto",
    *,
    threads: int = 1,
    max_batch_size: int = 64,
    cache_dir: Path | None = None,
    warm_up_all: bool = False,
) -> LocalPolicy:
    """Open a session for a verified bundle, warm it up and probe it.

    `warm_up_all`: with every size of batch that a runtime keeps a graph for, instead of one row.

    Raises:
        UsageError, MissingExtraError, BundleError: see `open_session` and `LocalPolicy`.
    """
    session = open_session(bundle, backend, threads=threads, max_batch_size=max_batch_size, cache_dir=cache_dir)
    tolerance = probe_tolerance(backend, bundle.spec)
    try:
        rows = bucket_sizes(max_batch_size) if warm_up_all else (1,)
        return LocalPolicy(bundle, session, warm_up_rows=rows, tolerance=tolerance)
    except BaseException:
        session.close()
        raise


class CheckedSession:
    """A session of a policy whose outputs are checked: their shapes, finite numbers and the action bounds.

    Args:
        spec: of the policy.
        session: runs its graph; closed by `close`.
    """

    def __init__(self, spec: PolicySpec, session: Session) -> None:
        self.spec = spec
        self._session = session
        self._closed = False
        self._low, self._high = spec.action_low, spec.action_high
        self._slack = BOUND_TOLERANCE * (self._high - self._low)

    @property
    def runtime(self) -> str:
        """Name, version and device of the runtime: "onnxruntime 1.31.1, CPU"."""
        return self._session.runtime

    def close(self) -> None:
        """Release the session, when no call is under way; later runs raise BackendError. May be repeated."""
        if not self._closed:
            self._closed = True
            self._session.close()

    def run(
        self, requests: Sequence[ActRows]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, float, float]:
        """Run the graph once for several requests, and draw the noise that they lack.

        Returns:
            (action [B, A], q [B] or None, microseconds of stacking and noise, microseconds of the graph).

        Raises:
            BackendError: the graph failed, or gave outputs of other shapes.
        """
        started = time.perf_counter()
        obs_BO, noise_BTNA = self._stack(requests)
        stacked = time.perf_counter()
        if self._closed:
            raise BackendError(f"policy {self.spec.name!r} was closed; open it again")
        try:
            action_BA, q_B = self._session.run(obs_BO, noise_BTNA)
        except Exception as error:
            raise BackendError(f"policy {self.spec.name!r} could not be evaluated: {error}") from error
        done = time.perf_counter()
        self._check_shapes(len(obs_BO), action_BA, q_B)
        return action_BA, q_B, 1e6 * (stacked - started), 1e6 * (done - stacked)

    def clip(
        self, action_BA: NDArray[np.float32], q_B: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Return (actions inside the bounds, which rows [B] were finite and at most the slack outside).

        The second is None if all rows were.
        """
        clipped_BA = np.minimum(np.maximum(action_BA, self._low), self._high)
        # The graph clips already, so this is the usual case and takes half the time; NaN does not equal itself.
        if _all(clipped_BA == action_BA) and (q_B is None or _all(np.isfinite(q_B))):
            return clipped_BA, None
        sound_B = np.logical_and.reduce(np.abs(clipped_BA - action_BA) <= self._slack, axis=1)
        return clipped_BA, sound_B if q_B is None else np.logical_and(sound_B, np.isfinite(q_B))

    def unsound(self, action_BA: NDArray[np.float32]) -> BackendError:
        """Make the error for rows that `clip` does not accept."""
        return BackendError(
            f"policy {self.spec.name!r} gave an action or value that is not finite or out of bounds "
            f"(actions from {action_BA.min()} to {action_BA.max()}); export the policy again"
        )

    def _stack(self, requests: Sequence[ActRows]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if len(requests) == 1:
            return requests[0].obs_BO, requests[0].drawn_noise(self.spec)
        obs_BO = np.concatenate([request.obs_BO for request in requests])
        noise_BTNA = np.concatenate([request.drawn_noise(self.spec) for request in requests])
        return obs_BO, noise_BTNA

    def _check_shapes(self, rows: int, action_BA: NDArray[np.float32], q_B: NDArray[np.float32] | None) -> None:
        q_shape = (rows,) if self.spec.has_q else None
        found = (action_BA.shape, None if q_B is None else q_B.shape)
        if found != ((rows, self.spec.action.size), q_shape):
            raise BackendError(f"policy {self.spec.name!r}: the graph gave shapes {found} for {rows} rows")


class LocalPolicy:
    """A `Policy` over a bundle and a session; ready when constructed.

    Construction runs the graph once per batch size in `warm_up_rows` and replays the bundle's probe.
    `act` and `act_batch` may be called from one thread at a time.

    Args:
        bundle: the policy.
        session: runs its graph; closed by `close`.
        warm_up_rows: batch sizes to run once.
        tolerance: how far probe actions may be off, as a fraction of the action range; None: as far as the
            specification says.

    Raises:
        BundleError: the graph fails, or its probe actions are off by more than the tolerance.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        *,
        warm_up_rows: Sequence[int] = (1,),
        tolerance: float | None = None,
    ) -> None:
        # The bundle is not kept: its model is as large as the session, which has a copy of its own.
        self._spec = bundle.spec
        self._probe_obs = bundle.probe.obs
        self._row_noise = math.prod(bundle.spec.noise_shape)
        self._graph = CheckedSession(bundle.spec, session)
        _warm_up(self._graph, bundle.path, warm_up_rows)
        _replay_probe(self._graph, bundle, bundle.spec.tolerance if tolerance is None else tolerance)

    @property
    def spec(self) -> PolicySpec:
        """The policy's specification."""
        return self._spec

    @property
    def runtime(self) -> str:
        """Name, version and device of the runtime: "onnxruntime 1.31.1, CPU"."""
        return self._graph.runtime

    @property
    def probe_obs(self) -> NDArray[np.float32]:
        """The bundle's recorded observations [P, O]; without rows for a bare graph."""
        return self._probe_obs

    def close(self) -> None:
        """Release the session, when no call is under way; later calls raise BackendError. May be repeated."""
        self._graph.close()

    def act(
        self,
        obs: ArrayLike,
        *,
        seed: Seed = None,
        noise: NDArray[np.float32] | None = None,
        deterministic: bool = False,
    ) -> ActResult:
        """Sample actions; see `rsm_common.policy.Policy.act`.

        Raises:
            InvalidRequestError: wrong shape, dtype or count, or NaN or Inf.
            BackendError: the graph failed, or gave actions that are not finite or out of bounds.
        """
        started = time.perf_counter()
        rows = act_rows(self._spec, obs, seed=seed, noise=noise, deterministic=deterministic)
        action_BA, q_B, batch_us, compute_us = self._graph.run([rows])
        clipped_BA, sound_B = self._graph.clip(action_BA, q_B)
        if sound_B is not None and not sound_B.all():
            raise self._graph.unsound(action_BA)
        timing = Timing(
            batch_us=batch_us,
            compute_us=compute_us,
            batch_rows=len(action_BA),
            total_us=1e6 * (time.perf_counter() - started),
        )
        return rows.result(clipped_BA, q_B, version=self._spec.version, timing=timing)

    def prepare(self, rows: ActRows) -> ActRows:
        """Draw the noise of a request in the calling thread, if there is little; else return it unchanged.

        A server calls this in its event loop; `act_batch` draws the rest in the worker thread.
        """
        if rows.noise_BTNA is not None or len(rows.obs_BO) * self._row_noise > MAX_NOISE_AT_ONCE:
            return rows
        return ActRows(rows.obs_BO, rows.seeds_B, rows.drawn_noise(self._spec), rows.single)

    def act_batch(self, requests: Sequence[ActRows]) -> list[ActResult | BackendError]:
        """Answer several validated requests with one run of the graph.

        A request whose rows come out unsound gets a BackendError of its own; the others are answered.

        Raises:
            BackendError: the graph failed as a whole.
        """
        action_BA, q_B, batch_us, compute_us = self._graph.run(requests)
        clipped_BA, sound_B = self._graph.clip(action_BA, q_B)
        timing = Timing(0.0, batch_us, compute_us, len(action_BA))
        version = self._spec.version
        if len(requests) == 1 and sound_B is None:
            return [requests[0].result(clipped_BA, q_B, version=version, timing=timing)]
        answers: list[ActResult | BackendError] = []
        start = 0
        for request in requests:
            rows = slice(start, start + len(request.obs_BO))
            start = rows.stop
            if sound_B is None or sound_B[rows].all():
                q = None if q_B is None else q_B[rows]
                answers.append(request.result(clipped_BA[rows], q, version=version, timing=timing))
            else:
                answers.append(self._graph.unsound(action_BA[rows]))
        return answers


def _warm_up(session: CheckedSession, path: Path, sizes: Sequence[int]) -> None:
    spec = session.spec
    for rows in sizes:
        obs_BO = np.zeros((rows, spec.observation.size), dtype=np.float32)
        noise_BTNA = draw_noise(expand_seed(0, rows), spec.noise_shape)
        _run_or_reject(session, path, ActRows(obs_BO, None, noise_BTNA, single=False))


def _replay_probe(session: CheckedSession, bundle: Bundle, tolerance: float) -> None:
    probe, spec = bundle.probe, session.spec
    if not len(probe.obs):  # a bare graph
        return
    action_PA = _run_or_reject(session, bundle.path, ActRows(probe.obs, None, probe.noise, single=False))
    error_PA = np.abs(action_PA - probe.action) / (spec.action_high - spec.action_low)
    worst = float(error_PA.max())
    if not worst <= tolerance:  # also true for NaN
        raise BundleError(
            f"bundle {bundle.path}: wanted the recorded probe actions to within {tolerance:g} of the action "
            f"range, got an error of {worst:.3g} from {session.runtime}; export the policy again"
        )
    logger.debug("probe of %s replayed, largest error %.3g", bundle.path, worst)


def _run_or_reject(session: CheckedSession, path: Path, rows: ActRows) -> NDArray[np.float32]:
    try:
        return session.run([rows])[0]
    except BackendError as error:
        raise BundleError(f"bundle {path}: {error}; export the policy again") from error


def _all(values: NDArray[np.bool_]) -> bool:
    return bool(np.logical_and.reduce(values, axis=None))
