"""The action guard: a limit on the change of an action per control step, and a fallback when a policy fails.

`LocalPolicy` already refuses actions that are not finite or out of bounds. The guard remembers the last action
of each client. It clips the next action towards the last one, and gives a fallback action if the policy fails.

`ActionGuard` is pure: the caller passes the time. `GuardedAnswers` drives it in the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import ConfigError, InvalidRequestError
from rsm_common.policy import Adjustment
from rsm_common.spec import BoxSpec, PolicySpec

Fallback = Literal["fail", "hold", "center"]

IDLE_S = 2.0
"""An action that is older than this is no longer the last step, ..."""
IDLE_STEPS = 10
"""... unless it is one of the last ten steps of a slow policy, by its `control_dt_s`."""
MAX_CLIENTS = 4096
"""Most clients whose last action is remembered; the client with the oldest one is forgotten first."""


@dataclass(frozen=True)
class GuardLimits:
    """Settings of the guard.

    Raises:
        ConfigError: `max_step` is not in (0, 1].
    """

    max_step: float | None = field(
        default=None,
        metadata={
            "option": "max_action_step",
            "help": "Largest change of each action element from one step of a client to its next, as a "
            "fraction of the element's range.  [default: any]",
        },
    )
    fallback: Fallback = field(
        default="fail",
        metadata={
            "help": "Answer when the policy fails or its action is unsound: an error, the client's last "
            "action, or the centre of the bounds."
        },
    )

    def __post_init__(self) -> None:
        if self.max_step is not None and not 0 < self.max_step <= 1:
            raise ConfigError(
                f"wanted max_action_step above 0 and at most 1, a fraction of the action range, "
                f"got {self.max_step}; 0.1 lets an action cross its range in ten steps"
            )

    @property
    def active(self) -> bool:
        """Whether the guard changes any answer."""
        return self.max_step is not None or self.fallback != "fail"


@dataclass
class _Last:
    """The last actions of one client, by row of its requests."""

    space: BoxSpec
    range_A: NDArray[np.float32]
    """Upper bound minus lower bound."""
    action_RA: NDArray[np.float32]
    given_R: NDArray[np.float64]
    """When each was given to the client, seconds."""
    chosen_R: NDArray[np.float64]
    """When the policy last chose an action for the row. Holding an action does not change it."""


class ActionGuard:
    """Remembers the last action of every client, limits the next one and gives fallback actions.

    A client is its client_id or any other hashable object of its own, such as one per stream. Times are seconds
    of one monotonic clock that the caller reads.

    Args:
        limits: the settings.
        max_clients: most clients that are remembered.
    """

    def __init__(self, limits: GuardLimits, max_clients: int = MAX_CLIENTS) -> None:
        self._limits = limits
        self._max_clients = max_clients
        self._last: OrderedDict[tuple[str, Hashable], _Last] = OrderedDict()

    @property
    def clients(self) -> int:
        """Number of clients that are remembered."""
        return len(self._last)

    def admit(self, client: Hashable | None) -> None:
        """Check that a request can be limited.

        Raises:
            InvalidRequestError: the request has no client, so its last action is not known.
        """
        if client is None and self._limits.max_step is not None:
            raise InvalidRequestError(
                "wanted a client_id, because this server limits how far an action may be from the client's "
                "last one (--max-action-step), got none; give every robot its own client_id, or use a stream"
            )

    def limit(
        self, spec: PolicySpec, client: Hashable | None, action_BA: NDArray[np.float32], now: float
    ) -> tuple[NDArray[np.float32], NDArray[np.int32] | None]:
        """Limit the policy's actions.

        Args:
            spec: of the policy.
            client: of the request; None: unknown.
            action_BA: [B, A], inside the bounds.
            now: seconds.

        Returns:
            (action [B, A], an `Adjustment` per row [B] or None if all are the policy's own).
        """
        if client is None:
            return action_BA, None
        last = self._recall(spec, client)
        given_BA = self._clip(spec, last, action_BA, now)
        self._remember(spec, client, last, given_BA, now, chosen=True)
        if given_BA is action_BA:
            return action_BA, None
        limited_B = (given_BA != action_BA).any(axis=1)
        return given_BA, np.where(limited_B, Adjustment.LIMITED, Adjustment.NONE).astype(np.int32)

    def substitute(
        self, spec: PolicySpec, client: Hashable | None, rows: int, now: float
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]] | None:
        """Return the fallback actions for a request that the policy failed, as `limit`; None if there are none.

        `hold` has an action only if the policy chose one for every row of the client within the idle time.
        """
        if self._limits.fallback == "fail":
            return None
        last = None if client is None else self._recall(spec, client)
        if self._limits.fallback == "hold":
            kind, wanted_BA = Adjustment.HELD, _held(last, rows, now - _idle_s(spec))
            if wanted_BA is None:
                return None
        else:
            kind, center = Adjustment.CENTERED, (spec.action_low + spec.action_high) / 2
            wanted_BA = np.tile(center.astype(np.float32), (rows, 1))
        given_BA = self._clip(spec, last, wanted_BA, now)
        if client is not None:
            self._remember(spec, client, last, given_BA, now, chosen=False)
        return given_BA, np.full(rows, kind, np.int32)

    def _clip(
        self, spec: PolicySpec, last: _Last | None, action_BA: NDArray[np.float32], now: float
    ) -> NDArray[np.float32]:
        """Clip actions to one step from the last ones; return the same array object if no action changes."""
        if last is None or self._limits.max_step is None:
            return action_BA
        rows = min(len(action_BA), len(last.action_RA))
        recent_R = last.given_R[:rows] >= now - _idle_s(spec)
        step_A = np.float32(self._limits.max_step) * last.range_A
        before_RA = last.action_RA[:rows]
        # The result lies between the last and the wanted action, which are both inside the bounds.
        clipped_RA = np.minimum(np.maximum(action_BA[:rows], before_RA - step_A), before_RA + step_A)
        changed_R = recent_R & (clipped_RA != action_BA[:rows]).any(axis=1)
        if not changed_R.any():
            return action_BA
        given_BA = action_BA.copy()
        given_BA[:rows][changed_R] = clipped_RA[changed_R]
        return given_BA

    def _recall(self, spec: PolicySpec, client: Hashable) -> _Last | None:
        """Return the last actions of a client; None if there are none, or their action space was another."""
        last = self._last.get((spec.name, client))
        return last if last is not None and last.space == spec.action else None

    def _remember(
        self,
        spec: PolicySpec,
        client: Hashable,
        last: _Last | None,
        action_BA: NDArray[np.float32],
        now: float,
        *,
        chosen: bool,
    ) -> None:
        rows, size = action_BA.shape
        if last is None or len(last.action_RA) < rows:
            last = _grown(last, spec, rows, size)
        last.action_RA[:rows] = action_BA
        last.given_R[:rows] = now
        if chosen:
            last.chosen_R[:rows] = now
        key = (spec.name, client)
        self._last[key] = last
        self._last.move_to_end(key)
        if len(self._last) > self._max_clients:
            self._last.popitem(last=False)


def _idle_s(spec: PolicySpec) -> float:
    return max(IDLE_S, IDLE_STEPS * (spec.control_dt_s or 0.0))


def _held(last: _Last | None, rows: int, since_s: float) -> NDArray[np.float32] | None:
    """Return the last actions [B, A] if the policy chose one for each of the rows since `since_s`."""
    if last is None or len(last.chosen_R) < rows or not (last.chosen_R[:rows] >= since_s).all():
        return None
    return last.action_RA[:rows].copy()


def _grown(last: _Last | None, spec: PolicySpec, rows: int, size: int) -> _Last:
    """Return last actions with room for `rows`; the new rows have the time -inf."""
    never_R = np.full(rows, -np.inf)
    grown = _Last(
        spec.action,
        spec.action_high - spec.action_low,
        np.zeros((rows, size), np.float32),
        never_R,
        never_R.copy(),
    )
    if last is not None:
        known = len(last.action_RA)
        grown.action_RA[:known] = last.action_RA
        grown.given_R[:known], grown.chosen_R[:known] = last.given_R, last.chosen_R
    return grown
