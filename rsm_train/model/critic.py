"""The critics: an ensemble of values of actions, how they become one value, and the choice among particles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rsm_train.model.diffusion import SelectionName
from rsm_train.model.networks import Params, init_mlp, mlp_tail


def init_critics(
    obs_size: int,
    action_size: int,
    hidden: Sequence[int],
    generator: torch.Generator,
    *,
    members: int = 2,
    layer_norm: bool = False,
) -> Params:
    """E = `members` stacked MLPs over [s, a]; every tensor has a leading E axis.

    With `layer_norm`, each hidden layer is normalised before its activation: `norms.i.{weight,bias}` [E, H].
    """
    params = init_mlp([obs_size + action_size, *hidden, 1], generator, ensemble=members)
    if layer_norm:
        for i, width in enumerate(hidden):
            params[f"norms.{i}.weight"] = torch.ones(members, width)
            params[f"norms.{i}.bias"] = torch.zeros(members, width)
    return params


def q_values(critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
    """Q_i(s, a) of every critic, particle and state: [E, B, N] in the dtype of the weights' last layer.

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


def select_value(q_E: Tensor, selection: SelectionName = "min", std_factor: float = 0.0) -> Tensor:
    """One value from those of the ensemble: [E, ...] -> [...].

    "min" is clipped double Q (Fujimoto et al. 2018); "mean"; "mean_std" is mean + std_factor * std with the
    population's std, optimistic for a positive factor and pessimistic for a negative one.
    """
    if selection == "min":
        return q_E.amin(dim=0)
    mean = q_E.mean(dim=0)
    if selection == "mean":
        return mean
    return mean + std_factor * (q_E - mean).square().mean(dim=0).sqrt()


def choose_best(action_BNA: Tensor, q_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The particle of the highest value of each state: actions [B, A] and values [B]."""
    q_B, best_B = q_BN.max(dim=1)
    index = best_B[:, None, None].expand(-1, 1, action_BNA.shape[2])
    return action_BNA.gather(1, index).squeeze(1), q_B
