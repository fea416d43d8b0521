"""The critics of an algorithm with their optimiser and target networks: how values are learnt.

The value of a transition is learnt from y = reward + discount Z(s', a'), where Z is one number, or a
distribution over atoms whose atoms are moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsm_train.algorithms.common import (
    Batch,
    Metrics,
    copy_params,
    leaves,
    move_average,
)
from rsm_train.algorithms.critic_config import CriticConfig
from rsm_train.algorithms.optimizer import Adam
from rsm_train.model.categorical import make_atoms, project
from rsm_train.model.critic import (
    ATOMS,
    batch_outputs,
    init_critics,
    is_learnt,
    mean_value,
    project_rows,
    select_value,
    uses_batch,
)
from rsm_train.model.diffusion import SelectionName
from rsm_train.model.kernels import Compute, compiled
from rsm_train.model.networks import Params

Backup = tuple[Tensor, Tensor]
"""Reward [B] and discount [B] of y = reward + discount Z(s', a'), in scaled rewards."""


class Critics:
    """An ensemble of E critics of the kind that the settings choose, and what learns it."""

    def __init__(
        self,
        config: CriticConfig,
        obs_size: int,
        action_size: int,
        *,
        generator: torch.Generator,
        device: torch.device | str,
        compute: Compute,
    ) -> None:
        self.config = config
        categorical = config.critic_loss == "categorical"
        params = init_critics(
            *(obs_size, action_size, config.critic_hidden, generator),
            members=config.critics,
            norm=config.critic_norm,
            input_norm=config.critic_input_norm,
            atoms=make_atoms(config.value_atoms, config.value_limit) if categorical else None,
        )
        if config.critic_unit_weights:
            project_rows(params)
        learnt = leaves({name: value for name, value in params.items() if is_learnt(name)}, device)
        self.params: Params = {name: learnt.get(name, value.to(device)) for name, value in params.items()}
        self.target: Params | None = copy_params(self.params) if config.critic_target == "average" else None
        self.optimizer = Adam(learnt, config.critic_lr)
        self._descend = compiled(self._descend_eagerly, compute.compile)

    def networks(self) -> dict[str, Params]:
        """ "critic" and, if there is one, "critic_target"."""
        found = {"critic": self.params}
        return found if self.target is None else found | {"critic_target": self.target}

    def select(self, q_E: Tensor) -> Tensor:
        """One value from the ensemble's: [E, ...] -> [...]."""
        return select_value(q_E, self.config.critic_selection, self.config.critic_std_factor)

    def backup(self, batch: Batch) -> Backup:
        """reward_scale r and gamma (1 - terminated): a time limit bootstraps."""
        c = self.config
        return c.reward_scale * batch.reward, c.gamma * (1 - batch.terminated)

    def begin_update(self, updates: int) -> None:
        """Set the learning rate of the update that follows `updates` others."""
        self.optimizer.learning_rate.fill_(self.config.critic_lr_after(updates))

    def update(self, batch: Batch, next_action_BA: Tensor, backup: Backup, *, repeats: int = 1) -> Metrics:
        """One step on the loss of y = reward + discount Z(s', a'), of every critic.

        Args:
            batch: transitions.
            next_action_BA: a', an action of the policy at s', [B, A].
            backup: reward and discount, [B] each.
            repeats: how often the gradient is applied.
        """
        rows = (batch.obs, batch.action, batch.next_obs, next_action_BA, *backup)
        return self._descend(*rows, repeats=repeats)

    def _descend_eagerly(self, *rows: Tensor, repeats: int) -> Metrics:
        c = self.config
        loss, q_mean, target_mean = critic_loss(
            self.params, self.target, *rows, selection=c.critic_selection, std_factor=c.critic_std_factor
        )
        self.optimizer.descend(loss, repeats=repeats)
        if c.critic_unit_weights:
            project_rows(self.params)
        return {"critic_loss": loss.detach(), "q_mean": q_mean, "target_mean": target_mean}

    def move_target(self) -> None:
        """Move the target critics towards the critics, statistics and all."""
        if self.target is not None:
            move_average(self.target, self.params, self.config.tau)


def critic_loss(
    critics: Params,
    target: Params | None,
    obs_BO: Tensor,
    action_BA: Tensor,
    next_obs_BO: Tensor,
    next_action_BA: Tensor,
    reward_B: Tensor,
    discount_B: Tensor,
    *,
    selection: SelectionName = "min",
    std_factor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of y = reward + discount Z(s', a'), summed over critics, with the means of Q and of y; 0-d each.

    Args:
        critics: of any kind; running statistics are moved in place.
        target: critics of Z; None for `critics` themselves, without a gradient.
        obs_BO: s, [B, O].
        action_BA: a, [B, A].
        next_obs_BO: s', [B, O].
        next_action_BA: a', [B, A].
        reward_B: [B].
        discount_B: [B].
        selection: of one value from the ensemble's; see `select_value`.
        std_factor: of the selection "mean_std".
    """
    now, following = (obs_BO, action_BA), (next_obs_BO, next_action_BA)
    outputs, next_outputs = _outputs(critics, critics if target is None else target, now, following)
    if ATOMS not in critics:
        with torch.no_grad():
            y_B = reward_B + discount_B * select_value(next_outputs.squeeze(2), selection, std_factor)
        q_EB = outputs.squeeze(2)
        loss = (q_EB - y_B).square().mean(dim=1).sum()
        return loss, q_EB.detach().mean(), y_B.mean()
    atoms_K = critics[ATOMS]
    with torch.no_grad():
        next_p_BK = _select_law(torch.softmax(next_outputs, dim=2), atoms_K, selection)
        values_BK = reward_B.unsqueeze(1) + discount_B.unsqueeze(1) * atoms_K
        target_BK = project(atoms_K, values_BK, next_p_BK)
    loss = -(target_BK * torch.log_softmax(outputs, dim=2)).sum(dim=2).mean(dim=1).sum()
    return loss, mean_value(critics, outputs.detach()).mean(), (target_BK @ atoms_K).mean()


def _outputs(
    critics: Params, target: Params, now: tuple[Tensor, Tensor], following: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Outputs at (s, a), which are learnt, and the target's at (s', a'), which are not: [E, B, 1 or K] each."""
    if not uses_batch(critics):
        with torch.no_grad():
            next_outputs = batch_outputs(target, *following)
        return batch_outputs(critics, *now), next_outputs
    # One normalisation for both halves, whose actions come from different policies (CrossQ).
    obs, action = (torch.cat(halves) for halves in zip(now, following, strict=True))
    count = len(now[0])
    both = batch_outputs(critics, obs, action, move_statistics=True)
    if target is critics:
        return both[:, :count], both[:, count:].detach()
    with torch.no_grad():
        next_outputs = batch_outputs(target, obs, action)[:, count:]
    return both[:, :count], next_outputs


def _select_law(p_EBK: Tensor, atoms_K: Tensor, selection: SelectionName) -> Tensor:
    """One distribution from those of the ensemble, [B, K]: of the lowest mean, or the mixture."""
    if selection == "mean":
        return p_EBK.mean(dim=0)
    lowest_B = (p_EBK @ atoms_K).argmin(dim=0)
    index = lowest_B[None, :, None].expand(1, -1, len(atoms_K))
    return p_EBK.gather(0, index).squeeze(0)
