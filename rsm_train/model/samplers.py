"""Samplers: how a policy's networks become actions.

A sampler is a frozen dataclass of settings. It knows its networks, its saved form and its record in
policy.json, and prepares the weights that act. Another kind of policy is another class here and one entry of
`SAMPLERS`, with its graph in `rsm_export.graph`.

Shape legend: B rows, T denoising steps, N particles, A action size; actions are in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from rsm_train.model.critic import q_values, select_value
from rsm_train.model.diffusion import (
    NoiseSchedule,
    ScheduleName,
    SelectionName,
    make_schedule,
    timesteps,
)
from rsm_train.model.networks import (
    TIME_EMBEDDING_SIZE,
    Params,
    SplitDenoiser,
    gaussian,
    sample_actions,
    split_denoiser,
)
from rsm_train.model.normalizer import ObservationScale, scaled


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


@dataclass(frozen=True)
class DiffusionSampler:
    """A denoising chain with the best of N particles by the critics: the policy of DPMD and SDAC."""

    kind: ClassVar[str] = "diffusion"
    acting: ClassVar[str] = "policy_average"

    schedule: ScheduleName
    steps: int
    """T, of the schedule and of training."""
    particles: int
    """N, of which the critics choose the best."""
    prior_std: float
    """Standard deviation of the initial latent."""
    selection: SelectionName = "min"
    """How the values of the critics become the value that chooses."""
    selection_std: float = 0.0
    """For "mean_std": mean + selection_std * std."""
    chain_steps: int | None = None
    """Number of the T steps that sampling takes; None: all."""
    eta: float = 1.0
    """Share of DDPM's noise that sampling adds: 1 is DDPM, 0 the deterministic DDIM."""

    @property
    def name(self) -> str:
        """ "ddpm", or "ddim" with less than DDPM's noise."""
        return "ddpm" if self.eta == 1.0 else "ddim"

    @property
    def chain_length(self) -> int:
        """Reverse steps that sampling takes."""
        return self.chain_steps or self.steps

    def make_schedule(self) -> NoiseSchedule:
        """The schedule, with the reverse steps that are taken.

        Raises:
            ValueError: see `make_schedule`.
        """
        return make_schedule(self.schedule, self.steps, chain_steps=self.chain_steps, eta=self.eta)

    def record(self) -> dict[str, Any]:
        """See `Sampler.record`."""
        return {
            "schedule": self.schedule,
            "train_steps": self.steps,
            "timesteps": list(timesteps(self.steps, self.chain_steps)),
            "eta": self.eta,
            "prior_std": self.prior_std,
        }

    def check(self) -> None:
        """See `Sampler.check`."""
        try:
            self.make_schedule()
        except TypeError as error:
            raise ValueError(str(error)) from None
        if not isinstance(self.prior_std, (float, int)) or not self.prior_std > 0:
            raise ValueError(f"wanted prior_std > 0, got {self.prior_std!r}")
        selections = get_args(SelectionName)
        if self.selection not in selections:
            raise ValueError(f"wanted a selection of {', '.join(selections)}, got {self.selection!r}")
        if not isinstance(self.selection_std, (float, int)):
            raise ValueError(f"wanted a number as selection_std, got {self.selection_std!r}")

    def networks(self, obs_size: int, action_size: int) -> list[Mlp]:
        """See `Sampler.networks`."""
        inputs = obs_size + action_size + TIME_EMBEDDING_SIZE
        return [
            Mlp("time.", TIME_EMBEDDING_SIZE, TIME_EMBEDDING_SIZE),
            Mlp("", inputs, action_size, at_least=2),
        ]

    def prepare(
        self,
        policy: Mapping[str, Tensor],
        critics: Mapping[str, Tensor],
        scale: ActionScale,
        obs_scale: ObservationScale | None = None,
    ) -> DiffusionWeights:
        """See `Sampler.prepare`; all that does not depend on the observation is folded."""
        schedule = self.make_schedule()
        with torch.no_grad():
            denoiser = split_denoiser(frozen(policy), schedule.steps)
        return DiffusionWeights(denoiser, frozen(critics), schedule, self, scale, obs_scale)

    def resampled(self, change: Resampling) -> DiffusionSampler:
        """See `Sampler.resampled`."""
        steps = change.steps
        if steps is not None and steps > self.steps:
            raise ValueError(f"wanted --steps of at most {self.steps}, as many as were trained, got {steps}")
        changed: dict[str, Any] = {
            "chain_steps": None if steps == self.steps and self.chain_steps is None else steps,
            "particles": change.particles,
            "prior_std": change.prior_std,
            "eta": (change.eta or 0.0) if change.name == "ddim" else 1.0,
        }
        return dataclasses.replace(self, **{key: value for key, value in changed.items() if value is not None})


