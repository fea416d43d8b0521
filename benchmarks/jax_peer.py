"""Seconds per update and per action of a plain JAX program, the peer of the learner.

    pip install 'jax==0.4.27' 'jaxlib==0.4.27' 'numpy<2'
    PYTHONPATH=. python benchmarks/jax_peer.py [--threads 2] [--setting dpmd] [--updates 5] [--out FILE]

A published time holds for the machine it was taken on. This stand-in runs beside the learner, so that a ratio
comes from one machine and one hour. It is the `reference` preset's update, written directly from
the mathematics: the whole update in one `jax.jit`, a `lax.scan` over the denoising steps, and every network
evaluated on every row of the concatenation [s, a_t, time embedding]. No result is computed ahead or shared
between rows, and SDAC evaluates its policy once for each of its K draws. The policy's gradient is taken every
second update; a time is that of a pair of updates, halved.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import write_record

try:
    import jax
    import jax.numpy as jnp
    import jaxlib
except ImportError:
    sys.exit("jax is not installed: python -m pip install 'jax==0.4.27' 'jaxlib==0.4.27' 'numpy<2'")

Array = Any
Tree = Any

# setting: (algorithm, observation size, action size)
SETTINGS = {
    "dpmd": ("dpmd", 17, 6),
    "sdac": ("sdac", 17, 6),
    "humanoid": ("dpmd", 348, 17),
    "acting": ("dpmd", 17, 6),
}
ACTING_ENVS, BATCH = 5, 256
STEPS, PARTICLES, DRAWS, PRIOR_STD = 20, 32, 64, 0.5
HIDDEN, EMBEDDING, EMBEDDING_HIDDEN = (256, 256, 256), 16, 32
GAMMA, REWARD_SCALE, TAU, POLICY_EVERY = 0.99, 0.2, 0.005, 2
CRITIC_LR, POLICY_LR, POLICY_LR_END, DECAY_START, DECAY_STEPS = 3e-4, 3e-4, 3e-5, 25_000, 50_000
TEMPERATURE, TEMPERATURE_LR, TEMPERATURE_EVERY, TARGET_ENTROPY = 5.0, 7e-3, 250, -1.5
EXPLORATION, STATISTICS_RATE = 0.1, 1e-3


class Schedule(NamedTuple):
    """The coefficients of the cosine schedule, [T] each."""

    signal: Array  # sqrt(alpha_bar)
    noise: Array  # sqrt(1 - alpha_bar)
    x0_from_a: Array  # sqrt(1 / alpha_bar)
    x0_from_eps: Array  # sqrt(1 / alpha_bar - 1)
    c1: Array
    c2: Array
    sd: Array


class Batch(NamedTuple):
    obs: Array  # [B, O]
    action: Array  # [B, A]
    reward: Array  # [B]
    next_obs: Array  # [B, O]
    terminated: Array  # [B]


class State(NamedTuple):
    """The state that an update reads and writes."""

    policy: Tree
    policy_average: Tree
    critics: Tree
    critics_target: Tree
    log_alpha: Array
    policy_adam: Tree
    critics_adam: Tree
    alpha_adam: Tree
    q_mean: Array
    q_std: Array
    step: Array


def cosine_schedule() -> Schedule:
    t = np.linspace(0, 1, STEPS + 1)
    level = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - level[1:] / level[:-1], 0.999)
    ab = np.cumprod(1 - beta)
    previous = np.append(1.0, ab[:-1])
    coefficients = (
        np.sqrt(ab),
        np.sqrt(1 - ab),
        np.sqrt(1 / ab),
        np.sqrt(1 / ab - 1),
        beta * np.sqrt(previous) / (1 - ab),
        (1 - previous) * np.sqrt(1 - beta) / (1 - ab),
        np.sqrt(beta * (1 - previous) / (1 - ab)),
    )
    return Schedule(*(jnp.asarray(c, jnp.float32) for c in coefficients))


def init_mlp(key: Array, sizes: tuple[int, ...]) -> Tree:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.truncated_normal(k, -2, 2, (m, n)) / math.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def init_state(key: Array, obs: int, action: int) -> State:
    k_time, k_body, *k_critics = jax.random.split(key, 4)
    policy = {
        "time": init_mlp(k_time, (EMBEDDING, EMBEDDING_HIDDEN, EMBEDDING)),
        "body": init_mlp(k_body, (obs + action + EMBEDDING, *HIDDEN, action)),
    }
    critics = [init_mlp(k, (obs + action, *HIDDEN, 1)) for k in k_critics]
    log_alpha = jnp.log(jnp.float32(TEMPERATURE))
    return State(
        policy=policy,
        policy_average=jax.tree_util.tree_map(jnp.copy, policy),  # a donated buffer may be passed only once
        critics=critics,
        critics_target=jax.tree_util.tree_map(jnp.copy, critics),
        log_alpha=log_alpha,
        policy_adam=adam_init(policy),
        critics_adam=adam_init(critics),
        alpha_adam=adam_init(log_alpha),
        q_mean=jnp.float32(0),
        q_std=jnp.float32(1),
        step=jnp.int32(0),
    )


def mish(x: Array) -> Array:
    return x * jnp.tanh(jax.nn.softplus(x))


def mlp(params: Tree, x: Array) -> Array:
    for weight, bias in params[:-1]:
        x = mish(x @ weight + bias)
    weight, bias = params[-1]
    return x @ weight + bias


def embed_time(params: Tree, t: Array) -> Array:
    half = EMBEDDING // 2
    angle = t[..., None] * jnp.exp(-math.log(1e4) / half * jnp.arange(half))
    return mlp(params, jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1) / math.sqrt(EMBEDDING))


def predict_noise(policy: Tree, obs: Array, action: Array, t: Array) -> Array:
    """eps_theta; obs and embedding are repeated along the action's leading axes."""
    rows = action.shape[:-1]
    obs = jnp.broadcast_to(obs, (*rows, obs.shape[-1]))
    embedding = jnp.broadcast_to(embed_time(policy["time"], t), (*rows, EMBEDDING))
    return mlp(policy["body"], jnp.concatenate([obs, action, embedding], -1))


