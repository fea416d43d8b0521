"""The networks as functions of named parameters.

Parameters are a flat `dict[str, Tensor]`: the names are those of the checkpoint and of the exported graph.
A stack of E networks (twin critics) is the same dictionary with a leading E axis on every tensor.

Shape legend: B batch, N particles, O observation, A action, H hidden width, E ensemble, M = time embedding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_train.model import kernels
from rsm_train.model.diffusion import NoiseSchedule, reverse_chain

Params = dict[str, Tensor]

TIME_EMBEDDING_SIZE = 16
TIME_HIDDEN_SIZE = 32
TIME_THETA = 1e4
_TRUNCATED_NORMAL_STD = 0.87962566103423978  # std of N(0, 1) truncated to [-2, 2]


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)) (Misra 2019) without a softplus.

    With s = sigmoid(x) and p = s (s - 2): tanh(log(1 + e^x)) = -p / (p + 2). Exact to 1e-6 relative
    wherever the result is above 1e-30, cannot overflow, and on a CPU more than twice as fast as torch's
    kernel where the tensor fits the cache, less where it does not (benchmarks/results/learner.json).
    """
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _Mish.apply(x)  # type: ignore[no-any-return, no-untyped-call]
    s = torch.sigmoid(x)
    p = s * (s - 2)
    return -(x * p) / (p + 2)


class _Mish(torch.autograd.Function):
    """mish with its closed-form derivative, in fewer passes over memory than autograd would make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        p = s * (s - 2)
        gate = -p / (p + 2)
        ctx.save_for_backward(x, s, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        x, s, gate = ctx.saved_tensors
        # d/dx x g = g + x g', g' = (1 - g^2) s because softplus' = sigmoid.
        return grad_outputs[0] * torch.addcmul(gate, x * s, 1 - gate * gate)


def init_mlp(sizes: Sequence[int], generator: torch.Generator, *, ensemble: int | None = None) -> Params:
    """Weights `layers.i.weight` [E?, out, in] and biases `layers.i.bias` [E?, out].

    Truncated normal (at 2 standard deviations) with std 1 / sqrt(fan_in); biases 0.
    """
    params: Params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        shape = (fan_out, fan_in) if ensemble is None else (ensemble, fan_out, fan_in)
        std = fan_in**-0.5 / _TRUNCATED_NORMAL_STD
        weight = torch.empty(shape)
        torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        params[f"layers.{i}.weight"] = weight
        params[f"layers.{i}.bias"] = torch.zeros(shape[:-1])
    return params


def subset(params: Mapping[str, Tensor], prefix: str) -> Params:
    """The parameters below a prefix, with the prefix removed."""
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


def depth(params: Mapping[str, Tensor]) -> int:
    """Number of linear layers of an MLP, `layers.0` counted even where it is held elsewhere."""
    return 1 + max(int(name.split(".")[1]) for name in params if name.startswith("layers."))


def linear(params: Mapping[str, Tensor], i: int, x: Tensor) -> Tensor:
    """Layer i: [..., in] -> [..., out], or [E, R, in] -> [E, R, out] for a stack."""
    return kernels.linear(x, params[f"layers.{i}.weight"], params[f"layers.{i}.bias"])


def activate(params: Mapping[str, Tensor], i: int, x: Tensor) -> Tensor:
    """mish behind layer i, behind a LayerNorm where the parameters have one (`norms.i`); shapes as `linear`."""
    if f"norms.{i}.weight" in params:
        weight, bias = params[f"norms.{i}.weight"], params[f"norms.{i}.bias"]
        if weight.dim() == 2:
            weight, bias = weight.unsqueeze(1), bias.unsqueeze(1)
        x = torch.nn.functional.layer_norm(x, x.shape[-1:]) * weight + bias
    return mish(x)


def mlp_tail(params: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Everything behind the first layer: pre-activation of layer 0 [..., H] -> [..., out].

    The layers compute in the dtype of their weights, the activations in that of `hidden` and better.
    """
    for i in range(1, depth(params)):
        active = activate(params, i - 1, hidden)
        hidden = linear(params, i, active.to(params[f"layers.{i}.weight"].dtype))
    return hidden


# --- the denoiser -----------------------------------------------------------------------------------------


def init_denoiser(obs_size: int, action_size: int, hidden: Sequence[int], generator: torch.Generator) -> Params:
    """The noise network eps_theta(s, a_t, t).

    `time.layers.*` embeds t; `layers.0` takes the concatenation [s, a_t, time embedding].
    """
    time = init_mlp([TIME_EMBEDDING_SIZE, TIME_HIDDEN_SIZE, TIME_EMBEDDING_SIZE], generator)
    body = init_mlp([obs_size + action_size + TIME_EMBEDDING_SIZE, *hidden, action_size], generator)
    return {f"time.{name}": value for name, value in time.items()} | body


