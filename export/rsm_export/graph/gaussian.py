"""The Gaussian policy of SAC as nodes: a = tanh(mu(s) + sigma(s) z), z from the noise input.

The network runs once per observation, the sampling once per particle. Zero noise gives the mean action.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rsm_export.graph.network import Network, fold_network
from rsm_export.graph.writer import GraphWriter
from rsm_train.model.networks import LOG_STD_RANGE
from rsm_train.model.samplers.gaussian import GaussianWeights


@dataclass(frozen=True)
class FoldedGaussian:
    """A Gaussian policy, ready to be written as nodes."""

    per_particle: ClassVar[bool] = False
    """The network runs once per observation."""
    length: ClassVar[int] = 1
    """T of the graph."""

    network: Network
    """From the observation to [mean, log standard deviation], 2 A outputs."""

    def write(self, writer: GraphWriter, obs_part: str, particles: int) -> str:
        """Write the network and the sampling; returns the particles in [-1, 1], [R, A] with R = B N."""
        action_size = len(self.network.out.bias) // 2
        writer.scope = "policy"
        hidden = writer.hidden(self.network, obs_part)
        out = self.network.out
        weight, bias = (
            writer.constant(f"{out.name}.weight", out.weight),
            writer.constant(f"{out.name}.bias", out.bias),
        )
        both = writer.op("Gemm", hidden, weight, bias, transB=1, alpha=-2.0)
        mean, log_std = writer.split(both, [action_size, action_size])
        log_std = writer.op("Clip", log_std, *map(writer.scalar, LOG_STD_RANGE))
        std = writer.op("Exp", log_std)
        writer.scope = "sample"
        if particles == 1:
            z = writer.op("Reshape", "noise", writer.shape(-1, action_size))
            return writer.op("Tanh", writer.op("Add", mean, writer.op("Mul", std, z)))
        z = writer.op("Reshape", "noise", writer.shape(-1, particles, action_size))
        mean, std = (writer.op("Unsqueeze", value, writer.shape(1)) for value in (mean, std))
        action_BNA = writer.op("Tanh", writer.op("Add", mean, writer.op("Mul", std, z)))
        return writer.op("Reshape", action_BNA, writer.shape(-1, action_size))


def fold_gaussian(weights: GaussianWeights) -> FoldedGaussian:
    """Fold a Gaussian policy."""
    params = weights.policy
    weight = params["layers.0.weight"]
    no_action = torch.zeros(len(weight), 0)
    return FoldedGaussian(fold_network("policy", weight, no_action, params["layers.0.bias"], params))
