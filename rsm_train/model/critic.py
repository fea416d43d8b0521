"""The critics: an ensemble of values of actions, how they become one value, and the choice among particles.

A critic is composed: hidden layers that are plain, or normalised over the layer (LayerNorm) or over the batch
(BatchNorm); an input that is normalised or not; rows of weights that are kept at norm 1 or not; and a value
that is one number or a distribution over atoms. While it learns, a critic normalises over the batch at hand.
Everywhere else it is `fold`ed: the running statistics become part of its weights, exactly, and what is left
is an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rsm_train.model.diffusion import SelectionName
from rsm_train.model.networks import Params, activate, depth, init_mlp, linear, mlp_tail

CriticNorm = Literal["none", "layer", "batch"]

BATCH_NORM_RATE = 0.01
"""Step of the running statistics towards those of a batch; 1 - momentum of 0.99 (Bhatt et al. 2024, CrossQ)."""
BATCH_NORM_EPS = 1e-3
"""Added to the variance of a normalisation over the batch."""

ATOMS = "atoms"
_STATISTICS = ("mean", "var")


def init_critics(
    obs_size: int,
    action_size: int,
    hidden: Sequence[int],
    generator: torch.Generator,
    *,
    members: int = 2,
    norm: CriticNorm = "none",
    input_norm: bool = False,
    atoms: Tensor | None = None,
) -> Params:
    """E = `members` stacked MLPs over [s, a]; every tensor but `atoms` and `input_norm` has a leading E axis.

    Args:
        obs_size: O.
        action_size: A.
        hidden: width H of each hidden layer.
        generator: draws the weights.
        members: E.
        norm: of the hidden layers before their activations: `norms.i.{weight,bias}` [E, H] over the layer, or
            `batch_norms.i.{weight,bias,mean,var}` [E, H] over the batch.
        input_norm: normalise [s, a] over the batch: `input_norm.{mean,var}` [1, O + A].
        atoms: [K], values of a distribution; the last layer then has K outputs, its logits, instead of one.
    """
    outputs = 1 if atoms is None else len(atoms)
    params = init_mlp([obs_size + action_size, *hidden, outputs], generator, ensemble=members)
    if input_norm:
        params["input_norm.mean"] = torch.zeros(1, obs_size + action_size)
        params["input_norm.var"] = torch.ones(1, obs_size + action_size)
    for i, width in enumerate(hidden if norm != "none" else ()):
        name = "norms" if norm == "layer" else "batch_norms"
        params[f"{name}.{i}.weight"] = torch.ones(members, width)
        params[f"{name}.{i}.bias"] = torch.zeros(members, width)
        if norm == "batch":
            params[f"{name}.{i}.mean"] = torch.zeros(members, width)
            params[f"{name}.{i}.var"] = torch.ones(members, width)
    if atoms is not None:
        params[ATOMS] = atoms.clone()
    return params


def is_learnt(name: str) -> bool:
    """Whether an optimiser moves this parameter: statistics and atoms are none of its own."""
    return name != ATOMS and not name.endswith(_STATISTICS)


def uses_batch(critics: Mapping[str, Tensor]) -> bool:
    """Whether the critics normalise over the batch while they learn."""
    return "input_norm.mean" in critics or "batch_norms.0.mean" in critics


def batch_outputs(
    critics: Mapping[str, Tensor], obs_RO: Tensor, action_RA: Tensor, *, move_statistics: bool = False
) -> Tensor:
    """Last layer's outputs, normalised over these R rows: values [E, R, 1], or logits [E, R, K].

    Args:
        critics: what `init_critics` made.
        obs_RO: [R, O].
        action_RA: [R, A].
        move_statistics: move the running statistics, in place, towards those of the rows.
    """
    members = len(critics["layers.0.weight"])
    x = torch.cat([obs_RO, action_RA], dim=1)
    if "input_norm.mean" in critics:
        x = _normalize(x.unsqueeze(0), critics, "input_norm", move_statistics)
    x = x.expand(members, -1, -1)
    last = depth(critics) - 1
    for i in range(last):
        x = linear(critics, i, x)
        if f"batch_norms.{i}.mean" in critics:
            x = _normalize(x, critics, f"batch_norms.{i}", move_statistics)
        x = activate(critics, i, x)
    return linear(critics, last, x)


def _normalize(x_ERH: Tensor, critics: Mapping[str, Tensor], name: str, move: bool) -> Tensor:
    """BatchNorm over the rows of each member: [E, R, H] -> [E, R, H]."""
    members, rows, width = x_ERH.shape
    mean, var = (critics[f"{name}.{part}"] for part in _STATISTICS)
    weight, bias = (critics.get(f"{name}.{part}") for part in ("weight", "bias"))
    # torch's kernel takes one batch of features: those of all members, side by side.
    flat = x_ERH.transpose(0, 1).reshape(rows, members * width)
    normal = torch.nn.functional.batch_norm(
        flat,
        mean.reshape(-1) if move else None,
        var.reshape(-1) if move else None,
        None if weight is None else weight.reshape(-1),
        None if bias is None else bias.reshape(-1),
        training=True,
        momentum=BATCH_NORM_RATE,
        eps=BATCH_NORM_EPS,
    )
    return normal.view(rows, members, width).transpose(0, 1)


def project_rows(critics: Mapping[str, Tensor]) -> None:
    """Scale every row of every weight to norm 1, in place (of hidden layers and of the last one)."""
    with torch.no_grad():
        for name, weight in critics.items():
            if name.startswith("layers.") and name.endswith(".weight"):
                weight.div_(torch.linalg.vector_norm(weight, dim=2, keepdim=True).clamp_min(1e-12))


@torch.no_grad()
def fold(critics: Mapping[str, Tensor], unit: Tensor | None = None) -> Params:
    """The same critics with their running statistics folded into their weights; with a unit, values times it.

    What is left are `layers`, `norms` and `atoms`: what `q_values` and the exported graph take.
    """
    folded = {name: value for name, value in critics.items() if name.startswith(("layers.", "norms."))}
    if "input_norm.mean" in critics:
        scale, shift = _affine(critics, "input_norm")
        weight = folded["layers.0.weight"]
        folded["layers.0.bias"] = folded["layers.0.bias"] + (weight @ shift.unsqueeze(2)).squeeze(2)
        folded["layers.0.weight"] = weight * scale.unsqueeze(1)
    last = depth(critics) - 1
    for i in range(last):
        if f"batch_norms.{i}.mean" in critics:
            scale, shift = _affine(critics, f"batch_norms.{i}")
            folded[f"layers.{i}.weight"] = folded[f"layers.{i}.weight"] * scale.unsqueeze(2)
            folded[f"layers.{i}.bias"] = folded[f"layers.{i}.bias"] * scale + shift
    if ATOMS in critics:
        folded[ATOMS] = critics[ATOMS] if unit is None else critics[ATOMS] * unit
    elif unit is not None:
        for part in ("weight", "bias"):
            folded[f"layers.{last}.{part}"] = folded[f"layers.{last}.{part}"] * unit
    return folded


def _affine(critics: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """The normalisation by running statistics as scale * x + shift."""
    scale = (critics[f"{name}.var"] + BATCH_NORM_EPS).rsqrt()
    if f"{name}.weight" in critics:
        scale = scale * critics[f"{name}.weight"]
    shift = -critics[f"{name}.mean"] * scale
    return scale, shift + critics[f"{name}.bias"] if f"{name}.bias" in critics else shift


def plain_outputs(critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
    """Last layer's outputs of folded critics for every particle: [E, B, N, 1], or logits [E, B, N, K].

    The observation's part of the first layer is computed once per state, not once per particle.
    """
    weight, bias = critics["layers.0.weight"], critics["layers.0.bias"]
    members, (rows, particles, action_size) = len(weight), action_BNA.shape
    obs_weight, action_weight = torch.split(weight, [obs_BO.shape[1], action_size], dim=2)
    obs_part = torch.baddbmm(bias.unsqueeze(1), obs_BO.expand(members, -1, -1), obs_weight.mT)  # [E, B, H]
    flat_actions = action_BNA.reshape(1, rows * particles, action_size).expand(members, -1, -1)
    action_part = torch.bmm(flat_actions, action_weight.mT).view(members, rows, particles, -1)
    first = (obs_part.unsqueeze(2) + action_part).view(members, rows * particles, -1)
    return mlp_tail(critics, first).view(members, rows, particles, -1)


def mean_value(critics: Mapping[str, Tensor], outputs: Tensor) -> Tensor:
    """The value that outputs of the last layer mean: [..., 1] or logits [..., K] -> [...]."""
    if ATOMS in critics:
        return torch.softmax(outputs, dim=-1) @ critics[ATOMS]
    return outputs.squeeze(-1)


def q_values(critics: Mapping[str, Tensor], obs_BO: Tensor, action_BNA: Tensor) -> Tensor:
    """Q_i(s, a) of every folded critic, particle and state: [E, B, N] in the dtype of the last layer."""
    return mean_value(critics, plain_outputs(critics, obs_BO, action_BNA))


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