def embed_time(params: Mapping[str, Tensor], steps: int) -> Tensor:
    """The learnt embedding of every t, [T, M].

    Sinusoidal features (theta 1e4, scaled by 1 / sqrt(M)) through Linear, mish, Linear. T is small, so all
    steps are embedded at once and looked up: the cost does not grow with the batch.
    """
    device = params["time.layers.0.weight"].device
    half = TIME_EMBEDDING_SIZE // 2
    t = torch.arange(steps, dtype=torch.float32, device=device)
    frequency = torch.exp(-math.log(TIME_THETA) / half * torch.arange(half, device=device))
    angle = t[:, None] * frequency
    features = torch.cat([angle.sin(), angle.cos()], dim=-1) * TIME_EMBEDDING_SIZE**-0.5
    time = subset(params, "time.")
    return mlp_tail(time, linear(time, 0, features))


@dataclass(frozen=True)
class SplitDenoiser:
    """A denoiser whose first layer is split by input.

    W [s, a_t, emb_t] + b = W_s s + W_a a_t + (W_e emb_t + b): the first term is computed once per
    observation and the last is a constant per step, so neither is repeated over T steps and N particles.
    """

    obs_weight: Tensor  # [H, O]
    action_weight: Tensor  # [H, A]
    step_bias: Tensor  # [T, H], indexed by t
    tail: Params


def split_denoiser(params: Mapping[str, Tensor], steps: int) -> SplitDenoiser:
    """Prepare a denoiser for sampling or training with T steps; differentiable in the parameters."""
    weight, bias = params["layers.0.weight"], params["layers.0.bias"]
    action_size = params[f"layers.{depth(params) - 1}.bias"].shape[0]
    sizes = [weight.shape[1] - action_size - TIME_EMBEDDING_SIZE, action_size, TIME_EMBEDDING_SIZE]
    obs_weight, action_weight, time_weight = torch.split(weight, sizes, dim=1)
    step_bias = torch.nn.functional.linear(embed_time(params, steps), time_weight, bias)
    tail = {name: value for name, value in params.items() if not name.startswith(("layers.0.", "time."))}
    return SplitDenoiser(obs_weight, action_weight, step_bias, tail)


def observe(denoiser: SplitDenoiser, obs_BO: Tensor) -> Tensor:
    """The observation's part of the first layer, for `predict_noise`: [B, 1, H]."""
    return (obs_BO @ denoiser.obs_weight.T).unsqueeze(1)


def predict_noise(denoiser: SplitDenoiser, obs_part: Tensor, action: Tensor, t: int | Tensor) -> Tensor:
    """eps_theta(s, a_t, t): obs_part [B, 1, H] from `observe`, action [B, N, A], t an index or [B, N]."""
    return noise_from_parts(denoiser.tail, denoiser.action_weight, obs_part, denoiser.step_bias[t], action)


def noise_from_parts(
    tail: Mapping[str, Tensor], action_weight: Tensor, obs_part: Tensor, step_part: Tensor, action: Tensor
) -> Tensor:
    """`predict_noise` of what a `SplitDenoiser` holds: step_part [H] or [B, N, H] is its bias of the step."""
    return mlp_tail(tail, obs_part + step_part + action @ action_weight.T)


def sample_actions(
    denoiser: SplitDenoiser, schedule: NoiseSchedule, obs_BO: Tensor, noise_BTNA: Tensor, *, prior_std: float
) -> Tensor:
    """N actions per observation, [B, N, A] in [-1, 1]: THE sampler, in training, export and tests."""
    obs_part = observe(denoiser, obs_BO)

    def predict(action_BNA: Tensor, t: int) -> Tensor:
        return predict_noise(denoiser, obs_part, action_BNA, t)

    return reverse_chain(schedule, predict, noise_BTNA, prior_std=prior_std)


# --- the Gaussian policy of SAC ---------------------------------------------------------------------------

LOG_STD_RANGE = (-20.0, 2.0)


def init_gaussian(obs_size: int, action_size: int, hidden: Sequence[int], generator: torch.Generator) -> Params:
    """An MLP from the observation to the mean and log standard deviation of every action dimension."""
    return init_mlp([obs_size, *hidden, 2 * action_size], generator)


def gaussian(params: Mapping[str, Tensor], obs_BO: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation before the tanh, [B, A] each."""
    mean, log_std = mlp_tail(params, linear(params, 0, obs_BO)).chunk(2, dim=-1)
    return mean, log_std.clamp(*LOG_STD_RANGE)
