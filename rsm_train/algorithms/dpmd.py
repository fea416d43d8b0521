"""DPMD: Diffusion Policy Mirror Descent.

Ma, Chen, Wang, Li, Dai, "Efficient Online Reinforcement Learning for Diffusion Policy", ICML 2025.
Mirror descent moves the policy towards pi_{k+1}(a|s) proportional to pi_k(a|s) exp(Q(s, a) / lambda). Score
matching keeps its minimiser when it is weighted by any positive function of (s, t), and with the weight
Z(s) p_t(a_t|s) its loss becomes an expectation over pi_k that can be sampled:

    L = E_s E_{a_0 ~ pi_k(.|s)} E_{t, eps} [ w(s, a_0) |eps_theta(s, a_t, t) - eps|^2 ],  w = exp(Q / lambda)
    a_t = sqrt(alpha_bar_t) a_0 + sqrt(1 - alpha_bar_t) eps

Here w is a softmax over K actions of the same state, which divides by an estimate of Z(s).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rsm_train.algorithms.actor_critic import ActorCritic
from rsm_train.algorithms.actor_critic_config import QUICK_DIFFUSION, ActorCriticConfig
from rsm_train.algorithms.common import (
    AlgorithmConfig,
    Batch,
    Metrics,
    copy_params,
    explore,
    load_params,
    weight_health,
)
from rsm_train.model.diffusion import NoiseSchedule, forward_noise
from rsm_train.model.graphs import CapturedVariants
from rsm_train.model.kernels import DEFAULT_COMPUTE, Compute, compiled
from rsm_train.model.networks import Params, observe, predict_noise, split_denoiser

QScaling = Literal["raw", "state", "running", "running_slip"]

_STD_FLOOR = 1e-6
_RUNNING_RATE = 1e-3  # of the statistics of Q
_RUNNING_CLIP = 3.0


@dataclass(frozen=True)
class DPMDConfig(ActorCriticConfig):
    """Settings of DPMD; the defaults are the `paper` preset."""

    policy_samples: int = field(
        default=32,
        metadata={"group": "Policy loss of dpmd", "help": "K, number of actions per state in the policy loss."},
    )
    policy_chains: int | None = field(
        default=None,
        metadata={
            "group": "Policy loss of dpmd",
            "help": "Number of denoising chains per state that the K actions come from: each gives K / "
            "policy_chains actions, which proposal_noise keeps apart; default: K.",
        },
    )
    resample_actions: bool = field(
        default=False,
        metadata={
            "group": "Policy loss of dpmd",
            "help": "Learn from one of the K actions, drawn with the weights as probabilities, instead of from "
            "all K with their weights.",
        },
    )
    proposal_noise: float = field(
        default=0.0,
        metadata={
            "group": "Policy loss of dpmd",
            "help": "Standard deviation of the noise that is added to the K actions, so that they differ.",
        },
    )
    old_policy_every: int = field(
        default=0,
        metadata={
            "group": "Policy loss of dpmd",
            "help": "Number of updates between copies of the policy to pi_k; 0 uses the averaged policy as "
            "pi_k.",
        },
    )
    policy_actions: Literal["policy", "backup"] = field(
        default="policy",
        metadata={
            "group": "Policy loss of dpmd",
            "help": "Actions a_0 of the policy loss: K actions of pi_k at s, or (s', a') of the TD target "
            "(backup, deviation 3).",
        },
    )
    weighting: Literal["softmax", "exp"] = field(
        default="softmax",
        metadata={
            "group": "Policy loss of dpmd",
            "help": "Weights w: softmax over the K actions of a state, or exp(Q / lambda) without "
            "normalisation (exp).",
        },
    )
    q_scaling: QScaling = field(
        default="raw",
        metadata={
            "group": "Policy loss of dpmd",
            "help": "Scaling of Q in the weights: none (raw); standardised over the K actions of a state "
            "(state); "
            "standardised by running statistics and clipped to +-3 (running); like running, but with the "
            "published error q - mean / std (running_slip, deviation 1).",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("policy_samples", self.policy_samples >= 1, ">= 1")
        self._require("proposal_noise", self.proposal_noise >= 0, ">= 0")
        chains = self.policy_chains or self.policy_samples
        self._require(
            "policy_chains",
            (self.policy_chains is None or self.policy_chains >= 1) and self.policy_samples % chains == 0,
            f">= 1 and a divisor of policy_samples, {self.policy_samples}",
        )
        if chains < self.policy_samples and not self.proposal_noise:
            raise ValueError(
                "wanted proposal_noise > 0 with fewer policy_chains than policy_samples, got 0; the actions of "
                "a chain would be the same"
            )
        if self.resample_actions and self.weighting != "softmax":
            raise ValueError(
                f"wanted weighting softmax with resample_actions, got {self.weighting}, whose weights are no "
                "probabilities"
            )
        self._require("old_policy_every", self.old_policy_every >= 0, ">= 0")
        self._require_reachable_kl(self.policy_samples)
        if self.policy_actions == "backup":
            self._require("policy_samples", self.policy_samples == 1, "= 1 with policy_actions backup")
        if self.policy_actions == "backup" and self.weighting == "softmax":
            raise ValueError(
                "wanted weighting exp with policy_actions backup, got softmax; a softmax over one action is 1"
            )
        if self.weighting == "exp" and not self.q_scaling.startswith("running"):
            raise ValueError(
                f"wanted q_scaling running or running_slip with weighting exp, got {self.q_scaling}; "
                "exp of an unbounded Q overflows"
            )

    def ineffective(self) -> Mapping[str, str]:
        """See `AlgorithmConfig.ineffective`."""
        found = dict(super().ineffective())
        if self.policy_actions == "backup":
            found["old_policy_every"] = found["proposal_noise"] = "policy_actions policy"
            found["policy_chains"] = "policy_actions policy"
        return found


@dataclass(frozen=True)
class DPMDNoise:
    """All randomness of one update, standard normal unless said otherwise.

    K' is K, or 1 with backup actions or with resample_actions.
    """

    next_action: Tensor  # [B, T, N', A] samples a' at s'
    exploration: Tensor  # [B, A] of a' with noisy_backup
    action: Tensor  # [B, T, C, A] samples a_0 at s, from C chains; C = 0 with backup actions
    proposal: Tensor  # [B, K, A] widens a_0; K = 0 with backup actions
    t: Tensor  # [B, K'] int64, uniform over {0, ..., T - 1}
    eps: Tensor  # [B, K', A]
    choice: Tensor  # [B, 1] uniform over [0, 1), draws one of the K actions; [B, 0] without resample_actions


class DPMD:
    """The update of DPMD."""

    Config: ClassVar[type[AlgorithmConfig]] = DPMDConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "reference": {
            "prior_std": 0.5,
            "policy_lr_final": 3e-5,
            "noisy_backup": True,
            "critic_repeats": 2,
            "policy_actions": "backup",
            "policy_samples": 1,
            "weighting": "exp",
            "q_scaling": "running_slip",
        },
        "kl": {
            "policy_samples": 64,
            "old_policy_every": 1_000,
            "proposal_noise": 0.2,
            "critic_selection": "mean",
            "target_particles": 1,
            "temperature_schedule": "kl",
            "temperature": 1.0,
            "target_kl": 2.0,
            "exploration_units": "absolute",
        },
        "quick": {**QUICK_DIFFUSION, "policy_samples": 8, "q_scaling": "state", "proposal_noise": 0.2},
    }

    def __init__(
        self,
        config: DPMDConfig,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        compute: Compute = DEFAULT_COMPUTE,
    ) -> None:
        self.config = config
        self.agent = ActorCritic(
            config, obs_size, action_size, generator=generator, device=device, compute=compute
        )
        self._policy_old = None
        if config.old_policy_every:
            self._policy_old = self.agent.keep("policy_old", copy_params(self.agent.policy))
        # Running statistics of Q, for the scalings that need them.
        start = {"mean": torch.zeros((), device=device), "std": torch.ones((), device=device)}
        self._q = self.agent.keep("q", start)
        self._improve = compiled(self._improve_eagerly, compute.compile)
        self._learn_captured = CapturedVariants(self._learn, self.agent.device)

    def update(self, batch: Batch, noise: DPMDNoise) -> Metrics:
        """One critic update and, every `policy_every`-th time, one policy update."""
        if self._policy_old is not None and self.agent.updates % self.config.old_policy_every == 0:
            load_params(self._policy_old, self.agent.policy)
        return self._learn_captured(batch, noise, policy_due=self.agent.begin_update())

    def _learn(self, batch: Batch, noise: DPMDNoise, *, policy_due: bool) -> Metrics:
        next_action_BA = self.agent.backup_action(batch.next_obs, noise.next_action, noise.exploration)
        metrics = self.update_critic(batch, next_action_BA)
        if policy_due:
            metrics |= self._update_policy(batch, next_action_BA, noise)
        return metrics

    def update_critic(self, batch: Batch, next_action_BA: Tensor) -> Metrics:
        """One step on y = reward_scale r + gamma (1 - terminated) Q'(s', a'); a variant may have another."""
        return self.agent.update_critic(batch, next_action_BA)

    def _update_policy(self, batch: Batch, next_action_BA: Tensor, noise: DPMDNoise) -> Metrics:
        if self.config.policy_actions == "backup":
            obs_BO, action_BKA = batch.next_obs, next_action_BA.unsqueeze(1)
        else:
            obs_BO, action_BKA = batch.obs, self._propose(batch.obs, noise)  # a_0 ~ pi_k(. | s)
        q_BK = self.agent.values(obs_BO, action_BKA)
        return self._improve(obs_BO, action_BKA, q_BK, noise.t, noise.eps, noise.choice)

    def _improve_eagerly(
        self, obs_BO: Tensor, action_BKA: Tensor, q_BK: Tensor, t_BK: Tensor, eps_BKA: Tensor, choice_B1: Tensor
    ) -> Metrics:
        weight_BK, health = self._weigh(q_BK)  # w(s, a_0)
        if self.config.resample_actions:
            action_BKA, weight_BK = resample(action_BKA, weight_BK, choice_B1)
        agent = self.agent
        loss = policy_loss(agent.schedule, agent.policy, obs_BO, action_BKA, weight_BK, t_BK, eps_BKA)
        self.agent.update_policy(loss)
        self.agent.update_temperature(health["weight_kl_uniform"])
        return {"policy_loss": loss.detach(), **health}

    def _propose(self, obs_BO: Tensor, noise: DPMDNoise) -> Tensor:
        """K actions of pi_k at each state, [B, K, A], with noise that keeps them apart."""
        policy = self.agent.policy_average if self._policy_old is None else self._policy_old
        action_BCA = self.agent.inference.sample(policy, obs_BO, noise.action)
        # The actions of a chain stand side by side.
        action_BKA = action_BCA.repeat_interleave(noise.proposal.shape[1] // action_BCA.shape[1], dim=1)
        return explore(action_BKA, noise.proposal, self.config.proposal_noise).clamp(-1.0, 1.0)

    def _weigh(self, q_BK: Tensor) -> tuple[Tensor, Metrics]:
        """w_k = softmax_k(Q(s, a_k) / lambda), or exp(Q / lambda); [B, K]."""
        if self.config.q_scaling.startswith("running"):
            self._q["mean"].lerp_(q_BK.mean(), _RUNNING_RATE)
            self._q["std"].lerp_(q_BK.std(correction=0), _RUNNING_RATE)
        scaled = scale_q(q_BK, self.config.q_scaling, self._q["mean"], self._q["std"])
        logits = scaled / self.agent.lambda_
        weight_BK = torch.softmax(logits, dim=1) if self.config.weighting == "softmax" else logits.exp()
        # With one action per state what the weights compare is the states of the batch.
        share = weight_BK if weight_BK.shape[1] > 1 else (weight_BK / weight_BK.sum()).T
        health = weight_health(share)
        if self.config.q_scaling.startswith("running"):
            health["q_clipped"] = (scaled.abs() >= _RUNNING_CLIP).float().mean()
        return weight_BK, {"q_spread": q_BK.std(dim=1, correction=0).mean(), **health}

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> DPMDNoise:
        """Draw the randomness of one update on the generator's device."""
        c, size, device = self.config, self.agent.action_size, generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch_size, *shape, generator=generator, device=device)

        backup = c.policy_actions == "backup"
        proposed = 0 if backup else c.policy_samples
        chains = 0 if backup else c.policy_chains or c.policy_samples
        weighted = 1 if backup or c.resample_actions else c.policy_samples
        return DPMDNoise(
            next_action=normal(c.diffusion_steps, c.target_particles, size),
            exploration=normal(size),
            action=normal(c.diffusion_steps, chains, size),
            proposal=normal(proposed, size),
            t=torch.randint(c.diffusion_steps, (batch_size, weighted), generator=generator, device=device),
            eps=normal(weighted, size),
            choice=torch.rand(batch_size, int(c.resample_actions), generator=generator, device=device),
        )


