"""From a policy's weights to the numbers of its graph, for every kind of sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rsm_export.graph.chain import fold_chain
from rsm_export.graph.gaussian import fold_gaussian
from rsm_export.graph.network import Network, fold_critics
from rsm_export.graph.writer import GraphWriter
from rsm_train.model.diffusion import SelectionName
from rsm_train.model.normalizer import ObservationScale
from rsm_train.model.samplers.common import ActionScale, Weights
from rsm_train.model.samplers.diffusion import DiffusionSampler
from rsm_train.model.samplers.gaussian import GaussianSampler


class FoldedSampler(Protocol):
    """A sampler as numbers, which writes its own nodes."""

    @property
    def per_particle(self) -> bool:
        """True if the network runs on every particle, False if once per observation."""
        ...

    @property
    def length(self) -> int:
        """T, steps of the noise input."""
        ...

    @property
    def network(self) -> Network:
        """The policy's network."""
        ...

    def write(self, writer: GraphWriter, obs_part: str, particles: int) -> str:
        """Write the nodes from the observation's part and "noise" to the particles [R, A] in [-1, 1]."""
        ...


FOLDS: dict[str, Callable[[Any], FoldedSampler]] = {
    DiffusionSampler.kind: fold_chain,
    GaussianSampler.kind: fold_gaussian,
}
"""By `Sampler.kind`; a new kind of sampler adds its line here."""


@dataclass(frozen=True)
class FoldedPolicy:
    """A best-of-N policy, ready to be written as a graph."""

    sampler: FoldedSampler
    critics: tuple[Network, ...]
    """Empty without a choice among particles."""
    selection: SelectionName
    selection_std: float
    particles: int
    scale: ActionScale
    obs_scale: ObservationScale | None = None
    """None without normalised observations."""


def fold(weights: Weights) -> FoldedPolicy:
    """Fold a policy: without critics it has one particle, with them any number."""
    settings = weights.sampler
    assert weights.critics or settings.particles == 1, "several particles need critics"
    sampler = FOLDS[settings.kind](weights)
    obs_size, action_size = sampler.network.obs_weight.shape[1], len(weights.scale.low)
    return FoldedPolicy(
        sampler=sampler,
        critics=fold_critics(weights.critics, obs_size, action_size),
        selection=settings.selection,
        selection_std=settings.selection_std,
        particles=settings.particles,
        scale=weights.scale,
        obs_scale=weights.obs_scale,
    )
