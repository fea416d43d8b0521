"""Weights from plain numpy arrays: every mistake, and what comes out as a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rsm_common.errors import CheckpointError
from rsm_train.foreign import import_weights
from rsm_train.run.checkpoint import load_checkpoint
from tests.foreign import critic_arrays, policy_arrays

O, A, H = 4, 2, 8  # noqa: E741


def settings(**changes):
    return {
        "policy": policy_arrays(O, A, H),
        "critics": [critic_arrays(O, A, H, seed) for seed in (1, 2)],
        "env_id": "Any-v0",
        "obs_size": O,
        "action_low": [-3.0, -1.0],
        "action_high": [1.0, 1.0],
        "steps": 5,
        "particles": 3,
        "prior_std": 0.5,
    } | changes


def changed(arrays, name, value):
    return {key: array for key, array in arrays.items() if key != name} | (
        {} if value is None else {name: value}
    )


def test_it_loads_and_acts(tmp_path):
    path = import_weights(tmp_path / "arm", **settings(control_dt_s=0.02))
    checkpoint = load_checkpoint(path)
    spec = checkpoint.spec
    assert (spec.name, spec.steps, spec.particles, spec.env_id) == ("arm", 5, 3, "Any-v0")
    assert (spec.action.low, spec.action.high, spec.control_dt_s) == ((-3.0, -1.0), (1.0, 1.0), 0.02)
    assert checkpoint.networks["critic"]["layers.0.weight"].shape == (2, H, O + A)
    action = checkpoint.policy().act(np.ones((6, O)), seed=0).action
    assert ((action >= spec.action_low) & (action <= spec.action_high)).all()
    assert len(np.unique(action, axis=0)) > 1


def test_counts_may_be_numpys_and_an_unknown_environment_is_a_warning(tmp_path, caplog):
    counts = {"obs_size": np.int64(O), "steps": np.int32(5), "particles": np.uint8(3)}
    spec = load_checkpoint(import_weights(tmp_path / "arm", **settings(**counts))).spec
    assert [type(value) for value in spec.noise_shape] == [int, int, int]
    assert "Gymnasium knows no environment 'Any-v0'; the policy can be exported" in caplog.text


def test_float64_and_float16_are_cast(tmp_path):
    policy = {name: value.astype(np.float64) for name, value in policy_arrays(O, A, H).items()}
    critics = [{name: value.astype(np.float16) for name, value in critic_arrays(O, A, H, 1).items()}]
    checkpoint = load_checkpoint(import_weights(tmp_path / "a", **settings(policy=policy, critics=critics)))
    weight = checkpoint.networks["policy_average"]["layers.0.weight"].numpy()
    np.testing.assert_array_equal(weight, policy_arrays(O, A, H)["layers.0.weight"])
    assert {str(value.dtype) for params in checkpoint.networks.values() for value in params.values()} == {
        "torch.float32"
    }


def test_critics_with_norms_and_observations(tmp_path):
    critics = [critic_arrays(O, A, H, seed) | NORMS for seed in (1, 2, 3)]
    observations = np.arange(8.0).reshape(2, 4)
    path = import_weights(
        tmp_path / "a", **settings(critics=critics, selection="mean", observations=observations)
    )
    checkpoint = load_checkpoint(path)
    np.testing.assert_array_equal(checkpoint.probe_obs.numpy(), observations)
    assert checkpoint.policy().act(np.ones(O), seed=1).q is not None


NORMS = {f"norms.{i}.{part}": np.ones(H) for i in range(3) for part in ("weight", "bias")}
POLICY, CRITIC = policy_arrays(O, A, H), critic_arrays(O, A, H, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {}}, "policy: wanted an array time.layers.0.weight, got no arrays; name all"),
        ({"policy": changed(POLICY, "layers.1.weight", None)}, "layers.1.weight, got only 'layers.0.bias'"),
        ({"policy": changed(POLICY, "layers.1.bias", None)}, r"array layers.1.bias, got only .* and \d+ more"),
        (
            {"policy": changed(POLICY, "layers.0.weight", POLICY["layers.0.weight"].T)},
            r"policy: layers.0.weight: wanted \[out, in\] = \[8, 22\], got \[22, 8\], which is transposed; "
            "hand over weight.T",
        ),
        (
            {"policy": POLICY | policy_arrays(O, A, H, embedding=32)},
            r"policy: time.layers.0.weight: wanted \[out, in\] = \[32, 16\], got \[32, 32\]; "
            "its inputs are 16 features of the step",
        ),
        (
            {"policy": changed(POLICY, "layers.0.weight", np.zeros((H, O + A + 32), np.float32))},
            "4 observation \\+ 2 noisy action \\+ 16 time embedding",
        ),
        ({"obs_size": 5}, "its inputs are 5 observation"),
        ({"policy": changed(POLICY, "layers.3.bias", np.zeros(3))}, r"layers.3.bias: wanted shape \[2\]"),
        ({"policy": changed(POLICY, "layers.2.bias", np.full(H, np.nan))}, "layers.2.bias: wanted finite"),
        ({"policy": changed(POLICY, "layers.2.bias", np.full(H, 1e300))}, "more than float32 holds"),
        ({"policy": changed(POLICY, "layers.2.bias", np.zeros(H, int))}, "real numbers, got dtype int64"),
        ({"policy": changed(POLICY, "layers.2.bias", np.array([None] * H))}, "got dtype object"),
        ({"policy": changed(POLICY, "layers.2.bias", [[1.0], [1.0, 2.0]])}, "real numbers, got none"),
        ({"policy": POLICY | {"dense/kernel": np.zeros(3)}}, "got 'dense/kernel'; rename them"),
        ({"critics": [CRITIC | {"norms.0.running_mean": np.zeros(H)}]}, "running_mean'; fold BatchNorm into"),
        ({"critics": [CRITIC | {"bn1/mean": np.zeros(H)}]}, "'bn1/mean'; fold BatchNorm into"),
        (
            {"policy": {f"net.{i}.w": np.zeros(3) for i in range(6)}},
            "layers.0.bias, ..., got 'net.0.w', 'net.1.w', 'net.2.w', 'net.3.w' and 2 more; rename",
        ),
        ({"env_id": "InvertedPendulumm-v5"}, "did you mean InvertedPendulum-v5 .*Correct env_id"),
        ({"env_id": None}, "text as env_id, got None"),
        ({"particles": True}, "whole number >= 1 as particles, got True"),
        ({"policy": POLICY | {"norms.0.weight": np.zeros(H)}}, "got more or less: norms.0.bias, norms.1.bias"),
        ({"policy": POLICY | NORMS}, "wanted no norms"),
        ({"critics": []}, "at least one, got none"),
        ({"critics": CRITIC}, "got one mapping"),
        ({"critics": [changed(CRITIC, "layers.3.weight", None)]}, "critic 0: wanted an array layers.3.weight"),
        ({"critics": [CRITIC, critic_arrays(O, A, 9, 1)]}, "critic 1: wanted layers of the same shapes"),
        ({"critics": [policy_arrays(O, A, H)]}, "critic 0: .*got 'time.layers.0.weight'"),
        ({"critics": [critic_arrays(O, 3, H, 1)]}, "critic 0: layers.0.weight.*4 observation \\+ 2 action"),
        ({"critics": [CRITIC | NORMS | {"norms.0.bias": np.ones(9)}]}, r"norms.0.bias: wanted shape \[8\]"),
        ({"critics": [CRITIC | NORMS | {"norms.3.bias": np.ones(1)}]}, "got more or less: norms.3.bias"),
        (
            {"policy": {n: v for n, v in POLICY.items() if ".layers.1" not in n}},
            "wanted an array time.layers.1.weight",
        ),
        ({"action_low": [-3.0]}, "as many lower as upper action bounds, got 1 and 2"),
        ({"action_low": [1.0, -1.0]}, "low < high"),
        ({"action_high": [np.inf, 1.0]}, "finite float32 numbers"),
        ({"action_high": ["a", 1.0]}, "one number per action"),
        ({"action_low": [], "action_high": []}, "at least one"),
        ({"obs_size": 0}, "whole number >= 1 as obs_size"),
        ({"steps": 0}, "whole number >= 1 as steps"),
        ({"steps": 2.0}, "whole number >= 1 as steps, got 2.0"),
        ({"particles": 0}, "whole number >= 1 as particles"),
        ({"schedule": "sigmoid"}, "wanted schedule 'cosine' or 'linear', got 'sigmoid'"),
        ({"prior_std": 0.0}, "number > 0 as prior_std"),
        ({"prior_std": float("nan")}, "number > 0 as prior_std"),
        ({"selection": "max"}, "wanted selection 'min' or 'mean'"),
        ({"observations": np.zeros((3, 5))}, r"observations: wanted shape \[P, 4\], got \[3, 5\]"),
        ({"observations": np.full((3, 4), np.inf)}, "observations: wanted finite"),
        ({"control_dt_s": -1.0}, "control_dt_s"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_sentence_and_writes_nothing(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        import_weights(tmp_path / "a", **settings(**change))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="choose a new directory"):
        import_weights(tmp_path, **settings())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def by_hand(directory):
    """A checkpoint whose files can be edited: without the record of their hashes."""
    path = import_weights(directory, **settings())
    (path / "sha256.json").unlink()
    return path


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (0, "got 0; train again"),
        (99, "got 99; install a newer rsm-toolkit"),
        ("1", "got '1'"),
        (None, "got None"),
        (True, "got True"),
    ],
)
def test_other_schema_versions_of_a_checkpoint_say_why(tmp_path, version, message):
    path = by_hand(tmp_path / "a")
    config = json.loads((path / "config.json").read_bytes())
    assert config["schema_version"] == 1
    (path / "config.json").write_text(json.dumps(config | {"schema_version": version}))
    with pytest.raises(CheckpointError, match=f"wanted schema version 1 in config.json, {message}"):
        load_checkpoint(path)


def test_a_checkpoint_with_an_earlier_policy_json_loads(tmp_path):
    path = by_hand(tmp_path / "a")
    data = json.loads((path / "policy.json").read_bytes())
    for later in ("sampling", "accuracy", "tolerance"):
        del data[later]
    (path / "policy.json").write_text(json.dumps(data | {"schema_version": 1}))
    assert (
        load_checkpoint(path).spec == load_checkpoint(import_weights(tmp_path / "b" / "a", **settings())).spec
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("policy_average.layers.2.bias", np.zeros(H), "layers.2.bias: wanted float32, got torch.float64"),
        ("critic.layers.2.bias", np.zeros((2, H), np.float16), "critic.layers.2.bias: wanted float32"),
        ("policy_average.layers.3.weight", None, "policy_average.layers.3 is missing|wanted a weight"),
        ("critic.layers.0.bias", None, "critic.layers.0 is missing"),
    ],
)
def test_a_checkpoint_written_by_hand_is_checked_too(tmp_path, name, value, message):
    path = by_hand(tmp_path / "a")
    file = path / "networks.safetensors"
    save_file(changed(load_file(file), name, value), file)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_network_without_hidden_layers_is_refused(tmp_path):
    path = by_hand(tmp_path / "a")
    file = path / "networks.safetensors"
    arrays = {name: value for name, value in load_file(file).items() if "policy_average.layers" not in name}
    arrays["policy_average.layers.0.weight"] = np.zeros((A, O + A + 16), np.float32)
    arrays["policy_average.layers.0.bias"] = np.zeros(A, np.float32)
    save_file(arrays, file)
    with pytest.raises(CheckpointError, match="layers.0: wanted|layers.1 is missing"):
        load_checkpoint(path)
