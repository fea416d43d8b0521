"""The numbers of the unrolled chain: everything that does not depend on the observation, folded.

With pre = the pre-activation of a layer and S = sigmoid(-pre), mish(pre) = pre (1 - S^2) / (1 + S^2), so

    act(x) = x (1/2 - S^2 / (1 + S^2)) = -1/2 mish(pre)   with x = -pre

takes five operations and needs no clamp. The graph carries x and act(x); the factors -1 and -2 go into what
surrounds them, exactly, as they are powers of two.

A reverse step with the network's output eps = W h + b is

    x0 = clip(r a - s (W h + b), -1, 1),   a' = c x0 + d a + std z      (r, s, c, d, std: `ReverseStep`)

Carried as y = r a - s b, the part of x0 that needs no network, and with g = r' c, it becomes

    g x0 = clip(g y - g s W h, -g, g),   y' = g x0 + (r' d / r) y + n
    n = r' std z + (r' d s / r - s') b

(r', s' of the step that follows), where n of all steps is one product and one sum over the noise input.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsm_train.model.diffusion import ReverseStep, SelectionName
from rsm_train.model.networks import depth, subset
from rsm_train.policy import ActionScale, PolicyWeights

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
    """A network whose first layer's part of the observation is computed elsewhere."""

    name: str
    action_weight: Array
    """[H, A], of the first layer."""
    obs_weight: Array
    """[H, O], of the first layer."""
    obs_bias: Array
    """[H], what is added to it once per observation: the first layer's bias, where no step has its own."""
    norms: tuple[Norm | None, ...]
    """Behind the first layer and each hidden one."""
    hidden: tuple[Layer, ...]
    out: Layer


@dataclass(frozen=True)
class ChainStep:
    """One reverse step on y; see the module."""

    bias: Array
    """[H], added to the first layer's pre-activation: time embedding and output bias."""
    action_scale: float
    """1 / r: from y to the action that the first layer takes."""
    noise_scale: float
    """s, of the network's output."""
    gain: float
    """g; 1 in the last step, whose result is the action."""
    carry: float
    """r' d / r; 0 in the last step."""


@dataclass(frozen=True)
class FoldedPolicy:
    """A best-of-N policy, ready to be written as a graph."""

    noise_scale: Array
    """[T, 1, 1]"""
    noise_shift: Array
    """[T, 1, A]"""
    steps: tuple[ChainStep, ...]
    denoiser: Network
    critics: tuple[Network, ...]
    """Empty where there is nothing to choose."""
    selection: SelectionName
    selection_std: float
    particles: int
    scale: ActionScale


def fold(weights: PolicyWeights) -> FoldedPolicy:
    """Fold a policy: without critics of one particle, with them of any number."""
    assert weights.critics or weights.sampler.particles == 1, "several particles need critics"
    denoiser, sampler = weights.denoiser, weights.sampler
    obs_size, action_size = denoiser.obs_weight.shape[1], denoiser.action_weight.shape[1]
    bias = torch.zeros_like(denoiser.step_bias[0])
    network = _network("policy", denoiser.obs_weight, denoiser.action_weight, bias, denoiser.tail)
    steps = weights.schedule.reverse_steps
    critics = []
    for e in range(len(weights.critics["layers.0.weight"]) if weights.critics else 0):
        params = {name: value[e] for name, value in weights.critics.items()}
        obs_weight, action_weight = torch.split(params["layers.0.weight"], [obs_size, action_size], dim=1)
        critics.append(_network(f"critic.{e}", obs_weight, action_weight, params["layers.0.bias"], params))
    noise_scale, noise_shift = _fold_noise(steps, sampler.prior_std, network.out.bias)
    return FoldedPolicy(
        noise_scale=noise_scale,
        noise_shift=noise_shift,
        steps=_fold_steps(steps, denoiser.step_bias.double().numpy(), network),
        denoiser=network,
        critics=tuple(critics),
        selection=sampler.selection,
        selection_std=sampler.selection_std,
        particles=sampler.particles,
        scale=weights.scale,
    )


def _fold_steps(
    steps: Sequence[ReverseStep], step_bias_TH: NDArray[np.float64], network: Network
) -> tuple[ChainStep, ...]:
    # W_a a = W_a (y + s b) / r
    shift = network.action_weight.astype(np.float64) @ network.out.bias
    folded = []
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        r, s = step.inv_sqrt_alpha_bar, step.noise_scale
        r_after = 0.0 if after is None else after.inv_sqrt_alpha_bar
        folded.append(
            ChainStep(
                bias=_float32(step_bias_TH[step.t] + s / r * shift),
                action_scale=1 / r,
                noise_scale=s,
                gain=1.0 if after is None else r_after * step.x0_coef,
                carry=r_after * step.action_coef / r,
            )
        )
    return tuple(folded)


def _fold_noise(steps: Sequence[ReverseStep], prior_std: float, bias: Array) -> tuple[Array, Array]:
    """What makes y_0 of the initial latent and n of each later noise: factors [T, 1, 1], summands [T, 1, A]."""
    first = steps[0]
    scales, shifts = [first.inv_sqrt_alpha_bar * prior_std], [-first.noise_scale]
    for step, after in itertools.pairwise(steps):
        scales.append(after.inv_sqrt_alpha_bar * step.std)
        carry = after.inv_sqrt_alpha_bar * step.action_coef / step.inv_sqrt_alpha_bar
        shifts.append(carry * step.noise_scale - after.noise_scale)
    shift_TA = np.multiply.outer(np.array(shifts), bias.astype(np.float64))
    return _float32(np.array(scales)[:, None, None]), _float32(shift_TA[:, None, :])


def _network(
    name: str, obs_weight: Tensor, action_weight: Tensor, obs_bias: Tensor, params: Mapping[str, Tensor]
) -> Network:
    last = depth(params) - 1
    layers = [
        Layer(
            f"{name}.layers.{i}",
            _float32(params[f"layers.{i}.weight"]),
            _float32(params[f"layers.{i}.bias"]),
        )
        for i in range(1, last + 1)
    ]
    norms = tuple(_norm(f"{name}.norms.{i}", subset(params, f"norms.{i}.")) for i in range(last))
    first = (_float32(action_weight), _float32(obs_weight), _float32(obs_bias))
    return Network(name, *first, norms, tuple(layers[:-1]), layers[-1])


def _norm(name: str, params: Mapping[str, Tensor]) -> Norm | None:
    return Norm(name, _float32(params["weight"]), _float32(params["bias"])) if params else None


def _float32(values: Tensor | NDArray[np.float64]) -> Array:
    return np.ascontiguousarray(values, dtype=np.float32)
