"""Applies the action guard to the answers of the batchers, before their callers get them.

`GuardedAnswers` drives one `ActionGuard` in the event loop for all versions of all policies. So a limit holds
across a reload, which is when an action is likely to jump.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace

import numpy as np

from rsm_common.errors import BackendError
from rsm_common.policy import ActResult, ActRows, Adjustment, Timing
from rsm_common.spec import PolicySpec
from rsm_serve.engine.action_guard import ActionGuard, GuardLimits
from rsm_serve.observe.counts import LaneCounts
from rsm_serve.observe.settled import Answered

logger = logging.getLogger(__name__)

Future = asyncio.Future[Answered[ActResult]]


class GuardedAnswers:
    """Applies an `ActionGuard` to futures of answers; in one event loop.

    Args:
        limits: settings of the guard.
        clock: seconds, monotonic.
    """

    def __init__(self, limits: GuardLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._guard = ActionGuard(limits)
        self._clock = clock
        self._unsettled: dict[object, deque[tuple[Future, Callable[[], None]]]] = {}
        self.admit = self._guard.admit

    def follow(
        self,
        sampled: Future,
        spec: PolicySpec,
        client: Hashable | None,
        request: ActRows,
        counts: LaneCounts,
        *,
        stream: object | None = None,
    ) -> Future:
        """Return the future of the answer that the caller gets; cancelling it cancels `sampled`.

        An action whose caller has left is not the client's last one. The requests of a stream are settled in
        the order in which they came and are answered, although they may be sampled in another order, by
        priority or by two versions.

        Args:
            sampled: the future of the policy's answer.
            spec: of the policy.
            client: see `ActionGuard`.
            request: the rows that are sampled.
            counts: of the version.
            stream: an object of the request's stream alone; None outside of streams.
        """
        given: Future = sampled.get_loop().create_future()

        def settle() -> None:
            error = None if sampled.cancelled() else sampled.exception()  # also marks it as seen
            if given.done():
                return
            if sampled.cancelled():
                given.cancel()
                return
            try:
                given.set_result(self._given(sampled, error, spec, client, request, counts))
            except Exception as fault:
                given.set_exception(fault)

        def cancelled(done: Future) -> None:
            if done.cancelled():
                sampled.cancel()

        if stream is None:
            sampled.add_done_callback(lambda _: settle())
        else:
            self._unsettled.setdefault(stream, deque()).append((sampled, settle))
            sampled.add_done_callback(lambda _: self._settle_in_turn(stream))
        given.add_done_callback(cancelled)
        return given

    def _settle_in_turn(self, stream: object) -> None:
        unsettled = self._unsettled.get(stream)
        while unsettled and unsettled[0][0].done():
            _, settle = unsettled.popleft()
            settle()
        if not unsettled:
            self._unsettled.pop(stream, None)

    def _given(
        self,
        sampled: Future,
        error: BaseException | None,
        spec: PolicySpec,
        client: Hashable | None,
        request: ActRows,
        counts: LaneCounts,
    ) -> Answered[ActResult]:
        now = self._clock()
        if error is not None:
            return self._instead(error, spec, client, request, counts, now)
        answered = sampled.result()
        result = answered.answer
        action_BA, adjusted_B = self._guard.limit(spec, client, result.action, now)
        if adjusted_B is None:
            return answered
        limited = int(np.count_nonzero(adjusted_B))
        logger.warning(
            "%s:%s: %d of %d actions were limited to a step of --max-action-step from the client's last one",
            *(spec.name, spec.version, limited, len(adjusted_B)),
            extra={"policy": spec.name, "version": spec.version},
        )
        counts.adjusted(limited_rows=limited, fallback=False)
        return Answered(replace(result, action=action_BA, adjusted=adjusted_B), answered.queue_us)

    def _instead(
        self,
        error: BaseException,
        spec: PolicySpec,
        client: Hashable | None,
        request: ActRows,
        counts: LaneCounts,
        now: float,
    ) -> Answered[ActResult]:
        """Return the fallback answer; raise the error if there is none, or if the policy did not fail."""
        rows = len(request.obs_BO)
        found = self._guard.substitute(spec, client, rows, now) if isinstance(error, BackendError) else None
        if found is None:
            raise error
        action_BA, adjusted_B = found
        what = Adjustment(int(adjusted_B[0])).name.lower()
        logger.error(
            "%s:%s: answered by a %s action instead of: %s",
            *(spec.name, spec.version, what, error),
            extra={"policy": spec.name, "version": spec.version},
        )
        counts.adjusted(limited_rows=0, fallback=True)
        # No particle was chosen, so there is no critic value; NaN keeps the form of the answer.
        q_B = np.full(rows, np.nan, np.float32) if spec.has_q else None
        timing = Timing(batch_rows=rows)
        result = request.result(action_BA, q_B, version=spec.version, timing=timing, adjusted_B=adjusted_B)
        return Answered(result, 0.0)
