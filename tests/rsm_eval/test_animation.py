"""Animations: rendered in a process of their own, and never a reason to fail."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from rsm_eval.animation import Animation, NoAnimation, render_animation
from rsm_eval.render_worker import encode
from rsm_eval.rollout import Trajectory, rollout
from tests.rsm_eval.policies import constant
from tests.rsm_eval.tiny_env import ENV_ID


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    recorded = rollout(constant(ENV_ID, 0.5), ENV_ID, [3], record=0).trajectory
    assert recorded is not None
    return recorded


def test_an_environment_that_draws_itself_needs_no_gl(trajectory):
    animation = render_animation(ENV_ID, trajectory, control_dt_s=0.1)
    assert isinstance(animation, Animation)
    assert (animation.steps, animation.gl) == (5, "egl")
    assert animation.seconds == pytest.approx(0.5)
    film = Image.open(io.BytesIO(animation.webp))
    assert getattr(film, "n_frames", 1) == 5
    assert film.width == 400
    poster = np.asarray(Image.open(io.BytesIO(animation.poster_webp)).convert("RGB"))
    # The first of five columns is filled at the start, the last only at the end of the episode.
    assert poster[200, 40].max() > 150
    assert poster[200, 360].max() < 80
    film.seek(4)
    assert np.asarray(film.convert("RGB"))[200, 360].max() > 150


def test_a_gl_that_fails_is_a_reason_not_an_error(trajectory):
    pendulum = dataclasses.replace(trajectory, observations=np.zeros((6, 4), np.float32))
    result = render_animation("InvertedPendulum-v5", pendulum, control_dt_s=0.04, gl_backends=("broken",))
    assert isinstance(result, NoAnimation)
    assert "broken" in result.reason
    assert "MUJOCO_GL" in result.reason


def test_an_episode_that_does_not_repeat_is_not_shown(trajectory):
    foreign = dataclasses.replace(trajectory, observations=trajectory.observations + 1)
    result = render_animation(ENV_ID, foreign, control_dt_s=0.1, gl_backends=("egl",))
    assert isinstance(result, NoAnimation)
    assert "did not repeat" in result.reason


def test_large_animations_lose_frames_not_speed():
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    whole = encode(frames, frame_ms=50, max_bytes=10_000_000)
    small = encode(frames, frame_ms=50, max_bytes=len(whole) // 3)
    assert len(small) <= len(whole) // 3
    film = Image.open(io.BytesIO(small))
    assert 1 < getattr(film, "n_frames", 1) < 20
    film.load()
    assert film.info["duration"] >= 150
