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
                sha256.json            size and sha256 of these files, and of the replay files it needs
                training.safetensors   what only --resume needs; see rsm_train.run.learner.Learner.state

A checkpoint directory is complete or absent, and so is a replay file. When `--resume` goes on from an older
checkpoint, it renames the damaged one to damaged_step_.... The newest checkpoints (setting
keep_checkpoints) can be resumed: their transitions are in replay/. The best one, when older, is a policy only:
without training.safetensors.
Order of a save: replay files, checkpoint; then the old checkpoints go, then the replay files that none needs.

Networks: "policy_average" (the policy that is evaluated and exported), "policy", "critic", "critic_target";
SAC has no "policy_average", and its "policy" is evaluated.

"value" has unit, a number: the environment's rewards in one unit of the critics' values. The exported q is
their value times the unit. Older checkpoints lack it: their q is in the critics' own unit.

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

Critics ("critic" and, with critic_target average, "critic_target"), E of them stacked, of [observation, action
in [-1, 1]]:

    layers.0.weight  [E, H, O + A]          layers.0.bias  [E, H]        and so on
    layers.3.weight  [E, 1, H]              layers.3.bias  [E, 1]
    norms.i.weight   [E, H]                 norms.i.bias   [E, H]        LayerNorm (epsilon 1e-5) of layer i's
                                                                         output, before its mish; optional
    batch_norms.i.{weight,bias,mean,var}   [E, H]                        BatchNorm (epsilon 1e-3); optional
    input_norm.{mean,var}                  [1, O + A]                    BatchNorm of the input; optional
    atoms                                  [K]                           optional: the last layer has K outputs,
                                                                         and Q is softmax(outputs) @ atoms

Gaussian policy of SAC ("policy"): `layers.i` as above, from the observation to [mean, log standard deviation].

Weights learnt elsewhere become a checkpoint by `rsm_train.foreign.import_weights`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rsm_common import atomic
from rsm_common.errors import BundleError, CheckpointError, DamagedCheckpointError
from rsm_common.manifest import FileRecord
from rsm_common.spec import PolicySpec
from rsm_train.model.critic import fold
from rsm_train.model.networks import Params, subset
from rsm_train.model.normalizer import ObservationScale
from rsm_train.model.samplers.common import Sampler
from rsm_train.model.samplers.registry import read_sampler, sampler_settings
from rsm_train.policy import TorchPolicy, action_scale
from rsm_train.run.checkpoint_files import (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    EVALUATION_FILE,
    NETWORKS_FILE,
    PROBE_FILE,
    SPEC_FILE,
    STATE_FILE,
    TRAINING_FILE,
    CheckpointFiles,
    add_file,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    write_files,
)
from rsm_train.run.network_checks import NORMALIZER, VALUE, check_networks

SCHEMA_VERSION = 1


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
    replay_records: Mapping[str, FileRecord] = field(default_factory=dict)
    """Size and sha256 of the replay files that resuming needs, by file name; empty if none were recorded."""

    def policy(self) -> TorchPolicy:
        """The policy that the checkpoint holds: the averaged weights, best of N by the critics."""
        policy, critics = self.networks[self.sampler.acting], self.networks.get("critic", {})
        normalizer = self.networks.get(NORMALIZER)
        obs_scale = None if normalizer is None else ObservationScale(**normalizer).to(torch.device("cpu"))
        critics = fold(critics, self.networks.get(VALUE, {}).get("unit")) if critics else {}
        weights = self.sampler.prepare(policy, critics, action_scale(self.spec), obs_scale)
        return TorchPolicy(self.spec, weights)


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
    content = {
        NETWORKS_FILE: save(tensors),
        PROBE_FILE: save({"obs": checkpoint.probe_obs.cpu().contiguous()}),
        SPEC_FILE: checkpoint.spec.to_json().encode(),
        CONFIG_FILE: _json(config),
        STATE_FILE: _json(checkpoint.state),
    }
    if checkpoint.training is not None:
        training = {name: value.detach().cpu().clone() for name, value in checkpoint.training.items()}
        content[TRAINING_FILE] = save(training)
    with atomic.new_directory(path) as directory:
        write_files(directory, content, checkpoint.replay_records)


