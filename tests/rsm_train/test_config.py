import pytest

from rsm_common.errors import ConfigError
from rsm_train.algorithms.dpmd import DPMDConfig
from rsm_train.algorithms.registry import ALGORITHMS
from rsm_train.config import PRESETS, resolve


def test_preset_beats_defaults_and_the_command_line_beats_the_preset():
    run, algorithm = resolve({"env": "Hopper-v5"})
    assert isinstance(algorithm, DPMDConfig)
    assert (run.batch_size, algorithm.diffusion_steps, algorithm.particles) == (256, 20, 32)
    run, algorithm = resolve({"env": "Hopper-v5", "preset": "quick", "particles": 3, "batch_size": None})
    assert isinstance(algorithm, DPMDConfig)
    assert algorithm.particles == 3
    assert run.batch_size == PRESETS["quick"].settings["batch_size"]


def test_how_much_a_killed_run_can_lose():
    assert resolve({"env": "Hopper-v5"})[0].checkpoint_every == 5_000
    assert resolve({"env": "Hopper-v5", "preset": "quick"})[0].checkpoint_every == 1_000
    with pytest.raises(ConfigError, match="checkpoint_every >= 1, got 0"):
        resolve({"env": "Hopper-v5", "checkpoint_every": 0})


@pytest.mark.parametrize(
    ("preset", "algo"), [(preset, algo) for algo in ALGORITHMS for preset in ALGORITHMS[algo].presets]
)
def test_every_preset_resolves_for_its_algorithms(preset, algo):
    run, algorithm = resolve({"env": "Hopper-v5", "preset": preset, "algo": algo})
    assert (run.preset, type(algorithm)) == (preset, ALGORITHMS[algo].Config)
    wanted = {**PRESETS[preset].settings, **ALGORITHMS[algo].presets[preset]}
    assert wanted.items() <= (vars(run) | vars(algorithm)).items()


def test_a_preset_of_another_algorithm_is_refused():
    with pytest.raises(ConfigError, match="wanted an algorithm of dpmd with preset kl, got sac"):
        resolve({"env": "Hopper-v5", "preset": "kl", "algo": "sac"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--env"),
        ({"env": "Hopper-v5", "preset": "fast"}, "paper, reference, kl, quick"),
        ({"env": "Hopper-v5", "total_steps": 10, "warmup_steps": 20}, "warmup_steps"),
        ({"env": "Hopper-v5", "particles": 0}, "particles"),
        ({"env": "Hopper-v5", "updates_per_step": 0.0}, "updates_per_step"),
        ({"env": "Hopper-v5", "seed": -1}, "seed"),
        ({"env": "Hopper-v5", "tau": 0.0}, "tau"),
        ({"env": "Hopper-v5", "algo": "sac", "tau": 0.0}, "tau"),
        ({"env": "Hopper-v5", "algo": "sac", "precision": "bf16"}, "dpmd or sdac with --precision"),
        ({"env": "Hopper-v5", "target_kl": 1.0}, "temperature_schedule kl with --target-kl"),
        ({"env": "Hopper-v5", "preset": "quick", "target_entropy": 1.0}, "entropy with --target-entropy"),
        ({"env": "Hopper-v5", "policy_lr_decay_start": 5}, "policy_lr_final with --policy-lr-decay-start"),
        ({"env": "Hopper-v5", "preset": "reference", "proposal_noise": 0.1}, "policy with --proposal-noise"),
        ({"env": "Hopper-v5", "widht": 3}, "algorithm dpmd has, got --widht"),
        ({"env": "Hopper-v5", "algo": "sac", "particles": 3}, "algorithm sac has, got --particles"),
        ({"env": "Hopper-v5", "algo": "ppo"}, "algorithm of dpmd, sdac, sac, or module:Class"),
        ({"env": "Hopper-v5", "algo": "no_such_module:X"}, "can be imported, got ModuleNotFoundError"),
        ({"env": "Hopper-v5", "algo": "math:pi"}, "a class with Config, presets and update, got 3.14"),
        ({"env": "Hopper-v5", "algo": "math:tau2"}, "a name that module math defines, got 'tau2'"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(given)
    assert "\n" not in str(caught.value)
