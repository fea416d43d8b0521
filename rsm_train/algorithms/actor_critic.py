"""The part that DPMD and SDAC share: a diffusion policy, its critics and its temperature.

An algorithm owns an `ActorCritic` and adds the rule by which the policy learns. One update is

    a' = agent.backup_action(...)            an action of the policy at s'
    agent.update_critic(batch, a')           one step of the critics on the TD error
    agent.update_policy(loss)                when due: one step on the algorithm's loss, then all averages
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rsm_train.algorithms.actor_critic_config import ActorCriticConfig
from rsm_train.algorithms.common import (
    Batch,
    Metrics,
    copy_params,
    explore,
    leaves,
    load_params,
    move_average,
)
from rsm_train.algorithms.critics import Backup, Critics
from rsm_train.algorithms.optimizer import Adam, load_state, save_state
from rsm_train.algorithms.temperature import open_loop_temperature
from rsm_train.model.critic import choose_best
from rsm_train.model.diffusion import make_schedule
from rsm_train.model.inference import Inference
from rsm_train.model.kernels import Compute
from rsm_train.model.networks import Params, init_denoiser
from rsm_train.model.samplers.diffusion import DiffusionSampler

KL_RATE = 0.01
"""Step of the dual ascent on log lambda, per nat of error and policy update."""


class ActorCritic:
    """The networks, optimisers and temperature of a diffusion policy with critics."""

    def __init__(
        self,
        config: ActorCriticConfig,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str,
        compute: Compute,
    ) -> None:
        self.config = config
        self.action_size = action_size
        self.device = torch.device(device)
        self.updates = 0
        self.schedule = make_schedule(config.schedule, config.diffusion_steps, device=device)
        self.inference = Inference(self.schedule, config.prior_std, compute)
        hidden = [config.width] * config.depth
        # Drawn on the CPU, so that a seed gives the same networks on every device.
        self.policy = leaves(init_denoiser(obs_size, action_size, hidden, generator), device)
        self.critics = Critics(
            config, obs_size, action_size, generator=generator, device=device, compute=compute
        )
        self.policy_average = copy_params(self.policy)  # the policy that is evaluated and exported
        self.policy_optimizer = Adam(self.policy, config.policy_lr)
        self._optimizers = {
            "policy_optimizer": self.policy_optimizer,
            "critic_optimizer": self.critics.optimizer,
        }
        self._open_loop = open_loop_temperature(
            config.temperature_schedule, config.temperature, config.target_entropy
        )
        # On the device, so that an update that was captured as a graph reads what the host wrote.
        self.log_alpha = torch.full((), math.log(config.temperature), device=device)
        self._kept = {"log_alpha": self.log_alpha}

    # --- temperature and noise ------------------------------------------------------------------------------

    @property
    def alpha(self) -> Tensor:
        """The temperature, 0-d."""
        return self.log_alpha.exp()

    @property
    def temperature(self) -> float:
        """lambda now, on the host."""
        return float(self.lambda_)

    @property
    def lambda_(self) -> Tensor:
        """What divides Q in the weights, 0-d."""
        return self.config.temperature_scale * self.alpha

    @property
    def exploration_std(self) -> Tensor | float:
        """Standard deviation of the exploration noise now."""
        absolute = self.config.exploration_units == "absolute"
        return self.config.exploration_noise * (1.0 if absolute else self.alpha)

    # --- acting ---------------------------------------------------------------------------------------------

    @property
    def sampler(self) -> DiffusionSampler:
        """How the policy samples."""
        c = self.config
        return DiffusionSampler(
            *(c.schedule, c.diffusion_steps, c.particles, c.prior_std),
            selection=c.critic_selection,
            selection_std=c.critic_std_factor,
        )

    def act(self, obs_BO: Tensor, noise_BTNA: Tensor, exploration_BA: Tensor) -> Tensor:
        """Best of N from the current policy, with exploration noise; [B, A] in [-1, 1]."""
        action = self.best_action(obs_BO, noise_BTNA)
        return explore(action, exploration_BA, self.exploration_std).clamp(-1.0, 1.0)

    def best_action(self, obs_BO: Tensor, noise_BTNA: Tensor) -> Tensor:
        """Of N particles of the current policy, the one the current critics value most; [B, A]."""
        action_BNA = self.inference.sample(self.policy, obs_BO, noise_BTNA)
        if action_BNA.shape[1] == 1:
            return action_BNA[:, 0]
        return choose_best(action_BNA, self.values(obs_BO, action_BNA))[0]

    def values(self, obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
        """Q(s, a) in scaled rewards, one value from the ensemble's, without a graph; [B, N]."""
        return self.critics.select(self.inference.values(self.critics.params, obs_BO, action_BNA))

    # --- learning -------------------------------------------------------------------------------------------

    def begin_update(self) -> bool:
        """Move the counters, the temperature and the learning rate; returns True if the policy is due."""
        c = self.config
        if self._open_loop is not None:
            self.log_alpha.fill_(self._open_loop.log_at(self.updates))
        self.policy_optimizer.learning_rate.fill_(c.policy_lr_after(self.updates // c.policy_every))
        self.critics.begin_update(self.updates)
        self.updates += 1
        return self.updates % c.policy_every == 0

    def backup_action(self, obs_BO: Tensor, noise_BTNA: Tensor, exploration_BA: Tensor) -> Tensor:
        """The action [B, A] that learning takes for the policy's: the best of N, noisy with `noisy_backup`."""
        action = self.best_action(obs_BO, noise_BTNA)
        if self.config.noisy_backup:
            action = explore(action, exploration_BA, self.exploration_std)
        return action

    def update_critic(self, batch: Batch, next_action_BA: Tensor, backup: Backup | None = None) -> Metrics:
        """One step of the critics on y = reward + discount Q'(s', a').

        Args:
            batch: transitions.
            next_action_BA: a', [B, A].
            backup: reward and discount, [B] each; those of `Critics.backup` if None.
        """
        backup = self.critics.backup(batch) if backup is None else backup
        return self.critics.update(batch, next_action_BA, backup, repeats=self.config.critic_repeats)

    def update_policy(self, loss: Tensor) -> None:
        """One step of the policy, then of the averaged policy and the target critics."""
        self.policy_optimizer.descend(loss)
        move_average(self.policy_average, self.policy, self.config.tau)
        self.critics.move_target()

    def update_temperature(self, kl: Tensor) -> None:
        """Dual ascent: warmer where the weights are sharper than target_kl; nothing with another schedule."""
        if self.config.temperature_schedule == "kl":
            self.log_alpha.add_(KL_RATE * (kl - self.config.target_kl))

    # --- keeping --------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, Params]:
        """Every network by name."""
        return {
            "policy": self.policy,
            "policy_average": self.policy_average,
            **self.critics.networks(),
        }

    def keep(self, name: str, tensors: Params) -> Params:
        """Make an algorithm's own tensors part of `state()` and `restore()`; they must be changed in place."""
        self._kept |= {f"{name}.{key}": value for key, value in tensors.items()}
        return tensors

    def state(self) -> dict[str, Tensor]:
        """See `Agent.state`."""
        return save_state(self._optimizers, self._kept)

    def restore(self, networks: Mapping[str, Params], state: Mapping[str, Tensor], updates: int) -> None:
        """See `Agent.restore`."""
        for name, params in self.networks().items():
            load_params(params, networks[name])
        load_state(self._optimizers, self._kept, state)
        self.updates = updates
