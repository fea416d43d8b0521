"""Import of weights from another program, as a checkpoint that is exported and served like our own.

Arrays go in by name; the names and shapes stand at the top of `rsm_train.run.checkpoint`. An array that
does not fit is refused with the wanted and the given shape. docs/howto/foreign-weights.md has an example.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rsm_common.errors import BundleError, CheckpointError
from rsm_common.spec import BoxSpec, PolicySpec
from rsm_eval.env_ids import unknown_env
from rsm_train.model.diffusion import ScheduleName, SelectionName, make_schedule
from rsm_train.model.networks import TIME_EMBEDDING_SIZE, Params
from rsm_train.model.samplers.diffusion import DiffusionSampler
from rsm_train.run.checkpoint import Checkpoint, write_checkpoint

logger = logging.getLogger(__name__)

Arrays = Mapping[str, ArrayLike]

PROBE_ROWS = 256
_MISTYPED = 0.85
"""Similarity of ids from which an unknown one is taken for a known one with a mistake."""
_NAME = re.compile(r"(layers|norms)\.(0|[1-9]\d?)\.(weight|bias)")
_BATCH_NORM = re.compile(r"(running_|\b)(mean|var)$")


def import_weights(
    directory: str | Path,
    *,
    policy: Arrays,
    critics: Sequence[Arrays] | None,
    env_id: str,
    obs_size: int,
    action_low: Sequence[float],
    action_high: Sequence[float],
    steps: int,
    particles: int,
    schedule: ScheduleName = "cosine",
    prior_std: float = 1.0,
    selection: SelectionName = "min",
    name: str | None = None,
    control_dt_s: float | None = None,
    observations: ArrayLike | None = None,
) -> Path:
    """Write networks as a checkpoint that rsm-export and rsm-eval take; returns its directory.

    Args:
        directory: to be made.
        policy: the noise network: `layers.i.{weight,bias}` and `time.layers.{0,1}.{weight,bias}`.
        critics: one mapping for each critic: `layers.i.{weight,bias}`, all of the same shapes; None for a
            policy of one particle, which needs no choice.
        env_id: the Gymnasium id of the environment that the policy acts in.
        obs_size: O, elements of an observation.
        action_low: [A] lower bounds, environment units, which -1 stands for.
        action_high: [A] upper bounds, which 1 stands for.
        steps: T, denoising steps of the schedule that the network was trained with.
        particles: N, actions that are sampled and of which the critics choose the best.
        schedule: "cosine" or "linear" (see `rsm_train.model.diffusion.make_schedule`).
        prior_std: standard deviation of the initial latent.
        selection: how several critics become one value: "min" or "mean".
        name: of the policy, under which it is exported and served; by default that of the directory.
        control_dt_s: seconds between two actions, > 0, for clients to read; None if unknown.
        observations: [P, O] from real episodes, on which the export is checked; by default standard normal
            ones, on which the check says less.

    Raises:
        CheckpointError: an array or a setting that does not fit, or the directory cannot be written.
    """
    directory = Path(directory)
    _check_env_id(env_id)
    obs_size, steps, particles = (
        _count(key, value)
        for key, value in (("obs_size", obs_size), ("steps", steps), ("particles", particles))
    )
    sampler = _sampler(DiffusionSampler(schedule, steps, particles, prior_std, selection))
    spec = _spec(name or directory.name, env_id, obs_size, action_low, action_high, sampler, control_dt_s)
    action_size = spec.action.size
    networks = {"policy_average": _policy(policy, obs_size, action_size)}
    if critics is not None:
        networks["critic"] = _critics(critics, obs_size, action_size)
    elif particles == 1:
        spec = dataclasses.replace(spec, has_q=False)
    else:
        raise CheckpointError(f"wanted critics, which choose among {particles} particles, got None")
    state = {"step": 0, "updates": 0, "evaluation": None}
    probe = torch.from_numpy(_observations(observations, obs_size))
    try:
        write_checkpoint(directory, Checkpoint(directory, spec, sampler, networks, state, probe, {}))
    except OSError as error:
        raise CheckpointError(
            f"cannot write a checkpoint to {str(directory)!r}: {error.strerror}; choose a new directory"
        ) from None
    return directory


def _check_env_id(env_id: str) -> None:
    """Refuse an id that is nearly one of Gymnasium's; warn of another unknown one, which may be a robot's."""
    if not isinstance(env_id, str):
        raise CheckpointError(f"wanted text as env_id, got {env_id!r:.60}")
    found = unknown_env(env_id, _MISTYPED)
    if found is None:
        return
    if "did you mean" in found:
        raise CheckpointError(f"{found} Correct env_id")
    logger.warning("%s; the policy can be exported and served, but not evaluated there", found)


def _count(key: str, value: object) -> int:
    """A whole number >= 1, of Python or of numpy."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]  # what has no index raises
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise CheckpointError(f"wanted a whole number >= 1 as {key}, got {value!r}")
    return count


