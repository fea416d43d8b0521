"""How much less one policy returns than another in the same episodes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rsm_common.errors import ParityError
from rsm_common.policy import Policy
from rsm_eval.envs import EnvPool
from rsm_eval.evaluation import choose_env_args
from rsm_eval.rollout import episode_seeds, rollout
from rsm_eval.statistics import MeanInterval, mean_interval
from rsm_export.config import SearchConfig

SCREENING_SEED, CONFIRMING_SEED = 0x5343_5245_454E, 0x434F_4E46_4952_4D

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Loss:
    """How much less a policy returned than the full one in the same episodes."""

    full_mean: float
    mean: float
    std: float
    """Of the policy's returns, with E - 1 in the denominator."""
    episodes: int
    difference: MeanInterval
    """Of candidate minus full, paired by episode."""
    tolerance: float
    """Of the magnitude of the full policy's mean return."""

    @classmethod
    def of(cls, full: NDArray[np.float64], candidate: NDArray[np.float64], tolerance: float) -> Loss:
        """From the returns of the same episodes, two or more."""
        difference = mean_interval(candidate - full)
        assert difference is not None, "two episodes or more"
        mean, std = float(candidate.mean()), float(candidate.std(ddof=1))
        return cls(float(full.mean()), mean, std, len(candidate), difference, tolerance)

    @property
    def allowed(self) -> float:
        """In units of return."""
        return self.tolerance * abs(self.full_mean)

    @property
    def within(self) -> bool:
        """The loss is within the tolerance with 95 % confidence."""
        return self.difference.low >= -self.allowed

    @property
    def hopeless(self) -> bool:
        """The loss is beyond the tolerance with 95 % confidence."""
        return self.difference.high < -self.allowed

    def describe(self) -> str:
        """The allowed loss and the measured one."""
        return (
            f"a loss of at most {self.allowed:,.1f} of the full policy's {self.full_mean:,.1f}, got "
            f"{self.interval} (95 %) over {self.episodes} episodes"
        )

    @property
    def interval(self) -> str:
        """Of the loss: positive where the candidate returns less."""
        return f"{0 - self.difference.high:,.1f} to {0 - self.difference.low:,.1f}"

    def to_dict(self) -> dict[str, float]:
        """The candidate's own return, for policy.json."""
        return {
            "episodes": self.episodes,
            "mean": self.mean,
            "std": self.std,
            "full_policy_mean": self.full_mean,
            "difference_low": self.difference.low,
            "difference_high": self.difference.high,
        }


class Arena(Generic[Name]):
    """Policies in one environment; each acts once in the episodes of a seed.

    Args:
        policies: by name.
        full: the name of the one that the others are compared with.
        pool: environments.
        tolerance: see `Loss`.
    """

    def __init__(self, policies: Mapping[Name, Policy], full: Name, pool: EnvPool, tolerance: float) -> None:
        self._policies, self._full, self._pool, self._tolerance = policies, full, pool, tolerance
        self._returns: dict[tuple[Name, int, int], NDArray[np.float64]] = {}

    def loss(self, name: Name, seed: int, episodes: int) -> Loss:
        """Of a policy against the full one, in the episodes `episode_seeds(seed, episodes)`."""
        full, found = (self._act(each, seed, episodes) for each in (self._full, name))
        return Loss.of(full, found, self._tolerance)

    def _act(self, name: Name, seed: int, episodes: int) -> NDArray[np.float64]:
        key = (name, seed, episodes)
        if key not in self._returns:
            self._returns[key] = rollout(
                self._policies[name], self._pool, episode_seeds(seed, episodes)
            ).returns
        return self._returns[key]


def compare_returns(full: Policy, export: Policy, config: SearchConfig) -> Loss:
    """Let the full policy and an export act in the same episodes of `config.env`.

    Raises:
        UnsupportedEnvError: the environment cannot be created or is not the policy's.
        EnvFaultError: the environment fails, or answers with what its spaces rule out.
        ParityError: the export returns less than is allowed, with 95 % confidence.
    """
    assert config.env is not None
    with EnvPool(config.env, choose_env_args(config.env, config.env_arg, [full.spec])) as pool:
        arena = Arena({"full": full, "export": export}, "full", pool, config.tolerance)
        loss = arena.loss("export", CONFIRMING_SEED, config.episodes)
    if loss.hopeless:
        raise ParityError(
            f"check 'return' failed: wanted {loss.describe()}; leave out what shortens the chain "
            "(--steps, --particles, --precision), or allow a larger --tolerance"
        )
    return loss
