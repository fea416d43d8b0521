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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from rsm_export.graph.network import Array, Network, float32, fold_network
from rsm_export.graph.writer import GraphWriter, bias_name, sign_of
from rsm_train.model.diffusion import ReverseStep
from rsm_train.model.samplers.diffusion import DiffusionWeights


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
class FoldedChain:
    """A denoising chain, ready to be written as nodes."""

    per_particle: ClassVar[bool] = True
    """The network runs on every particle."""

    noise_scale: Array
    """[T, 1, 1]"""
    noise_shift: Array
    """[T, 1, A]"""
    steps: tuple[ChainStep, ...]
    network: Network

    @property
    def length(self) -> int:
        """T of the graph."""
        return len(self.steps)

    def write(self, writer: GraphWriter, obs_part: str, particles: int) -> str:
        """Write all reverse steps; returns the particles in [-1, 1], [R, A] with R = B N."""
        return self._denoise(writer, obs_part, self._noise(writer, particles))

    def _noise(self, writer: GraphWriter, particles: int) -> list[str]:
        """y_0 and the n of every later step, [R, A] each."""
        steps, action_size = len(self.steps), self.noise_shift.shape[-1]
        writer.scope = "noise"
        scaled = writer.op("Mul", "noise", writer.constant("noise.scale", self.noise_scale))
        shifted = writer.op("Add", scaled, writer.constant("noise.shift", self.noise_shift))
        flat = writer.op("Reshape", shifted, writer.shape(0, steps * particles * action_size))
        parts = writer.split(flat, [particles * action_size] * steps)
        if particles == 1:
            return parts
        return [writer.op("Reshape", part, writer.shape(-1, action_size)) for part in parts]

    def _denoise(self, writer: GraphWriter, obs_part: str, noise: list[str]) -> str:
        """All reverse steps: the particles in [-1, 1], [R, A]."""
        network = self.network
        weight = writer.constant(f"{network.name}.layers.0.action_weight", network.action_weight)
        out = writer.constant(f"{network.out.name}.weight", network.out.weight)
        y = noise[0]
        for k, step in enumerate(self.steps):
            writer.scope = f"step.{k}"
            sign = sign_of(network.norms[0])
            bias = writer.constant(f"{network.name}.steps.{k}.{bias_name(sign)}", sign * step.bias)
            action_part = writer.op("Gemm", y, weight, bias, transB=1, alpha=sign * step.action_scale)
            hidden = writer.hidden(network, writer.op("Add", action_part, obs_part))
            gain = step.gain
            clean = writer.op("Gemm", hidden, out, y, transB=1, alpha=2 * gain * step.noise_scale, beta=gain)
            clean = writer.op("Clip", clean, writer.scalar(-gain), writer.scalar(gain))
            if k + 1 < len(self.steps):
                carried = writer.op("Mul", y, writer.scalar(step.carry))
                y = writer.op("Add", writer.op("Add", clean, carried), noise[k + 1])
        return clean


def fold_chain(weights: DiffusionWeights) -> FoldedChain:
    """Fold a denoising chain."""
    denoiser, steps = weights.denoiser, weights.schedule.reverse_steps
    bias = torch.zeros_like(denoiser.step_bias[0])
    network = fold_network("policy", denoiser.obs_weight, denoiser.action_weight, bias, denoiser.tail)
    noise_scale, noise_shift = _fold_noise(steps, weights.sampler.prior_std, network.out.bias)
    folded = _fold_steps(steps, denoiser.step_bias.double().numpy(), network)
    return FoldedChain(noise_scale, noise_shift, folded, network)


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
                bias=float32(step_bias_TH[step.t] + s / r * shift),
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
    return float32(np.array(scales)[:, None, None]), float32(shift_TA[:, None, :])