def min_q(critics: Tree, obs: Array, action: Array) -> Array:
    obs = jnp.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1]))
    q1, q2 = (mlp(critic, jnp.concatenate([obs, action], -1))[..., 0] for critic in critics)
    return jnp.minimum(q1, q2)


def sample(s: Schedule, policy: Tree, obs: Array, action_size: int, key: Array) -> Array:
    """Actions [N, B, A] in [-1, 1]."""
    key, key_prior = jax.random.split(key)
    shape = (PARTICLES, obs.shape[0], action_size)

    def denoise(a: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        t, key = step
        eps = predict_noise(policy, obs, a, t)
        x0 = jnp.clip(a * s.x0_from_a[t] - eps * s.x0_from_eps[t], -1, 1)
        z = jax.random.normal(key, shape)  # sd[0] = 0
        return s.c1[t] * x0 + s.c2[t] * a + s.sd[t] * z, None

    prior = PRIOR_STD * jax.random.normal(key_prior, shape)
    action, _ = jax.lax.scan(denoise, prior, (jnp.arange(STEPS)[::-1], jax.random.split(key, STEPS)))
    return action


def act(
    s: Schedule, action_size: int, policy: Tree, critics: Tree, log_alpha: Array, obs: Array, key: Array
) -> Array:
    """The best of N by min-Q with exploration noise, [B, A], unclipped."""
    key_sample, key_explore = jax.random.split(key)
    action = sample(s, policy, obs, action_size, key_sample)
    best = jnp.argmax(min_q(critics, obs, action), axis=0)
    action = jnp.take_along_axis(action, best[None, :, None], axis=0)[0]
    return action + EXPLORATION * jnp.exp(log_alpha) * jax.random.normal(key_explore, action.shape)


def adam_init(params: Tree) -> Tree:
    zeros = functools.partial(jax.tree_util.tree_map, jnp.zeros_like)
    return zeros(params), zeros(params), jnp.float32(0)


def adam(params: Tree, grads: Tree, state: Tree, lr: Array | float) -> tuple[Tree, Tree]:
    tree_map = jax.tree_util.tree_map
    mean, square, count = state
    count = count + 1
    mean = tree_map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
    square = tree_map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grads)
    lr = lr * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
    params = tree_map(lambda p, m, v: p - lr * m / (jnp.sqrt(v) + 1e-8), params, mean, square)
    return params, (mean, square, count)