@dataclass(frozen=True)
class DiffusionWeights:
    """A denoising chain, ready to act."""

    denoiser: SplitDenoiser
    critics: Params
    schedule: NoiseSchedule
    sampler: DiffusionSampler
    scale: ActionScale
    obs_scale: ObservationScale | None = None

    def particles(self, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Weights.particles`."""
        s, obs_BO = self.sampler, scaled(self.obs_scale, obs_BO)
        action_BNA = sample_actions(self.denoiser, self.schedule, obs_BO, noise_BTNA, prior_std=s.prior_std)
        return action_BNA, _values(self.critics, obs_BO, action_BNA, s.selection, s.selection_std)

    def without_critics(self) -> DiffusionWeights:
        """See `Weights.without_critics`."""
        return dataclasses.replace(self, critics={})

    def double(self) -> DiffusionWeights:
        """See `Weights.double`."""
        d = self.denoiser
        parts = (d.obs_weight.double(), d.action_weight.double(), d.step_bias.double())
        return dataclasses.replace(
            self,
            denoiser=SplitDenoiser(*parts, _double(d.tail)),
            critics=_double(self.critics),
            scale=_double_scale(self.scale),
            obs_scale=None if self.obs_scale is None else self.obs_scale.to(torch.float64),
        )


@dataclass(frozen=True)
class GaussianSampler:
    """A Gaussian squashed by tanh, the policy of SAC: a = tanh(mu + sigma z). z = 0 gives its mean action."""

    kind: ClassVar[str] = "gaussian"
    acting: ClassVar[str] = "policy"
    selection: ClassVar[SelectionName] = "min"
    selection_std: ClassVar[float] = 0.0

    steps: int = 1
    particles: int = 1
    """N, of which the critics choose the best; 1 in training."""

    @property
    def name(self) -> str:
        """ "gaussian"."""
        return self.kind

    @property
    def chain_length(self) -> int:
        """1."""
        return 1

    def record(self) -> dict[str, Any]:
        """See `Sampler.record`."""
        return {"distribution": "tanh of a normal law"}

    def check(self) -> None:
        """See `Sampler.check`."""
        if self.steps != 1 or type(self.particles) is not int or self.particles < 1:
            raise ValueError(
                "wanted steps 1 and particles >= 1 of a Gaussian policy, got "
                f"{self.steps!r} and {self.particles!r}"
            )

    def networks(self, obs_size: int, action_size: int) -> list[Mlp]:
        """See `Sampler.networks`."""
        return [Mlp("", obs_size, 2 * action_size, at_least=2)]

    def prepare(
        self,
        policy: Mapping[str, Tensor],
        critics: Mapping[str, Tensor],
        scale: ActionScale,
        obs_scale: ObservationScale | None = None,
    ) -> GaussianWeights:
        """See `Sampler.prepare`."""
        return GaussianWeights(frozen(policy), frozen(critics), self, scale, obs_scale)

    def resampled(self, change: Resampling) -> GaussianSampler:
        """See `Sampler.resampled`."""
        given = {
            "--steps": change.steps,
            "--prior-std": change.prior_std,
            "--sampler": change.name,
            "--eta": change.eta,
        }
        refused = [option for option, value in given.items() if value is not None]
        if refused:
            raise ValueError(
                f"wanted no {', '.join(refused)} for a Gaussian policy, which samples in one step; leave it out"
            )
        return self if change.particles is None else dataclasses.replace(self, particles=change.particles)


@dataclass(frozen=True)
class GaussianWeights:
    """A Gaussian policy, ready to act."""

    policy: Params
    critics: Params
    sampler: GaussianSampler
    scale: ActionScale
    obs_scale: ObservationScale | None = None

    def particles(self, obs_BO: Tensor, noise_BTNA: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Weights.particles`; T is 1."""
        obs_BO = scaled(self.obs_scale, obs_BO)
        mean_BA, log_std_BA = gaussian(self.policy, obs_BO)
        action_BNA = torch.tanh(mean_BA.unsqueeze(1) + log_std_BA.exp().unsqueeze(1) * noise_BTNA[:, 0])
        return action_BNA, _values(self.critics, obs_BO, action_BNA, "min", 0.0)

    def without_critics(self) -> GaussianWeights:
        """See `Weights.without_critics`."""
        return dataclasses.replace(self, critics={})

    def double(self) -> GaussianWeights:
        """See `Weights.double`."""
        return dataclasses.replace(
            self,
            policy=_double(self.policy),
            critics=_double(self.critics),
            scale=_double_scale(self.scale),
            obs_scale=None if self.obs_scale is None else self.obs_scale.to(torch.float64),
        )


SAMPLERS: dict[str, type[DiffusionSampler] | type[GaussianSampler]] = {
    sampler.kind: sampler for sampler in (DiffusionSampler, GaussianSampler)
}


def sampler_settings(sampler: Sampler) -> dict[str, Any]:
    """The saved form of a sampler: "kind" and its settings."""
    return {"kind": sampler.kind, **{item: getattr(sampler, item) for item in _fields(type(sampler))}}


def read_sampler(settings: Mapping[str, Any]) -> DiffusionSampler | GaussianSampler:
    """The sampler of its saved form. Settings without a kind are those of a diffusion policy.

    Raises:
        KeyError: an unknown kind.
        TypeError: settings that the kind does not have, or missing ones.
    """
    kind = SAMPLERS[settings.get("kind", DiffusionSampler.kind)]
    return kind(**{name: value for name, value in settings.items() if name != "kind"})


def frozen(params: Mapping[str, Tensor]) -> Params:
    """Detached copies on the CPU."""
    return {name: value.detach().clone().cpu() for name, value in params.items()}


def _fields(kind: type) -> Sequence[str]:
    return [item.name for item in dataclasses.fields(kind)]


def _values(
    critics: Params, obs_BO: Tensor, action_BNA: Tensor, selection: SelectionName, std: float
) -> Tensor | None:
    return select_value(q_values(critics, obs_BO, action_BNA), selection, std) if critics else None


def _double(params: Mapping[str, Tensor]) -> Params:
    return {name: value.double() for name, value in params.items()}


def _double_scale(scale: ActionScale) -> ActionScale:
    return ActionScale(**_double(vars(scale)))