def record_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Add the evaluation of a checkpoint that was written before it was evaluated.

    Args:
        path: the checkpoint.
        evaluation: "mean" and "std" of the returns, "episodes", "seed".
    """
    add_file(path, EVALUATION_FILE, (json.dumps(evaluation, indent=2, allow_nan=False) + "\n").encode())


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the best one of a run.

    Raises:
        CheckpointError: missing, or of another version.
        DamagedCheckpointError: damaged; the sentence names another checkpoint of the run that is sound.
    """
    directory = find_checkpoint(Path(path))
    try:
        return _load(CheckpointFiles(directory))
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{error}; {_instead_of(directory)}") from None


def _load(files: CheckpointFiles) -> Checkpoint:
    config = files.read_json(CONFIG_FILE)
    _check_schema(files.path, config.get("schema_version"))
    tensors = files.read_tensors(NETWORKS_FILE)
    state = files.read_state()
    try:
        spec = PolicySpec.from_json(files.read(SPEC_FILE))
        probe_obs = files.read_tensors(PROBE_FILE)["obs"]
        sampler = read_sampler(config["sampler"])
        spec = dataclasses.replace(spec, sampler=sampler.name)  # older checkpoints of SAC say ddpm
    except (BundleError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"checkpoint {files.path} is damaged: {error}") from None
    networks = {
        name: subset(tensors, f"{name}.") for name in dict.fromkeys(key.split(".")[0] for key in tensors)
    }
    spec = dataclasses.replace(spec, evaluation=state.get("evaluation"))
    checkpoint = Checkpoint(files.path, spec, sampler, networks, state, probe_obs, config)
    _check_content(checkpoint)
    files.warn_if_unverified()
    return checkpoint


def _instead_of(directory: Path) -> str:
    """Name the newest sound checkpoint of the same run, or say that there is none."""
    siblings = list_checkpoints(directory.parent.parent) if directory.parent.name == CHECKPOINTS_DIR else []
    for other in reversed(siblings):
        if other.name != directory.name and is_sound(other):
            return f"name another checkpoint of the run, such as {other}"
    return "copy it again from where it was written, or train again"


def is_sound(path: Path) -> bool:
    """Return whether the policy of a checkpoint can be loaded."""
    try:
        _load(CheckpointFiles(path))
    except CheckpointError:
        return False
    return True


def load_training(path: Path) -> Checkpoint:
    """Read a checkpoint together with what resuming needs.

    Raises:
        CheckpointError: of another version; or it holds a policy only.
        DamagedCheckpointError: a file is missing or damaged.
    """
    files = CheckpointFiles(path)
    checkpoint = _load(files)
    if not (path / TRAINING_FILE).is_file() or "training" not in checkpoint.state:
        raise CheckpointError(f"checkpoint {path} holds a policy but not the state of its training")
    _check_counters(checkpoint)
    training = files.read_tensors(TRAINING_FILE)
    return dataclasses.replace(checkpoint, training=training, replay_records=files.replay_records)


def _check_counters(checkpoint: Checkpoint) -> None:
    """Check the counters that resuming needs; the trainer checks the others."""
    try:
        float(checkpoint.state["training"]["wall_s"])
        valid = type(checkpoint.state["step"]) is int
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise DamagedCheckpointError(
            f"checkpoint {checkpoint.path} is damaged: {STATE_FILE} lacks its counters"
        )


def damaged_training(path: Path, error: Exception) -> DamagedCheckpointError:
    """Make the error for a checkpoint whose training state cannot be used."""
    return DamagedCheckpointError(
        f"checkpoint {path}: {TRAINING_FILE} is damaged or of another version ({error})"
    )


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
            + ("install a newer rsm-toolkit" if newer else "train again with this version")
        )


def _check_content(checkpoint: Checkpoint) -> None:
    """Check that everything a policy is made from is there, fits together and is finite."""
    spec, sampler, where = checkpoint.spec, checkpoint.sampler, f"checkpoint {checkpoint.path}"
    try:
        sampler.check()
    except ValueError as error:
        raise DamagedCheckpointError(f"{where}: {CONFIG_FILE}: {error}") from None
    if (sampler.steps, sampler.particles) != (spec.steps, spec.particles):
        raise DamagedCheckpointError(f"{where}: {CONFIG_FILE} and {SPEC_FILE} disagree on steps and particles")
    probe = checkpoint.probe_obs
    obs = spec.observation.size
    if probe.shape[1:] != (obs,) or len(probe) < 1 or not torch.isfinite(probe).all():
        raise DamagedCheckpointError(
            f"{where}: wanted finite observations [P, {obs}] in {PROBE_FILE}, got shape {list(probe.shape)}"
        )
    check_networks(where, checkpoint.networks, sampler, spec)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