def move_average(average: Tree, params: Tree) -> Tree:
    return jax.tree_util.tree_map(lambda a, p: a + TAU * (p - a), average, params)


def step_temperature(state: State, action_size: int) -> State:
    def step(log_alpha: Array, moments: Tree) -> tuple[Array, Tree]:
        entropy = action_size / 2 * (math.log(2 * math.pi * math.e) + 2 * (math.log(EXPLORATION) + log_alpha))
        return adam(log_alpha, entropy - TARGET_ENTROPY * action_size, moments, TEMPERATURE_LR)

    log_alpha, moments = jax.lax.cond(
        state.step % TEMPERATURE_EVERY == 0, step, lambda *same: same, state.log_alpha, state.alpha_adam
    )
    return state._replace(log_alpha=log_alpha, alpha_adam=moments)


def step_critics(state: State, batch: Batch, next_action: Array, times: int) -> tuple[State, Array]:
    next_q = min_q(state.critics_target, batch.next_obs, next_action)
    y = REWARD_SCALE * batch.reward + GAMMA * (1 - batch.terminated) * next_q

    def critic_loss(critics: Tree) -> Array:
        x = jnp.concatenate([batch.obs, batch.action], -1)
        return sum(jnp.mean((mlp(critic, x)[:, 0] - y) ** 2) for critic in critics)

    loss, grads = jax.value_and_grad(critic_loss)(state.critics)
    critics, moments = state.critics, state.critics_adam
    for _ in range(times):
        critics, moments = adam(critics, grads, moments, CRITIC_LR)
    return state._replace(critics=critics, critics_adam=moments), loss


def step_policy(state: State, policy_loss: Callable[[Tree], Array]) -> tuple[State, Array]:
    """Update policy, averaged policy and target critics; runs at every second update."""

    def step(state: State) -> tuple[State, Array]:
        loss, grads = jax.value_and_grad(policy_loss)(state.policy)
        decayed = jnp.clip((state.policy_adam[2] - DECAY_START) / DECAY_STEPS, 0, 1)
        lr = POLICY_LR + (POLICY_LR_END - POLICY_LR) * decayed
        policy, moments = adam(state.policy, grads, state.policy_adam, lr)
        new = state._replace(
            policy=policy,
            policy_adam=moments,
            policy_average=move_average(state.policy_average, policy),
            critics_target=move_average(state.critics_target, state.critics),
        )
        return new, loss

    due = state.step % POLICY_EVERY == 0
    state, loss = jax.lax.cond(due, step, lambda same: (same, jnp.float32(jnp.nan)), state)
    return state, loss


def update_dpmd(s: Schedule, action_size: int, state: State, batch: Batch, key: Array) -> tuple[State, Tree]:
    k_next, k_t, k_eps = jax.random.split(key, 3)
    state = state._replace(step=state.step + 1)
    action = act(s, action_size, state.policy, state.critics, state.log_alpha, batch.next_obs, k_next)
    state, critic_loss = step_critics(state, batch, action, times=2)

    q = min_q(state.critics, batch.next_obs, action)
    weight = jnp.exp(jnp.clip(q - state.q_mean / state.q_std, -3, 3) / jnp.exp(state.log_alpha))
    state = state._replace(
        q_mean=state.q_mean + STATISTICS_RATE * (q.mean() - state.q_mean),
        q_std=state.q_std + STATISTICS_RATE * (q.std() - state.q_std),
    )
    t = jax.random.randint(k_t, q.shape, 0, STEPS)
    eps = jax.random.normal(k_eps, action.shape)
    a_t = s.signal[t, None] * action + s.noise[t, None] * eps

    def policy_loss(policy: Tree) -> Array:
        error = predict_noise(policy, batch.next_obs, a_t, t) - eps
        return jnp.mean(weight[:, None] * error**2)

    state, policy_loss_value = step_policy(state, policy_loss)
    return step_temperature(state, action_size), (critic_loss, policy_loss_value)


