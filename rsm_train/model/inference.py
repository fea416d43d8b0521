"""Particles and their values without a graph, fast: what takes nearly all the time of an update.

The results are those of `networks.sample_actions` and `critic.q_values` to rounding. On a CPU, particles go
through all T steps in groups whose activations stay in the cache, and what lies between two matrix products
can be compiled into one pass; see `kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rsm_train.model import kernels
from rsm_train.model.critic import fold, q_values
from rsm_train.model.diffusion import NoiseSchedule, reverse_step
from rsm_train.model.kernels import Compute
from rsm_train.model.networks import Params, noise_from_parts, observe, split_denoiser

WHOLE_CHAIN_STEPS = 10
"""Longest chain that is compiled as a whole; the time that compiling takes grows with the steps."""
GROUP_ROWS = 1024
"""Particles that go through the chain together on a CPU: 1 MB per activation of width 256 in float32."""


class Inference:
    """Samples and values particles with one noise schedule and one way to compute."""

    def __init__(self, schedule: NoiseSchedule, prior_std: float, compute: Compute) -> None:
        self._schedule = schedule
        self._prior_std = prior_std
        self._dtype = compute.dtype
        whole = schedule.steps <= WHOLE_CHAIN_STEPS
        self._step = kernels.compiled(_denoise, compute.compile and not whole)
        self._chain = kernels.compiled(self._run_chain, compute.compile and whole)
        self._values = kernels.compiled(_values, compute.compile)
        device = schedule.betas.device
        # Constants as tensors, so that all steps are one compiled function.
        self._constants = torch.tensor([step.constants for step in schedule.reverse_steps], device=device)

    @torch.no_grad()
    def sample(self, policy: Mapping[str, Tensor], obs_BO: Tensor, noise_BTNA: Tensor) -> Tensor:
        """N actions per observation, [B, N, A] in [-1, 1]; see `networks.sample_actions`."""
        rows, particles = noise_BTNA.shape[0], noise_BTNA.shape[2]
        groups = [
            self._chain(dict(policy), obs_BO[group], noise_BTNA[group])
            for group in _groups(rows, particles, obs_BO.device)
        ]
        return torch.cat(groups)

    def _run_chain(self, policy: Params, obs_BO: Tensor, noise_BTNA: Tensor) -> Tensor:
        denoiser = split_denoiser(policy, self._schedule.steps)
        last = len(self._schedule.reverse_steps) - 1
        obs_part = observe(denoiser, obs_BO)
        tail = {name: value.to(self._dtype) for name, value in denoiser.tail.items()}
        action = self._prior_std * noise_BTNA[:, 0]
        for k, step in enumerate(self._schedule.reverse_steps):
            # The last step's std is 0: which noise it is given does not matter.
            z = noise_BTNA[:, k + 1] if k < last else noise_BTNA[:, 0]
            step_part = denoiser.step_bias[step.t]
            action = self._step(
                tail, denoiser.action_weight, obs_part, step_part, action, z, self._constants[k]
            )
        return action

    @torch.no_grad()
    def values(self, critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
        """Values of every critic of any kind, [E, B, N] float32; see `critic.q_values`."""
        rows, particles, _ = action_BNA.shape
        groups = [
            self._values(dict(critics), obs_BO[group], action_BNA[group])
            for group in _groups(rows, particles, obs_BO.device)
        ]
        return torch.cat(groups, dim=1)


def _values(critics: Params, obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
    return q_values(fold(critics), obs_BO, action_BNA)


def _denoise(
    tail: Params,
    action_weight: Tensor,
    obs_part: Tensor,
    step_part: Tensor,
    action: Tensor,
    z: Tensor,
    constants: Tensor,
) -> Tensor:
    eps = noise_from_parts(tail, action_weight, obs_part, step_part, action).float()
    return reverse_step(action, eps, z, *constants)


def _groups(rows: int, particles: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows with about GROUP_ROWS particles each, as equal as can be; one slice on a GPU."""
    count = 1 if device.type != "cpu" else max(1, round(rows * particles / GROUP_ROWS))
    count = min(count, rows)
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)
