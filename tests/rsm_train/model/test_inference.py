import warnings

import pytest
import torch

from rsm_train.model import inference, kernels
from rsm_train.model.critic import init_critics, q_values
from rsm_train.model.diffusion import make_schedule
from rsm_train.model.inference import Inference
from rsm_train.model.kernels import Compute, compiled
from rsm_train.model.networks import init_denoiser, sample_actions, split_denoiser
from tests.rsm_train.compiler import needs_compiler

OBS, ACTION, STEPS, PARTICLES = 5, 3, 4, 8


def networks(width=128):
    g = torch.Generator().manual_seed(0)
    policy = init_denoiser(OBS, ACTION, [width, width], g)
    return policy, init_critics(OBS, ACTION, [width, width], g, norm="layer")


def inputs(rows):
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, OBS, generator=g), torch.randn(rows, STEPS, PARTICLES, ACTION, generator=g)


def reference(policy, critics, obs, noise, schedule):
    # With a graph, so that the plain products are used.
    action = sample_actions(split_denoiser(policy, STEPS), schedule, obs, noise, prior_std=0.5).detach()
    return action, q_values(critics, obs, action).detach()


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_groups_and_products_of_inference_change_nothing_but_rounding(rows):
    policy, critics = networks()
    schedule = make_schedule("cosine", STEPS)
    obs, noise = inputs(rows)
    for value in (*policy.values(), *critics.values()):
        value.requires_grad_()
    wanted, wanted_q = reference(policy, critics, obs, noise, schedule)
    fast = Inference(schedule, 0.5, Compute())
    action = fast.sample(policy, obs, noise)
    assert not action.requires_grad
    torch.testing.assert_close(action, wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(fast.values(critics, obs, wanted), wanted_q, atol=1e-5, rtol=1e-5)


def test_bf16_sampling_is_near_float32_and_no_copy_of_it():
    policy, critics = networks()
    schedule = make_schedule("cosine", STEPS)
    obs, noise = inputs(64)
    wanted, _ = reference(policy, critics, obs, noise, schedule)
    action = Inference(schedule, 0.5, Compute("bf16")).sample(policy, obs, noise)
    assert action.dtype == torch.float32
    error = (action - wanted).abs()
    assert 0 < error.mean() < 5e-3
    assert error.max() < 0.1


@needs_compiler
def test_compiled_inference_equals_the_plain_one():
    policy, critics = networks()
    schedule = make_schedule("cosine", STEPS)
    obs, noise = inputs(128)
    wanted, wanted_q = reference(policy, critics, obs, noise, schedule)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="not compiled")  # a fall back to the plain functions warns
        fast = Inference(schedule, 0.5, Compute(compile=True))
        torch.testing.assert_close(fast.sample(policy, obs, noise), wanted, atol=2e-5, rtol=0)
        torch.testing.assert_close(fast.values(critics, obs, wanted), wanted_q, atol=1e-5, rtol=1e-5)


def test_groups_cover_every_row_once_in_near_equal_parts():
    cpu = torch.device("cpu")
    for rows, particles in ((1, 1), (1, 5000), (256, 32), (255, 32), (7, 1024), (3, 1)):
        parts = list(inference._groups(rows, particles, cpu))
        assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
        sizes = {part.stop - part.start for part in parts}
        assert max(sizes) - min(sizes) <= 1
    assert len(list(inference._groups(256, 32, cpu))) == 8
    assert list(inference._groups(256, 32, torch.device("cuda"))) == [slice(0, 256)]


@pytest.mark.parametrize("shape", [(700, 64), (2, 350, 64)])
def test_onednn_product_is_the_product(shape, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=g) for size in ((700, 64), (96, 64), (96,)))
    wanted = (x.double() @ weight.double().T + bias).float()
    calls = []
    original = kernels._onednn_op

    def count(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(kernels, "_onednn_op", count)
    with torch.no_grad():
        torch.testing.assert_close(kernels.linear(x.view(shape), weight, bias), wanted.view(*shape[:-1], 96))
        stacked = kernels.linear(x.expand(3, -1, -1), weight.expand(3, -1, -1), bias.expand(3, -1))
    torch.testing.assert_close(stacked, wanted.expand(3, -1, -1))
    assert len(calls) == 4, "this product is large enough for oneDNN"


def test_products_with_a_graph_keep_it():
    x, weight, bias = torch.randn(700, 64), torch.randn(96, 64, requires_grad=True), torch.zeros(96)
    kernels.linear(x, weight, bias).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(96, -1), atol=1e-4, rtol=1e-5)  # sums of 700


def test_a_function_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def broken(function, **_):
        def call(*_):
            raise torch._dynamo.exc.InternalTorchDynamoError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    call = compiled(lambda x: x + 1, True)
    with pytest.warns(UserWarning, match="not compiled, slower: no compiler"):
        assert call(1) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(2) == 3
