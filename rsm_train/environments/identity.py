"""A check that a resumed run meets the environment that it has learnt in."""

from __future__ import annotations

from rsm_common.errors import UnsupportedEnvError
from rsm_common.spec import BoxSpec, PolicySpec
from rsm_eval.envs import BoxEnv, env_boxes


def check_same_env(spec: PolicySpec, env: BoxEnv) -> None:
    """Compare an environment with the specification in a checkpoint.

    The replay buffer holds observations and actions of the old environment. With other sizes or bounds they
    would mean something else.

    Raises:
        UnsupportedEnvError: a size or a bound differs; the sentence has both values.
    """
    for kind, before, now in zip(
        ("observation", "action"), (spec.observation, spec.action), env_boxes(env), strict=True
    ):
        difference = _difference(kind, before, now)
        if difference is not None:
            raise UnsupportedEnvError(
                f"wanted the environment {spec.env_id} that the run has learnt in, got one with {difference}; "
                "resume with the environment as it was, or begin a run in another directory with --out"
            )


def _difference(kind: str, before: BoxSpec, now: BoxSpec) -> str | None:
    """The first difference of two boxes in words; None if they have the same size and bounds."""
    if before.size != now.size:
        return f"{now.size} {kind} elements instead of {before.size}"
    bounds = zip(before.low, before.high, now.low, now.high, strict=True)
    for index, (low, high, new_low, new_high) in enumerate(bounds):
        if (low, high) != (new_low, new_high):
            return (
                f"bounds {_interval(new_low, new_high)} of {kind} element {index} instead of "
                f"{_interval(low, high)}"
            )
    return None


def _interval(low: float | None, high: float | None) -> str:
    return f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