def _sampler(sampler: DiffusionSampler) -> DiffusionSampler:
    try:
        make_schedule(sampler.schedule, sampler.steps)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not (isinstance(sampler.prior_std, int | float) and 0 < sampler.prior_std < math.inf):
        raise CheckpointError(f"wanted a number > 0 as prior_std, got {sampler.prior_std!r}")
    if sampler.selection not in ("min", "mean"):
        raise CheckpointError(f"wanted selection 'min' or 'mean', got {sampler.selection!r}")
    return sampler


def _spec(
    name: str,
    env_id: str,
    obs_size: int,
    action_low: Sequence[float],
    action_high: Sequence[float],
    sampler: DiffusionSampler,
    control_dt_s: float | None,
) -> PolicySpec:
    try:
        low, high = ([float(bound) for bound in bounds] for bounds in (action_low, action_high))
    except (TypeError, ValueError):
        raise CheckpointError(
            f"wanted one number per action as bounds, got {action_low!r:.60} and {action_high!r:.60}"
        ) from None
    if len(low) != len(high):
        raise CheckpointError(f"wanted as many lower as upper action bounds, got {len(low)} and {len(high)}")
    try:
        return PolicySpec(
            name=name,
            algorithm="foreign",
            env_id=env_id,
            observation=BoxSpec(_names("obs", obs_size), (None,) * obs_size, (None,) * obs_size),
            action=BoxSpec(_names("action", len(low)), tuple(low), tuple(high)),
            steps=sampler.steps,
            particles=sampler.particles,
            control_dt_s=control_dt_s,
            provenance={"run": name, "step": 0},
        )
    except BundleError as error:
        raise CheckpointError(str(error)) from None


def _names(kind: str, size: int) -> tuple[str, ...]:
    return tuple(f"{kind}[{index}]" for index in range(size))


def _policy(arrays: Arrays, obs_size: int, action_size: int) -> Params:
    _check_names("policy: ", arrays, "", "time.")
    time = {name: value for name, value in arrays.items() if name.startswith("time.")}
    body = {name: value for name, value in arrays.items() if name not in time}
    embedding = TIME_EMBEDDING_SIZE
    inputs = f"{obs_size} observation + {action_size} noisy action + {embedding} time embedding"
    made_time = _mlp(
        "policy: ", time, embedding, f"{embedding} features of the step", embedding, prefix="time."
    )
    made_body = _mlp("policy: ", body, obs_size + action_size + embedding, inputs, action_size)
    made = made_time | made_body
    if len(made_time) != 4:
        raise CheckpointError(f"policy: wanted 2 layers below time, got {len(made_time) // 2}")
    if any("norms." in name for name in made):
        raise CheckpointError("policy: wanted no norms, which only critics may have, got some")
    return {name: _tensor(value) for name, value in made.items()}


def _critics(critics: Sequence[Arrays], obs_size: int, action_size: int) -> Params:
    if isinstance(critics, Mapping) or not len(critics):
        raise CheckpointError(
            "wanted critics as a list with the arrays of each critic, at least one, got "
            f"{'one mapping' if isinstance(critics, Mapping) else 'none'}"
        )
    inputs = f"{obs_size} observation + {action_size} action"
    members = [
        _mlp(f"critic {index}: ", arrays, obs_size + action_size, inputs, 1)
        for index, arrays in enumerate(critics)
    ]
    shapes = [{name: value.shape for name, value in member.items()} for member in members]
    for index, found in enumerate(shapes):
        if found != shapes[0]:
            raise CheckpointError(f"critic {index}: wanted layers of the same shapes as those of critic 0")
    return {name: _tensor(np.stack([member[name] for member in members])) for name in members[0]}


