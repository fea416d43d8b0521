"""Twin critics: values of actions, and the choice among particles by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rsm_train.networks import Params, init_mlp, mlp_tail

ENSEMBLE_SIZE = 2


def init_critics(obs_size: int, action_size: int, hidden: Sequence[int], generator: torch.Generator) -> Params:
    """E = 2 stacked MLPs over [s, a]; every tensor has a leading E axis."""
    return init_mlp([obs_size + action_size, *hidden, 1], generator, ensemble=ENSEMBLE_SIZE)


def q_values(critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
    """Q_i(s, a) of every critic, particle and state: [E, B, N].

    The observation's part of the first layer is computed once per state, not once per particle.
    """
    weight, bias = critics["layers.0.weight"], critics["layers.0.bias"]
    members, (rows, particles, action_size) = len(weight), action_BNA.shape
    obs_weight, action_weight = torch.split(weight, [obs_BO.shape[1], action_size], dim=2)
    obs_part = torch.baddbmm(bias.unsqueeze(1), obs_BO.expand(members, -1, -1), obs_weight.mT)  # [E, B, H]
    flat_actions = action_BNA.reshape(1, rows * particles, action_size).expand(members, -1, -1)
    action_part = torch.bmm(flat_actions, action_weight.mT).view(members, rows, particles, -1)
    first = (obs_part.unsqueeze(2) + action_part).view(members, rows * particles, -1)
    return mlp_tail(critics, first).view(members, rows, particles)


def min_q(critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
    """Q = min(Q1, Q2), [B, N]."""
    return q_values(critics, obs_BO, action_BNA).amin(dim=0)


def best_of_n(critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> tuple[Tensor, Tensor]:
    """The particle with the highest min-Q of each state: actions [B, A] and values [B]."""
    q_BN = min_q(critics, obs_BO, action_BNA)
    q_B, best_B = q_BN.max(dim=1)
    index = best_B[:, None, None].expand(-1, 1, action_BNA.shape[2])
    return action_BNA.gather(1, index).squeeze(1), q_B
