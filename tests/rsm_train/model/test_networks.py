import math

import pytest
import torch

from rsm_train.model.diffusion import make_schedule
from rsm_train.model.networks import (
    embed_time,
    init_denoiser,
    init_mlp,
    mish,
    predict_noise,
    sample_actions,
    split_denoiser,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mish_is_exact_everywhere():
    x = torch.cat([torch.linspace(-90, 90, 20001), torch.tensor([0.0, 1e4, -1e4])])
    wanted = torch.nn.functional.mish(x.double())
    error = (mish(x).double() - wanted).abs() / wanted.abs().clamp(min=1e-30)
    assert error[wanted.abs() > 1e-30].max() < 1e-6
    assert torch.isfinite(mish(x)).all()


def test_mish_derivative_is_that_of_the_function():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mish, (x,))


def naive_noise(params, obs, action, t, steps):
    """eps_theta with the concatenated input and torch's own mish."""
    half = 8
    frequency = 1e4 ** (-torch.arange(half) / half)
    angle = t.float()[..., None] * frequency
    features = torch.cat([angle.sin(), angle.cos()], -1) / 4
    linear, act = torch.nn.functional.linear, torch.nn.functional.mish
    time = linear(
        act(linear(features, params["time.layers.0.weight"], params["time.layers.0.bias"])),
        params["time.layers.1.weight"],
        params["time.layers.1.bias"],
    )
    x = torch.cat([obs, action, time], -1)
    for i in range(3):
        x = linear(x, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"])
        x = act(x) if i < 2 else x
    return x


def randomised(params):
    """Biases are zero at the start, which would hide a forgotten one."""
    g = generator(9)
    return {name: value + 0.1 * torch.randn(value.shape, generator=g) for name, value in params.items()}


def test_split_denoiser_equals_the_concatenated_network():
    params = randomised(init_denoiser(5, 3, [32, 32], generator()))
    obs, action = torch.randn(4, 5, generator=generator(1)), torch.randn(4, 6, 3, generator=generator(2))
    t = torch.randint(7, (4, 6), generator=generator(3))
    denoiser = split_denoiser(params, 7)
    got = predict_noise(denoiser, (obs @ denoiser.obs_weight.T).unsqueeze(1), action, t)
    wanted = naive_noise(params, obs.unsqueeze(1).expand(4, 6, 5), action, t, 7)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    by_index = predict_noise(denoiser, (obs @ denoiser.obs_weight.T).unsqueeze(1), action, 4)
    wanted = naive_noise(params, obs.unsqueeze(1).expand(4, 6, 5), action, torch.full((4, 6), 4), 7)
    torch.testing.assert_close(by_index, wanted, atol=1e-5, rtol=1e-5)


def test_time_embedding_tells_steps_apart():
    embedding = embed_time(init_denoiser(2, 1, [8], generator()), 20)
    assert embedding.shape == (20, 16)
    assert torch.pdist(embedding).min() > 1e-3


def test_sampler_is_a_pure_function_and_rows_do_not_mix():
    params = init_denoiser(5, 3, [32, 32], generator())
    schedule = make_schedule("cosine", 6)
    denoiser = split_denoiser(params, 6)
    obs = torch.randn(9, 5, generator=generator(1))
    noise = torch.randn(9, 6, 4, 3, generator=generator(2))
    action = sample_actions(denoiser, schedule, obs, noise, prior_std=0.5)
    assert action.shape == (9, 4, 3)
    assert action.abs().max() <= 1
    again = sample_actions(denoiser, schedule, obs, noise, prior_std=0.5)
    assert torch.equal(action, again)
    alone = sample_actions(denoiser, schedule, obs[3:4], noise[3:4], prior_std=0.5)
    torch.testing.assert_close(alone[0], action[3], atol=1e-5, rtol=1e-5)
    other = sample_actions(denoiser, schedule, obs, noise, prior_std=1.0)
    assert not torch.allclose(other, action, atol=1e-3)


def test_initial_weights_are_truncated_normal_of_fan_in():
    params = init_mlp([400, 300, 2], generator())
    weight = params["layers.0.weight"]
    assert weight.shape == (300, 400)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(400), rel=0.01)
    assert weight.abs().max().item() <= 2 / math.sqrt(400) / 0.8796 + 1e-6
    assert not params["layers.0.bias"].any()
    ensemble = init_mlp([4, 8, 1], generator(), ensemble=2)["layers.0.weight"]
    assert ensemble.shape == (2, 8, 4)
    assert not torch.equal(ensemble[0], ensemble[1])