def _mlp(
    where: str, arrays: Arrays, inputs: int, inputs_text: str, outputs: int, *, prefix: str = ""
) -> dict[str, NDArray[np.float32]]:
    """The arrays as float32, after a look at every layer from `inputs` to `outputs`."""
    _check_names(where, arrays, prefix)
    made = {name: _array(f"{where}{name}", value) for name, value in arrays.items()}
    layers = [int(name.split(".")[-2]) for name in made if name.startswith(f"{prefix}layers.")]
    depth = max(1 + max(layers, default=0), 2)
    for i in range(depth):
        weight, bias = (_get(where, made, f"{prefix}layers.{i}.{part}") for part in ("weight", "bias"))
        fan_out = outputs if i == depth - 1 else bias.size
        _check_layer(f"{where}{prefix}layers.{i}", weight, bias, inputs, fan_out, inputs_text)
        inputs, inputs_text = fan_out, f"the outputs of {prefix}layers.{i}"
    _check_norms(where, made, prefix, depth)
    return made


def _check_names(where: str, arrays: Arrays, *prefixes: str) -> None:
    strange = [
        name for name in arrays if not any(_NAME.fullmatch(name.removeprefix(prefix)) for prefix in prefixes)
    ]
    if strange:
        names = f"{prefixes[0]}layers.0.weight, {prefixes[0]}layers.0.bias"
        advice = "rename them; python -m pydoc rsm_train.run.checkpoint has the names"
        if any(_BATCH_NORM.search(name) for name in strange):
            advice = "fold BatchNorm into the weight and the bias of its layer"
        raise CheckpointError(f"{where}wanted arrays named {names}, ..., got {_listed(strange)}; {advice}")


def _check_layer(
    where: str,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    inputs: int,
    outputs: int,
    inputs_text: str,
) -> None:
    if bias.shape != (outputs,):
        raise CheckpointError(f"{where}.bias: wanted shape [{outputs}], got {list(bias.shape)}")
    if weight.shape == (inputs, outputs) != (outputs, inputs):
        raise CheckpointError(
            f"{where}.weight: wanted [out, in] = [{outputs}, {inputs}], got {list(weight.shape)}, "
            "which is transposed; hand over weight.T"
        )
    if weight.shape != (outputs, inputs):
        raise CheckpointError(
            f"{where}.weight: wanted [out, in] = [{outputs}, {inputs}], got {list(weight.shape)}; "
            f"its inputs are {inputs_text}, and its outputs are as many as {where}.bias has elements"
        )


def _check_norms(where: str, made: Mapping[str, NDArray[np.float32]], prefix: str, depth: int) -> None:
    """Check that all hidden layers are normalised, or none."""
    found = {name for name in made if name.startswith(f"{prefix}norms.")}
    wanted = {f"{prefix}norms.{i}.{part}" for i in range(depth - 1) for part in ("weight", "bias")}
    if found and found != wanted:
        odd = ", ".join(sorted(found ^ wanted))
        raise CheckpointError(f"{where}wanted norms of every hidden layer or of none, got more or less: {odd}")
    for name in found:
        shape = made[name.replace("norms.", "layers.").replace(".weight", ".bias")].shape
        if made[name].shape != shape:
            raise CheckpointError(f"{where}{name}: wanted shape {list(shape)}, got {list(made[name].shape)}")


def _get(where: str, made: Mapping[str, NDArray[np.float32]], name: str) -> NDArray[np.float32]:
    if name not in made:
        found = f"only {_listed(sorted(made))}" if made else "no arrays"
        raise CheckpointError(f"{where}wanted an array {name}, got {found}; name all arrays of the network")
    return made[name]


def _listed(names: Sequence[str]) -> str:
    """The first names in words."""
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _array(where: str, value: ArrayLike) -> NDArray[np.float32]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: wanted an array of real numbers, got none ({error})") from None
    if array.dtype.kind != "f":
        raise CheckpointError(f"{where}: wanted an array of real numbers, got dtype {array.dtype}; give floats")
    with np.errstate(over="ignore"):  # becomes Inf
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{where}: wanted finite float32 numbers, got NaN, Inf or more than float32 holds"
        )
    return array


def _observations(values: ArrayLike | None, obs_size: int) -> NDArray[np.float32]:
    if values is None:
        return np.random.default_rng(0).normal(size=(PROBE_ROWS, obs_size)).astype(np.float32)
    array = _array("observations", values)
    if array.ndim != 2 or array.shape[1] != obs_size or not len(array):
        raise CheckpointError(f"observations: wanted shape [P, {obs_size}], got {list(array.shape)}")
    return array


def _tensor(array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