def update_sdac(s: Schedule, action_size: int, state: State, batch: Batch, key: Array) -> tuple[State, Tree]:
    k_next, k_action, k_t, k_forward, k_reverse = jax.random.split(key, 5)
    state = state._replace(step=state.step + 1)
    get_action = functools.partial(act, s, action_size, state.policy, state.critics, state.log_alpha)
    next_action = get_action(batch.next_obs, k_next)
    state, critic_loss = step_critics(state, batch, next_action, times=1)

    action = get_action(batch.obs, k_action)
    t = jax.random.randint(k_t, action.shape[:1], 0, STEPS)
    a_t = s.signal[t, None] * action + s.noise[t, None] * jax.random.normal(k_forward, action.shape)
    eps = jax.random.normal(k_reverse, (DRAWS, *a_t.shape))
    lam = jnp.exp(state.log_alpha) / 5

    def policy_loss(policy: Tree) -> Array:
        a0 = s.x0_from_a[t, None] * a_t - s.x0_from_eps[t, None] * eps
        weight = jax.nn.softmax(min_q(state.critics, batch.obs, jnp.clip(a0, -1, 1)) / lam, axis=0)
        predicted = predict_noise(policy, batch.obs, jnp.broadcast_to(a_t, eps.shape), t)
        return jnp.mean(jnp.sum(weight[..., None] * (predicted - eps) ** 2, axis=0))

    state, policy_loss_value = step_policy(state, policy_loss)
    return step_temperature(state, action_size), (critic_loss, policy_loss_value)


UPDATES = {"dpmd": update_dpmd, "sdac": update_sdac}


def random_batch(obs: int, action: int) -> Batch:
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(BATCH, obs)),
        rng.uniform(-1, 1, size=(BATCH, action)),
        rng.normal(size=BATCH),
        rng.normal(size=(BATCH, obs)),
        np.zeros(BATCH),
    )
    return Batch(*(jnp.asarray(a, jnp.float32) for a in arrays))


def median_s(call: Callable[[int], object], repeats: int) -> tuple[float, float]:
    """Median wall time of a call, after one that compiles, and the cores that were busy meanwhile."""
    call(0)
    times = []
    started, cpu_started = time.perf_counter(), time.process_time()
    for i in range(repeats):
        begun = time.perf_counter()
        call(1 + i)
        times.append(time.perf_counter() - begun)
    busy = (time.process_time() - cpu_started) / (time.perf_counter() - started)
    return statistics.median(times), busy


def measure(setting: str, updates: int) -> tuple[float, float]:
    algorithm, obs, action = SETTINGS[setting]
    schedule = cosine_schedule()
    key = jax.random.PRNGKey(0)
    state = init_state(key, obs, action)
    if setting == "acting":
        jitted_act = jax.jit(functools.partial(act, schedule, action))
        rows = np.random.default_rng(0).normal(size=(ACTING_ENVS, obs)).astype(np.float32)

        def acting(i: int) -> object:
            k = jax.random.fold_in(key, i)
            return np.asarray(jitted_act(state.policy, state.critics, state.log_alpha, rows, k)).clip(-1, 1)

        return median_s(acting, 20 * updates)

    update = jax.jit(functools.partial(UPDATES[algorithm], schedule, action), donate_argnums=0)
    batch = random_batch(obs, action)

    def period(i: int) -> None:
        nonlocal state
        for j in range(POLICY_EVERY):
            state, losses = update(state, batch, jax.random.fold_in(key, POLICY_EVERY * i + j))
        jax.block_until_ready((state, losses))

    seconds, busy = median_s(period, updates)
    return seconds / POLICY_EVERY, busy


def limit_threads(threads: int) -> None:
    """Limit the threads; must be called before the first array is made."""
    os.environ["NPROC"] = str(threads)
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    jax.config.update("jax_platforms", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, action="append")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=2)
    parser.add_argument("--updates", type=int, default=5, help="Pairs of updates that are timed.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    limit_threads(options.threads)
    seconds, busy = {}, {}
    for setting in options.setting or SETTINGS:
        wall, cores = measure(setting, options.updates)
        seconds[setting], busy[setting] = round(wall, 5), round(cores, 2)
    write_record(
        {
            "jax": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
            "threads": options.threads,
            "seconds": seconds,
            "cores_busy": busy,
        },
        options.out,
    )


if __name__ == "__main__":
    main()