def policy_loss(
    schedule: NoiseSchedule,
    policy: Params,
    obs_BO: Tensor,
    action_BKA: Tensor,
    weight_BK: Tensor,
    t_BK: Tensor,
    eps_BKA: Tensor,
) -> Tensor:
    """E_s sum_k w_k |eps_theta(s, a_t, t) - eps|^2, 0-d."""
    denoiser = split_denoiser(policy, schedule.steps)
    a_t = forward_noise(schedule, action_BKA, t_BK, eps_BKA)
    predicted = predict_noise(denoiser, observe(denoiser, obs_BO), a_t, t_BK)
    error_BK = (predicted - eps_BKA).square().mean(dim=2)
    return (weight_BK * error_BK).sum(dim=1).mean()


def resample(action_BKA: Tensor, weight_BK: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """One action of each state, [B, 1, A], drawn with the weights as probabilities, and its weight 1, [B, 1].

    Args:
        action_BKA: K actions per state, [B, K, A].
        weight_BK: probabilities, [B, K]; each row sums to 1.
        uniform_B1: uniform over [0, 1), [B, 1].
    """
    # The sum of a row may be a rounding below 1.
    index_B1 = torch.searchsorted(weight_BK.cumsum(dim=1), uniform_B1, right=True).clamp(
        max=weight_BK.shape[1] - 1
    )
    chosen = action_BKA.gather(1, index_B1.unsqueeze(2).expand(-1, -1, action_BKA.shape[2]))
    return chosen, torch.ones_like(uniform_B1)


def scale_q(q_BK: Tensor, scaling: QScaling, mean: Tensor, std: Tensor) -> Tensor:
    """Q as the weights take it; any factor or offset per state is free. mean and std are the running ones."""
    if scaling == "raw":
        return q_BK
    if scaling == "state":
        state_std, state_mean = torch.std_mean(q_BK, dim=1, keepdim=True, correction=0)
        return (q_BK - state_mean) / (state_std + _STD_FLOOR)
    std = std + _STD_FLOOR
    # Deviation 1 is a precedence slip of the published program: Q keeps its scale and its offset.
    scaled = (q_BK - mean) / std if scaling == "running" else q_BK - mean / std
    return scaled.clamp(-_RUNNING_CLIP, _RUNNING_CLIP)
