"""The protocols of samplers and of their weights, and what all kinds share.

Shape legend: B rows, T denoising steps, N particles, A action size; actions are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from rsm_train.model.critic import q_values, select_value
from rsm_train.model.diffusion import SelectionName
from rsm_train.model.networks import Params
from rsm_train.model.normalizer import ObservationScale


class Resampling(NamedTuple):
    """Another way to sample a policy; None keeps a setting."""

    steps: int | None = None
    """Of the denoising steps of training."""
    particles: int | None = None
    prior_std: float | None = None
    name: str | None = None
    """ "ddpm" or "ddim"."""
    eta: float | None = None


class Mlp(NamedTuple):
    """The sizes that an MLP must have."""

    prefix: str
    """Of its parameters in the network; empty for the network itself."""
    inputs: int
    outputs: int
    at_least: int = 1
    """Layers."""


@dataclass(frozen=True)
class ActionScale:
    """The affine map from [-1, 1] to the environment's action box, float32 [A] each."""

    center: Tensor
    half_range: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor) -> ActionScale:
        """The scale of an action box."""
        return cls((high + low) / 2, (high - low) / 2, low, high)

    def to_env(self, action: Tensor) -> Tensor:
        """[-1, 1] -> environment units, inside the bounds in spite of rounding."""
        scaled = self.center + self.half_range * action
        return torch.minimum(torch.maximum(scaled, self.low), self.high)


class Weights(Protocol):
    """Weights that act, prepared once by `Sampler.prepare`."""

    @property
    def scale(self) -> ActionScale:
        """From [-1, 1] to environment units."""
        ...

    @property
    def obs_scale(self) -> ObservationScale | None:
        """How observations are normalised; None for a policy that takes them as they are."""
        ...

    @property
    def sampler(self) -> Sampler:
        """The settings that they were prepared with."""
        ...

    @property
    def critics(self) -> Params:
        """Empty without a choice among particles; there is then no value."""
        ...

    def particles(self, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor | None]:
        """All N particles [B, N, A] and their values [B, N]; no values without critics."""
        ...

    def without_critics(self) -> Weights:
        """The same policy with one particle and no value."""
        ...

    def double(self) -> Weights:
        """The same in float64, to tell rounding from error."""
        ...


class Sampler(Protocol):
    """The settings of a way to sample; see the module."""

    kind: ClassVar[str]
    """Its name in `SAMPLERS`, in config.json and in `rsm_export.graph`."""
    acting: ClassVar[str]
    """The network that is evaluated and exported."""

    @property
    def steps(self) -> int:
        """T in training."""
        ...

    @property
    def particles(self) -> int:
        """N, of which the critics choose the best."""
        ...

    @property
    def selection(self) -> SelectionName:
        """How the values of the critics become the value that chooses."""
        ...

    @property
    def selection_std(self) -> float:
        """For "mean_std": mean + selection_std * std."""
        ...

    @property
    def name(self) -> str:
        """`PolicySpec.sampler`."""
        ...

    @property
    def chain_length(self) -> int:
        """Steps of the noise that one action takes, the T of its graph."""
        ...

    def record(self) -> dict[str, Any]:
        """`PolicySpec.sampling`."""
        ...

    def check(self) -> None:
        """Check the settings.

        Raises:
            ValueError: a value is out of range.
        """
        ...

    def networks(self, obs_size: int, action_size: int) -> list[Mlp]:
        """The MLPs that the acting network must have."""
        ...

    def prepare(
        self,
        policy: Mapping[str, Tensor],
        critics: Mapping[str, Tensor],
        scale: ActionScale,
        obs_scale: ObservationScale | None = None,
    ) -> Weights:
        """Detached copies of the parameters on the CPU; without critics the policy has one particle."""
        ...

    def resampled(self, change: Resampling) -> Sampler:
        """The same policy sampled in another way.

        Raises:
            ValueError: the sampler has no such setting, or the value is out of range.
        """
        ...


def check_selection(selection: object, selection_std: object) -> None:
    """Check the settings that make one value from those of the critics.

    Raises:
        ValueError: no such selection, or no number.
    """
    selections = get_args(SelectionName)
    if selection not in selections:
        raise ValueError(f"wanted a selection of {', '.join(selections)}, got {selection!r}")
    if not isinstance(selection_std, (float, int)):
        raise ValueError(f"wanted a number as selection_std, got {selection_std!r}")


def frozen(params: Mapping[str, Tensor]) -> Params:
    """Detached copies on the CPU."""
    return {name: value.detach().clone().cpu() for name, value in params.items()}


def selected_values(
    critics: Params, obs_BO: Tensor, action_BNA: Tensor, selection: SelectionName, std: float
) -> Tensor | None:
    """Values [B, N] that choose among the particles; None without critics."""
    return select_value(q_values(critics, obs_BO, action_BNA), selection, std) if critics else None


def in_float64(params: Mapping[str, Tensor]) -> Params:
    """The parameters in float64."""
    return {name: value.double() for name, value in params.items()}


def scale_in_float64(scale: ActionScale) -> ActionScale:
    """The scale in float64."""
    return ActionScale(**in_float64(vars(scale)))
