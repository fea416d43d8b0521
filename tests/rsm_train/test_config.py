import pytest

from rsm_serve.errors import ConfigError
from rsm_train.config import PRESETS, resolve


def test_preset_beats_defaults_and_the_command_line_beats_the_preset():
    run, algorithm = resolve({"env": "Hopper-v5"})
    assert (run.batch_size, algorithm.diffusion_steps, algorithm.particles) == (256, 20, 32)
    run, algorithm = resolve({"env": "Hopper-v5", "preset": "quick", "particles": 3, "batch_size": None})
    assert algorithm.particles == 3
    assert run.batch_size == PRESETS["quick"].settings["batch_size"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves(preset):
    run, _ = resolve({"env": "Hopper-v5", "preset": preset})
    assert run.preset == preset


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--env"),
        ({"env": "Hopper-v5", "preset": "fast"}, "paper, quick"),
        ({"env": "Hopper-v5", "total_steps": 10, "warmup_steps": 20}, "warmup_steps"),
        ({"env": "Hopper-v5", "particles": 0}, "particles"),
        ({"env": "Hopper-v5", "updates_per_step": 0.0}, "updates_per_step"),
        ({"env": "Hopper-v5", "seed": -1}, "seed"),
        ({"env": "Hopper-v5", "widht": 3}, "widht"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(given)
    assert "\n" not in str(caught.value)
