"""Checkpoints: what is written, where, and how it is read back.

    <run>/
        config.json         resolved configuration of the run
        metrics.jsonl       one JSON object per line
        tensorboard/
        lock                held by the process that writes here
        replay/
            000000000000-000000005000.safetensors   transitions 0 to 4,999; see rsm_train.run.replay
        checkpoints/
            step_000010000/
                networks.safetensors   "<network>.<parameter>", float32; see below
                policy.json            PolicySpec: environment, action bounds, T, N
                config.json            resolved configuration, sampler
                state.json             counters
                evaluation.json        returns of its evaluation, written when that has ended
                probe.safetensors      "obs" [P, O] float32: observations the policy met
                training.safetensors   what only --resume needs; see rsm_train.run.loop.Trainer.training_state

A checkpoint directory is complete or absent, and so is a replay file. The newest checkpoints (setting
keep_checkpoints) can be resumed: their transitions are in replay/. The best one, when older, is a policy only:
without training.safetensors.
Order of a save: replay files, checkpoint; then the old checkpoints go, then the replay files that none needs.

Networks: "policy_average" (the policy that is evaluated and exported), "policy", "critic", "critic_target";
SAC has no "policy_average", and its "policy" is evaluated.

With --normalize-observation there is "normalizer" as well: mean and inv_std, [O] each. Every network then takes
clip((s - mean) inv_std, -10, 10) in place of the observation s.

All arrays are float32, and `weight` is [out, in]: a layer computes `weight @ x + bias`. Between two layers
there is mish(x) = x tanh(log(1 + exp(x))), behind the last one nothing. O observation and A action elements,
H width.

Diffusion policy ("policy_average", "policy"), which predicts the noise of a noisy action in [-1, 1]^A:

    time.layers.0.weight  [32, 16]          time.layers.0.bias  [32]     of the features of the step index t
    time.layers.1.weight  [16, 32]          time.layers.1.bias  [16]
    layers.0.weight       [H, O + A + 16]   layers.0.bias       [H]      of [observation, noisy action, time]
    layers.1.weight       [H, H]            layers.1.bias       [H]      and so on, any number of them
    layers.3.weight       [A, H]            layers.3.bias       [A]      the last one

The 16 features of t in {0, ..., T - 1}, 0 being the least noisy: f_i = 10000^(-i / 8) for i = 0 to 7, and
[sin(t f_0), ..., sin(t f_7), cos(t f_0), ..., cos(t f_7)] / 4.

Critics ("critic", "critic_target"), E of them stacked, of [observation, action in [-1, 1]]:

    layers.0.weight  [E, H, O + A]          layers.0.bias  [E, H]        and so on
    layers.3.weight  [E, 1, H]              layers.3.bias  [E, 1]
    norms.i.weight   [E, H]                 norms.i.bias   [E, H]        LayerNorm (epsilon 1e-5) of layer i's
                                                                         output, before its mish; optional

Gaussian policy of SAC ("policy"): `layers.i` as above, from the observation to [mean, log standard deviation].

Weights learnt elsewhere become a checkpoint by `rsm_train.foreign.import_weights`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsm_common import atomic
from rsm_common.errors import BundleError, CheckpointError
from rsm_common.spec import PolicySpec
from rsm_train.model.networks import Params, subset
from rsm_train.model.normalizer import ObservationScale
from rsm_train.model.samplers import Sampler, read_sampler, sampler_settings
from rsm_train.policy import TorchPolicy, action_scale

SCHEMA_VERSION = 1
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_DIR = "checkpoints"
NORMALIZER = "normalizer"
"""Among the networks: the normalisation of observations."""
_NETWORKS_FILE = "networks.safetensors"
_SPEC_FILE = "policy.json"
_STATE_FILE = "state.json"
_EVALUATION_FILE = "evaluation.json"
_PROBE_FILE = "probe.safetensors"
_TRAINING_FILE = "training.safetensors"
_NAME = re.compile(r"step_(\d{9,})")
_AGAIN = "train again, or choose another checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, on the CPU."""

    path: Path
    spec: PolicySpec
    sampler: Sampler
    networks: dict[str, Params]
    state: Mapping[str, Any]
    """"step", "updates", "evaluation" (None if it was not evaluated), "training" if it could be resumed."""
    probe_obs: Tensor
    """[P, O] observations that the policy met in training."""
    config: Mapping[str, Any]
    training: Mapping[str, Tensor] | None = None
    """What resuming the run needs beside the networks; None in what `load_checkpoint` returns."""

    def policy(self) -> TorchPolicy:
        """The policy that the checkpoint holds: the averaged weights, best of N by the critics."""
        policy, critics = self.networks[self.sampler.acting], self.networks.get("critic", {})
        normalizer = self.networks.get(NORMALIZER)
        obs_scale = None if normalizer is None else ObservationScale(**normalizer).to(torch.device("cpu"))
        weights = self.sampler.prepare(policy, critics, action_scale(self.spec), obs_scale)
        return TorchPolicy(self.spec, weights)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run_dir / CHECKPOINTS_DIR / f"step_{step:09d}"


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below a run directory and return its path."""
    path = checkpoint_path(run_dir, checkpoint.state["step"])
    write_checkpoint(path, checkpoint)
    return path


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to a new directory.

    Raises:
        FileExistsError: the directory exists already and is not empty.
    """
    tensors = {
        f"{network}.{name}": value.detach().cpu().contiguous()
        for network, params in checkpoint.networks.items()
        for name, value in params.items()
    }
    config = dict(checkpoint.config) | {
        "schema_version": SCHEMA_VERSION,
        "sampler": sampler_settings(checkpoint.sampler),
    }
    with atomic.new_directory(path) as directory:
        save_file(tensors, directory / _NETWORKS_FILE)
        if checkpoint.training is not None:
            training = {name: value.detach().cpu().clone() for name, value in checkpoint.training.items()}
            save_file(training, directory / _TRAINING_FILE)
        save_file({"obs": checkpoint.probe_obs.cpu().contiguous()}, directory / _PROBE_FILE)
        (directory / _SPEC_FILE).write_text(checkpoint.spec.to_json())
        _write_json(directory / CONFIG_FILE, config)
        _write_json(directory / _STATE_FILE, checkpoint.state)


