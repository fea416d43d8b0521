"""A network of a policy as numbers, with its first layer split by input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsm_train.model.critic import ATOMS
from rsm_train.model.networks import depth, subset

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """A linear layer behind an activation, float32."""

    name: str
    weight: Array
    """[out, in]"""
    bias: Array
    """[out]"""


@dataclass(frozen=True)
class Norm:
    """LayerNorm of a pre-activation, float32 [H] each."""

    name: str
    scale: Array
    bias: Array


@dataclass(frozen=True)
class Network:
    """A network; the observation's part of its first layer is computed once per observation."""

    name: str
    action_weight: Array
    """[H, A], of the first layer; A = 0 for a network of the observation alone."""
    obs_weight: Array
    """[H, O], of the first layer."""
    obs_bias: Array
    """[H], what is added to it once per observation: the first layer's bias, where no step has its own."""
    norms: tuple[Norm | None, ...]
    """Behind the first layer and each hidden one."""
    hidden: tuple[Layer, ...]
    out: Layer
    atoms: Array | None = None
    """[K], values whose probabilities are the softmax of the last layer's outputs; None for a plain output."""


def fold_network(
    name: str, obs_weight: Tensor, action_weight: Tensor, obs_bias: Tensor, params: Mapping[str, Tensor]
) -> Network:
    """The network of parameters whose first layer is given in parts; `params` has its other layers."""
    last = depth(params) - 1
    layers = [
        Layer(
            f"{name}.layers.{i}",
            float32(params[f"layers.{i}.weight"]),
            float32(params[f"layers.{i}.bias"]),
        )
        for i in range(1, last + 1)
    ]
    norms = tuple(_norm(f"{name}.norms.{i}", subset(params, f"norms.{i}.")) for i in range(last))
    first = (float32(action_weight), float32(obs_weight), float32(obs_bias))
    atoms = float32(params[ATOMS]) if ATOMS in params else None
    return Network(name, *first, norms, tuple(layers[:-1]), layers[-1], atoms)


def _norm(name: str, params: Mapping[str, Tensor]) -> Norm | None:
    return Norm(name, float32(params["weight"]), float32(params["bias"])) if params else None


def fold_critics(critics: Mapping[str, Tensor], obs_size: int, action_size: int) -> tuple[Network, ...]:
    """The members of an ensemble of critics; none if there are no parameters."""
    members = []
    for e in range(len(critics["layers.0.weight"]) if critics else 0):
        params = {name: value if name == ATOMS else value[e] for name, value in critics.items()}
        obs_weight, action_weight = torch.split(params["layers.0.weight"], [obs_size, action_size], dim=1)
        members.append(fold_network(f"critic.{e}", obs_weight, action_weight, params["layers.0.bias"], params))
    return tuple(members)


def float32(values: Tensor | NDArray[np.float64]) -> Array:
    """Contiguous float32 numbers."""
    return np.ascontiguousarray(values, dtype=np.float32)
