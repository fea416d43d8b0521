"""A recorded episode as a small animated picture, rendered without a display."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsm_eval.rollout import Trajectory

GL_BACKENDS = ("egl", "osmesa")
"""Values of MUJOCO_GL that need no display, in the order they are tried."""

MAX_SECONDS = 8.0
FRAMES_PER_SECOND = 20
_ASSUMED_DT_S = 1 / FRAMES_PER_SECOND
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Animation:
    """A rendered episode."""

    webp: bytes
    """Animated WebP."""
    poster_webp: bytes
    """Its first frame, for readers who want no motion."""
    seconds: float
    """Simulated time that is shown."""
    steps: int
    """Control steps that are shown."""
    gl: str
    """The GL backend that rendered it."""


@dataclass(frozen=True)
class NoAnimation:
    """Why there is no animation."""

    reason: str


def render_animation(
    env_id: str,
    trajectory: Trajectory,
    *,
    env_args: Mapping[str, Any] | None = None,
    control_dt_s: float | None,
    gl_backends: tuple[str, ...] = GL_BACKENDS,
    max_seconds: float = MAX_SECONDS,
) -> Animation | NoAnimation:
    """Render the beginning of a recorded episode in real time; never raises for a missing GL.

    The episode is simulated again from its seed and actions, in a process of its own for each GL backend
    that is tried, so that a broken driver cannot take the caller down.

    Args:
        env_id: the environment of the trajectory.
        trajectory: what to show.
        env_args: arguments of its constructor.
        control_dt_s: seconds per step; None if the environment does not say, and one step per frame then.
        gl_backends: values of MUJOCO_GL to try in turn.
        max_seconds: most simulated time to show.
    """
    dt_s = control_dt_s or _ASSUMED_DT_S
    stride = max(1, round(1 / (FRAMES_PER_SECOND * dt_s)))
    steps = min(len(trajectory.actions), max(1, round(max_seconds / dt_s)))
    reasons = []
    with tempfile.TemporaryDirectory(prefix="rsm-eval-") as scratch:
        job = Path(scratch) / "job.npz"
        np.savez(
            job,
            env_id=env_id,
            env_args=json.dumps(dict(env_args or {})),
            seed=np.uint64(trajectory.episode_seed),
            actions=trajectory.actions[:steps],
            observations=trajectory.observations[:steps],
            rewards=trajectory.rewards[:steps],
            stride=stride,
            control_dt_s=dt_s,
            frame_ms=1000.0 * stride * dt_s,
        )
        for gl in gl_backends:
            outputs = (Path(scratch) / f"{gl}.webp", Path(scratch) / f"{gl}-poster.webp")
            failure = _run_worker(gl, job, *outputs)
            if failure is None:
                webp, poster = (path.read_bytes() for path in outputs)
                return Animation(webp, poster, seconds=steps * dt_s, steps=steps, gl=gl)
            reasons.append(f"{gl}: {failure}")
    return NoAnimation("; ".join(reasons) or "no GL backend was to be tried")


def _run_worker(gl: str, job: Path, webp: Path, poster: Path) -> str | None:
    """None if both files were written, else the reason in a few words."""
    command = [sys.executable, "-m", "rsm_eval.render_worker", str(job), str(webp), str(poster)]
    # The worker must find what this process can import, such as an environment's own module.
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "MUJOCO_GL": gl, "PYTHONPATH": paths}
    if gl == "osmesa":
        environment["PYOPENGL_PLATFORM"] = gl
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no result within {_TIMEOUT_S:g} s"
    if done.returncode == 0 and webp.is_file() and poster.is_file():
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else f"the renderer ended with status {done.returncode}"