def record_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Add the evaluation of a checkpoint that was written before it was evaluated.

    Args:
        path: the checkpoint.
        evaluation: "mean" and "std" of the returns, "episodes", "seed".
    """
    atomic.write_file(
        path / _EVALUATION_FILE, (json.dumps(evaluation, indent=2, allow_nan=False) + "\n").encode()
    )


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    directory = run_dir / CHECKPOINTS_DIR
    if not directory.is_dir():
        return []
    return sorted((entry for entry in directory.iterdir() if _NAME.fullmatch(entry.name)), key=_step)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the best evaluated one of a run (the newest of equals).

    Raises:
        CheckpointError: neither a checkpoint nor a run with one.
    """
    if (path / _NETWORKS_FILE).is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        found = "a directory without checkpoints" if path.is_dir() else "no such directory"
        raise CheckpointError(
            f"wanted a run or a checkpoint of rsm-train at {str(path)!r}, got {found}; "
            "train one with rsm-train --out"
        )
    return max(checkpoints, key=lambda entry: (_score(entry), _step(entry)))


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, which becomes a policy only when older."""
    checkpoints = list_checkpoints(run_dir)
    best = find_checkpoint(run_dir) if checkpoints else None
    for path in checkpoints[:-keep]:
        if path == best:
            # Its transitions go, and it is refused without this file: see `load_training`.
            (path / _TRAINING_FILE).unlink(missing_ok=True)
        else:
            # Out of sight first: half a checkpoint must not look like one.
            hidden = path.rename(path.with_name(f".{path.name}.pruned"))
            shutil.rmtree(hidden)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the best one of a run.

    Raises:
        CheckpointError: missing, damaged, or of another layout.
    """
    directory = find_checkpoint(Path(path))
    config = _read_json(directory / CONFIG_FILE)
    _check_schema(directory, config.get("schema_version"))
    try:
        spec = PolicySpec.from_json((directory / _SPEC_FILE).read_bytes())
        tensors = load_file(directory / _NETWORKS_FILE)
        probe_obs = load_file(directory / _PROBE_FILE)["obs"]
        sampler = read_sampler(config["sampler"])
        spec = dataclasses.replace(spec, sampler=sampler.name)  # older checkpoints of SAC say ddpm
    except (OSError, SafetensorError, BundleError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {error}; {_AGAIN}") from None
    networks = {
        name: subset(tensors, f"{name}.") for name in dict.fromkeys(key.split(".")[0] for key in tensors)
    }
    state = read_state(directory)
    spec = dataclasses.replace(spec, evaluation=state.get("evaluation"))
    checkpoint = Checkpoint(directory, spec, sampler, networks, state, probe_obs, config)
    _check_content(checkpoint)
    return checkpoint


def load_training(path: Path) -> Checkpoint:
    """Read a checkpoint together with what resuming needs.

    Raises:
        CheckpointError: see `load_checkpoint`; or it holds a policy only.
    """
    checkpoint = load_checkpoint(path)
    if not (path / _TRAINING_FILE).is_file() or "training" not in checkpoint.state:
        raise CheckpointError(
            f"checkpoint {path} holds a policy but not the state of its training, so the run cannot be "
            "resumed; export or evaluate it, or train again into another directory"
        )
    try:
        training = load_file(path / _TRAINING_FILE)
    except (OSError, SafetensorError) as error:
        raise damaged_training(path, error) from None
    return dataclasses.replace(checkpoint, training=training)


def damaged_training(path: Path, error: Exception) -> CheckpointError:
    """What to say of a checkpoint whose training state cannot be used."""
    return CheckpointError(
        f"checkpoint {path}: {_TRAINING_FILE} is damaged or of another version ({error}); delete this "
        "checkpoint to resume from the one before it"
    )


def read_state(path: Path) -> dict[str, Any]:
    """The counters and the evaluation of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    state = _read_json(path / _STATE_FILE)
    if (path / _EVALUATION_FILE).is_file():
        state["evaluation"] = _read_json(path / _EVALUATION_FILE)
    return state


def load_torch_policy(path: str | Path) -> TorchPolicy:
    """The policy of a checkpoint, or of the best checkpoint of a run.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    return load_checkpoint(path).policy()


def _check_schema(directory: Path, found: object) -> None:
    # By type too: to Python, true and 1.0 are 1.
    if type(found) is not int or found != SCHEMA_VERSION:
        newer = type(found) is int and found > SCHEMA_VERSION
        raise CheckpointError(
            f"checkpoint {directory}: wanted schema version {SCHEMA_VERSION} in {CONFIG_FILE}, got {found!r}; "
            + ("install a newer rsm-toolkit" if newer else _AGAIN)
        )


def _check_content(checkpoint: Checkpoint) -> None:
    """Check that everything a policy is made from is there, fits together and is finite."""
    spec, sampler, where = checkpoint.spec, checkpoint.sampler, f"checkpoint {checkpoint.path}"
    try:
        sampler.check()
    except ValueError as error:
        raise CheckpointError(f"{where}: {CONFIG_FILE}: {error}; {_AGAIN}") from None
    if (sampler.steps, sampler.particles) != (spec.steps, spec.particles):
        raise CheckpointError(
            f"{where}: {CONFIG_FILE} and {_SPEC_FILE} disagree on steps and particles; {_AGAIN}"
        )
    probe = checkpoint.probe_obs
    obs, action = spec.observation.size, spec.action.size
    if probe.shape[1:] != (obs,) or len(probe) < 1 or not torch.isfinite(probe).all():
        raise CheckpointError(
            f"{where}: wanted finite observations [P, {obs}] in {_PROBE_FILE}, got shape "
            f"{list(probe.shape)}; {_AGAIN}"
        )
    if NORMALIZER in checkpoint.networks:
        _check_normalizer(f"{where}: {NORMALIZER}", checkpoint.networks[NORMALIZER], obs)
    policy, critic = (checkpoint.networks.get(key, {}) for key in (sampler.acting, "critic"))
    for mlp in sampler.networks(obs, action):
        name = f"{where}: {sampler.acting}.{mlp.prefix}".rstrip(".")
        params = subset(policy, mlp.prefix) if mlp.prefix else policy
        _check_mlp(name, params, mlp.inputs, mlp.outputs, at_least=mlp.at_least)
    if critic or spec.has_q:
        _check_mlp(f"{where}: critic", critic, obs + action, 1)
    elif sampler.particles > 1:
        raise CheckpointError(
            f"{where}: wanted critics to choose among {sampler.particles} particles; {_AGAIN}"
        )


def _check_normalizer(where: str, scale: Mapping[str, Tensor], obs_size: int) -> None:
    """Check that the normalisation of observations is complete, finite and of their size."""
    if set(scale) != {"mean", "inv_std"}:
        raise CheckpointError(f"{where}: wanted mean and inv_std, got {', '.join(sorted(scale))}; {_AGAIN}")
    for name, value in scale.items():
        if value.shape != (obs_size,) or value.dtype != torch.float32 or not torch.isfinite(value).all():
            raise CheckpointError(
                f"{where}.{name}: wanted finite float32 numbers of shape {[obs_size]}, got {value.dtype} of "
                f"shape {list(value.shape)}; {_AGAIN}"
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
            raise CheckpointError(f"{where}.layers.{i} is missing in {_NETWORKS_FILE}; {_AGAIN}")
        fan_out = outputs if i == count - 1 else weight.shape[-2]
        if weight.shape != (*bias.shape, inputs) or bias.shape[-1:] != (fan_out,):
            raise CheckpointError(
                f"{where}.layers.{i}: wanted a weight with {inputs} inputs and {fan_out} outputs and a bias "
                f"for it, got {list(weight.shape)} and {list(bias.shape)}; {_AGAIN}"
            )
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise CheckpointError(f"{where}.layers.{i} holds NaN or Inf; {_AGAIN}")
        _check_norm(f"{where}.norms.{i}", subset(params, f"norms.{i}."), bias)
        inputs = int(fan_out)


def _check_norm(where: str, norm: Mapping[str, Tensor], bias: Tensor) -> None:
    """Check that a layer has no normalisation, or a complete, finite one of its size."""
    for name in ("weight", "bias") if norm else ():
        if name not in norm or norm[name].shape != bias.shape or not torch.isfinite(norm[name]).all():
            raise CheckpointError(
                f"{where}.{name}: wanted finite values of shape {list(bias.shape)} in {_NETWORKS_FILE}; "
                f"{_AGAIN}"
            )


def _step(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def _score(checkpoint: Path) -> float:
    """The mean return of a checkpoint's evaluation; the lowest if it has none that can be read."""
    try:
        return float(read_state(checkpoint)["evaluation"]["mean"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return float("-inf")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path.parent}: cannot read {path.name} ({error}); {_AGAIN}"
        ) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is not a JSON object; {_AGAIN}")
    return data
