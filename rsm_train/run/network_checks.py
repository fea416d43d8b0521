"""Checks of the networks of a checkpoint: complete, of fitting sizes, and finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rsm_common.errors import CheckpointError, DamagedCheckpointError
from rsm_common.spec import PolicySpec
from rsm_train.model.critic import ATOMS
from rsm_train.model.networks import Params, depth, subset
from rsm_train.model.samplers.common import Sampler
from rsm_train.run.checkpoint_files import NETWORKS_FILE

NORMALIZER = "normalizer"
"""Among the networks: the normalisation of observations."""
VALUE = "value"
"""Among the networks: the unit of the critics' values."""


def check_networks(where: str, networks: Mapping[str, Params], sampler: Sampler, spec: PolicySpec) -> None:
    """Check that everything a policy is made from is there, fits together and is finite.

    Raises:
        DamagedCheckpointError: something does not.
        CheckpointError: numbers are not float32.
    """
    obs, action = spec.observation.size, spec.action.size
    if NORMALIZER in networks:
        _check_normalizer(f"{where}: {NORMALIZER}", networks[NORMALIZER], obs)
    if VALUE in networks:
        _check_unit(f"{where}: {VALUE}", networks[VALUE])
    policy, critic = (networks.get(key, {}) for key in (sampler.acting, "critic"))
    for mlp in sampler.networks(obs, action):
        name = f"{where}: {sampler.acting}.{mlp.prefix}".rstrip(".")
        params = subset(policy, mlp.prefix) if mlp.prefix else policy
        _check_mlp(name, params, mlp.inputs, mlp.outputs, at_least=mlp.at_least)
    if critic or spec.has_q:
        _check_critic(f"{where}: critic", critic, obs + action)
    elif sampler.particles > 1:
        raise DamagedCheckpointError(f"{where}: wanted critics to choose among {sampler.particles} particles")


def _check_critic(where: str, critic: Mapping[str, Tensor], inputs: int) -> None:
    """Check critics of every kind: their layers, their normalisations and their atoms."""
    atoms = critic.get(ATOMS)
    if atoms is not None and (atoms.dim() != 1 or len(atoms) < 2 or not torch.isfinite(atoms).all()):
        raise DamagedCheckpointError(
            f"{where}.{ATOMS}: wanted at least 2 finite numbers, got shape {list(atoms.shape)}"
        )
    _check_mlp(where, critic, inputs, 1 if atoms is None else len(atoms))
    if any(name.startswith("input_norm.") for name in critic):
        _check_batch_norm(where, critic, "input_norm", torch.zeros(1, inputs), ("mean", "var"))
    found = {name.rpartition(".")[0] for name in critic if name.startswith("batch_norms.")}
    hidden = [f"batch_norms.{i}" for i in range(depth(critic) - 1)]
    if found and found != set(hidden):
        odd = ", ".join(sorted(found.symmetric_difference(hidden)))
        raise DamagedCheckpointError(
            f"{where}: wanted batch_norms of every hidden layer or of none, got more or less: {odd}"
        )
    for i, name in enumerate(hidden if found else ()):
        _check_batch_norm(where, critic, name, critic[f"layers.{i}.bias"], ("weight", "bias", "mean", "var"))


def _check_batch_norm(
    where: str, critic: Mapping[str, Tensor], name: str, like: Tensor, parts: tuple[str, ...]
) -> None:
    """Check a normalisation over the batch: its parts have the shape of `like`, and no variance is below 0."""
    _check_norm(f"{where}.{name}", subset(critic, f"{name}."), like, parts)
    if not (critic[f"{name}.var"] >= 0).all():
        raise DamagedCheckpointError(f"{where}.{name}.var: wanted no negative variance in {NETWORKS_FILE}")


def _check_unit(where: str, value: Mapping[str, Tensor]) -> None:
    """Check that the unit of values is one positive number."""
    unit = value.get("unit")
    if unit is None or unit.shape or not 0 < float(unit) < float("inf"):
        got = "none" if unit is None else f"shape {list(unit.shape)}" if unit.shape else float(unit)
        raise DamagedCheckpointError(
            f"{where}.unit: wanted one finite number > 0 in {NETWORKS_FILE}, got {got}"
        )


def _check_normalizer(where: str, scale: Mapping[str, Tensor], obs_size: int) -> None:
    """Check that the normalisation of observations is complete, finite and of their size."""
    if set(scale) != {"mean", "inv_std"}:
        raise DamagedCheckpointError(f"{where}: wanted mean and inv_std, got {', '.join(sorted(scale))}")
    for name, value in scale.items():
        if value.shape != (obs_size,) or value.dtype != torch.float32 or not torch.isfinite(value).all():
            raise DamagedCheckpointError(
                f"{where}.{name}: wanted finite float32 numbers of shape {[obs_size]}, got {value.dtype} of "
                f"shape {list(value.shape)}"
            )


def _check_mlp(
    where: str, params: Mapping[str, Tensor], inputs: int, outputs: int, *, at_least: int = 1
) -> None:
    """Check that layers 0, 1, ... lead from `inputs` to `outputs`, and are finite."""
    count = sum(name.startswith("layers.") and name.endswith(".weight") for name in params)
    for name, value in params.items():
        if value.dtype != torch.float32:
            raise CheckpointError(
                f"{where}.{name}: wanted float32, got {value.dtype}; write the arrays with "
                "rsm_train.foreign.import_weights, which casts them"
            )
    for i in range(max(count, at_least)):
        weight, bias = params.get(f"layers.{i}.weight"), params.get(f"layers.{i}.bias")
        if weight is None or bias is None:
            raise DamagedCheckpointError(f"{where}.layers.{i} is missing in {NETWORKS_FILE}")
        fan_out = outputs if i == count - 1 else weight.shape[-2]
        if weight.shape != (*bias.shape, inputs) or bias.shape[-1:] != (fan_out,):
            raise DamagedCheckpointError(
                f"{where}.layers.{i}: wanted a weight with {inputs} inputs and {fan_out} outputs and a bias "
                f"for it, got {list(weight.shape)} and {list(bias.shape)}"
            )
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise DamagedCheckpointError(f"{where}.layers.{i} holds NaN or Inf")
        _check_norm(f"{where}.norms.{i}", subset(params, f"norms.{i}."), bias)
        inputs = int(fan_out)


def _check_norm(
    where: str, norm: Mapping[str, Tensor], bias: Tensor, parts: tuple[str, ...] = ("weight", "bias")
) -> None:
    """Check that a layer has no normalisation, or a complete, finite one of its size."""
    for name in parts if norm else ():
        if name not in norm or norm[name].shape != bias.shape or not torch.isfinite(norm[name]).all():
            raise DamagedCheckpointError(
                f"{where}.{name}: wanted finite values of shape {list(bias.shape)} in {NETWORKS_FILE}"
            )
