"""A diffusion policy in plain numpy: random weights by name, and the chain written out from its formulas.

No torch and nothing of the toolkit: what the toolkit computes is compared with this.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Arrays = dict[str, NDArray[np.float32]]


def mlp_arrays(rng: np.random.Generator, sizes: list[int], prefix: str = "") -> Arrays:
    """layers.i.{weight [out, in], bias [out]}."""
    arrays: Arrays = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        weight = rng.normal(size=(fan_out, fan_in)) / np.sqrt(fan_in)
        arrays[f"{prefix}layers.{i}.weight"] = weight.astype(np.float32)
        arrays[f"{prefix}layers.{i}.bias"] = rng.normal(size=fan_out).astype(np.float32) * np.float32(0.3)
    return arrays


def policy_arrays(obs: int, action: int, width: int, seed: int = 0, *, embedding: int = 16) -> Arrays:
    rng = np.random.default_rng(seed)
    time = mlp_arrays(rng, [embedding, 32, embedding], "time.")
    return time | mlp_arrays(rng, [obs + action + embedding, width, width, width, action])


def critic_arrays(obs: int, action: int, width: int, seed: int) -> Arrays:
    return mlp_arrays(np.random.default_rng(seed), [obs + action, width, width, width, 1])


def mlp(arrays: Arrays, x: Array, prefix: str = "") -> Array:
    last = max(int(name.split(".")[-2]) for name in arrays if name.startswith(f"{prefix}layers."))
    for i in range(last + 1):
        weight, bias = (arrays[f"{prefix}layers.{i}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        x = x @ weight.T + bias
        if i < last:
            x = x * np.tanh(np.logaddexp(0.0, x))  # mish
    return x


def betas(schedule: str, steps: int) -> Array:
    if schedule == "linear":
        return 0.8 * np.linspace(1e-4, 0.999, steps)
    u = np.arange(steps + 1) / steps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1 - f[1:] / f[:-1], 0.999))


def time_features(t: int) -> Array:
    angle = t * 10000.0 ** (-np.arange(8) / 8)
    return np.concatenate([np.sin(angle), np.cos(angle)]) / 4


def act(
    policy: Arrays,
    critics: list[Arrays],
    obs_BO: NDArray[Any],
    noise_BTNA: NDArray[Any],
    *,
    schedule: str,
    prior_std: float,
    low: NDArray[Any],
    high: NDArray[Any],
) -> tuple[Array, Array, Array]:
    """(action [B, A] in environment units, q [B], by how much it beats every other action [B])."""
    rows, steps, particles, _ = noise_BTNA.shape
    beta = betas(schedule, steps)
    ab = np.cumprod(1 - beta)
    obs = np.repeat(obs_BO.astype(np.float64)[:, None], particles, axis=1)
    a = prior_std * noise_BTNA[:, 0].astype(np.float64)
    for k, t in enumerate(reversed(range(steps))):
        embedded = mlp(policy, time_features(t), "time.")
        body = {name: value for name, value in policy.items() if not name.startswith("time.")}
        time = np.broadcast_to(embedded, (rows, particles, len(embedded)))
        eps = mlp(body, np.concatenate([obs, a, time], axis=-1))
        x0 = np.clip(a / np.sqrt(ab[t]) - eps * np.sqrt(1 / ab[t] - 1), -1, 1)
        if t == 0:
            a = x0
            break
        c1 = beta[t] * np.sqrt(ab[t - 1]) / (1 - ab[t])
        c2 = (1 - ab[t - 1]) * np.sqrt(1 - beta[t]) / (1 - ab[t])
        sd = np.sqrt(beta[t] * (1 - ab[t - 1]) / (1 - ab[t]))
        a = c1 * x0 + c2 * a + sd * noise_BTNA[:, k + 1]
    q = np.min([mlp(critic, np.concatenate([obs, a], axis=-1))[..., 0] for critic in critics], axis=0)
    best = q.argmax(axis=1)
    chosen = a[np.arange(rows), best]
    other = np.abs(a - chosen[:, None]).max(axis=2) > 1e-6  # clipped particles may be one action
    gap = q.max(axis=1) - np.where(other, q, -np.inf).max(axis=1)
    return low + (chosen + 1) / 2 * (high - low), q.max(axis=1), gap
