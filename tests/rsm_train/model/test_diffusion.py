import itertools
import math

import numpy as np
import pytest
import torch

from rsm_train.model.diffusion import forward_noise, make_schedule, reverse_chain, timesteps

# ICML 2025 program's values for T = 20.
COSINE_INV_SQRT = [1.004, 1.014, 1.031, 1.055, 1.087, 1.127, 1.179, 1.243, 1.323, 1.423]
COSINE_INV_SQRT += [1.550, 1.713, 1.927, 2.219, 2.633, 3.261, 4.317, 6.443, 12.85, 406.2]
LINEAR_ALPHA_BAR = [1.0, 0.958, 0.877, 0.766, 0.637, 0.503, 0.376, 0.265, 0.176, 0.109, 0.063]
LINEAR_ALPHA_BAR += [0.034, 0.017, 0.0076, 0.0031, 0.0012, 3.8e-4, 1.1e-4, 2.6e-5, 5.3e-6]


def test_cosine_schedule_has_the_published_numbers():
    steps = make_schedule("cosine", 20).reverse_steps[::-1]
    got = [float(f"{step.inv_sqrt_alpha_bar:.4g}") for step in steps]
    assert got == pytest.approx(COSINE_INV_SQRT, abs=5.1e-4, rel=3e-4)


def test_linear_schedule_has_the_published_numbers():
    got = make_schedule("linear", 20).alpha_bars.tolist()
    assert got == pytest.approx(LINEAR_ALPHA_BAR, rel=0.04, abs=5e-4)
    assert got[19] == pytest.approx(5.3e-6, rel=0.01)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_last_reverse_step_returns_x0_without_noise(name, steps):
    last = make_schedule(name, steps).reverse_steps[-1]
    assert (last.x0_coef, last.action_coef, last.std) == pytest.approx((1.0, 0.0, 0.0))


def test_reverse_step_is_the_posterior_of_the_forward_process():
    """q(a_{t-1} | a_t, a_0) from Bayes' rule with Gaussians, in float64, independent of the code's formulas."""
    schedule = make_schedule("cosine", 7)
    betas = schedule.betas.double().numpy()
    alpha_bars = np.cumprod(1 - betas)
    for t in range(1, 7):
        step = schedule.reverse_steps[6 - t]
        prior_mean, prior_var = math.sqrt(alpha_bars[t - 1]), 1 - alpha_bars[t - 1]  # of a_{t-1}, times a_0
        gain, var = math.sqrt(1 - betas[t]), betas[t]  # a_t = gain a_{t-1} + N(0, var)
        posterior_var = 1 / (1 / prior_var + gain**2 / var)
        assert step.std**2 == pytest.approx(posterior_var, rel=1e-4)
        assert step.x0_coef == pytest.approx(posterior_var * prior_mean / prior_var, rel=1e-4)
        assert step.action_coef == pytest.approx(posterior_var * gain / var, rel=1e-4)


def test_indices_are_equal_strides_from_the_noisiest():
    assert timesteps(5) == (4, 3, 2, 1, 0)
    assert timesteps(20, 5) == (19, 15, 11, 7, 3)
    assert timesteps(20, 3) == (19, 13, 6)
    assert timesteps(5, 2) == (4, 2)
    assert timesteps(20, 1) == (19,)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_step_over_several_indices_is_the_posterior_from_one_to_the_other(name, count):
    """q(a_u | a_t, a_0) for the visited t and u, from Bayes' rule, as for one index at a time."""
    schedule = make_schedule(name, 10, chain_steps=count)
    alpha_bars = np.cumprod(1 - schedule.betas.double().numpy())
    assert [step.t for step in schedule.reverse_steps] == list(timesteps(10, count))
    for step, after in itertools.pairwise(schedule.reverse_steps):
        prior_mean, prior_var = math.sqrt(alpha_bars[after.t]), 1 - alpha_bars[after.t]
        kept = alpha_bars[step.t] / alpha_bars[after.t]  # a_t = sqrt(kept) a_u + N(0, 1 - kept)
        posterior_var = 1 / (1 / prior_var + kept / (1 - kept))
        assert step.std**2 == pytest.approx(posterior_var, rel=1e-3)
        assert step.x0_coef == pytest.approx(posterior_var * prior_mean / prior_var, rel=1e-3)
        assert step.action_coef == pytest.approx(posterior_var * math.sqrt(kept) / (1 - kept), rel=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [None, 4])
def test_with_any_eta_the_marginals_are_those_of_the_forward_process(eta, count):
    """Song et al. 2021, lemma 1: from q(a_t | a_0) a step leads to q(a_u | a_0); its noise is eta of DDPM's."""
    schedule = make_schedule("cosine", 10, chain_steps=count, eta=eta)
    ddpm = make_schedule("cosine", 10, chain_steps=count)
    alpha_bars = np.cumprod(1 - schedule.betas.double().numpy())
    steps = schedule.reverse_steps
    for step, after, full in zip(steps, steps[1:], ddpm.reverse_steps, strict=False):
        here, there = alpha_bars[step.t], alpha_bars[after.t]
        assert step.x0_coef + step.action_coef * math.sqrt(here) == pytest.approx(math.sqrt(there), rel=1e-4)
        assert step.action_coef**2 * (1 - here) + step.std**2 == pytest.approx(1 - there, rel=1e-4)
        assert step.std == pytest.approx(eta * full.std)
        assert full.std > 0


def test_chain_agrees_with_a_plain_loop():
    schedule = make_schedule("cosine", 5)
    noise = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0))

    def predict(action, t):
        return torch.tanh(action * 0.7 + 0.1 * t)

    got = reverse_chain(schedule, predict, noise, prior_std=0.5)
    betas = schedule.betas.double().numpy()
    alpha_bars = np.cumprod(1 - betas)
    a = 0.5 * noise[:, 0].double().numpy()
    for t in range(4, -1, -1):
        before = alpha_bars[t - 1] if t else 1.0
        eps = np.tanh(a * 0.7 + 0.1 * t)
        x0 = np.clip(a / np.sqrt(alpha_bars[t]) - eps * np.sqrt(1 / alpha_bars[t] - 1), -1, 1)
        c1 = betas[t] * np.sqrt(before) / (1 - alpha_bars[t])
        c2 = (1 - before) * np.sqrt(1 - betas[t]) / (1 - alpha_bars[t])
        sd = np.sqrt(betas[t] * (1 - before) / (1 - alpha_bars[t]))
        a = c1 * x0 + c2 * a + (sd * noise[:, 5 - t].double().numpy() if t else 0)
    np.testing.assert_allclose(got.numpy(), a, atol=1e-5)


def test_chain_uses_every_noise_index_once_and_stays_in_the_box():
    schedule = make_schedule("cosine", 4)
    noise = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(1)) * 10

    def predict(action, t):
        return 0.9 * action

    action = reverse_chain(schedule, predict, noise, prior_std=1.0)
    assert action.abs().max() <= 1.0
    small = noise / 100
    base = reverse_chain(schedule, predict, small, prior_std=1.0)
    for k in range(4):
        changed = small.clone()
        changed[:, k] += 0.01
        assert not torch.equal(reverse_chain(schedule, predict, changed, prior_std=1.0), base), k


def test_forward_noise_has_the_stated_mean_and_variance():
    schedule = make_schedule("cosine", 10)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(200_000, 1, generator=generator)
    t = torch.full((200_000,), 6)
    noisy = forward_noise(schedule, torch.full((200_000, 1), 0.3), t, eps)
    alpha_bar = float(schedule.alpha_bars[6])
    assert noisy.mean().item() == pytest.approx(0.3 * math.sqrt(alpha_bar), abs=0.01)
    assert noisy.var().item() == pytest.approx(1 - alpha_bar, rel=0.02)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        make_schedule("cosine", 0)
    with pytest.raises(ValueError, match="cosine"):
        make_schedule("quadratic", 5)  # type: ignore[arg-type]
    for count in (0, -1, 6):
        with pytest.raises(ValueError, match=f"wanted 1 to 5 of the 5 denoising steps, got {count}"):
            make_schedule("cosine", 5, chain_steps=count)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"got {eta}"):
            make_schedule("cosine", 5, eta=eta)
