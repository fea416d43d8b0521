"""Renders a recorded episode to an animation; runs in a process of its own (see `rsm_eval.animation`).

    python -m rsm_eval.render_worker JOB.npz OUT.webp POSTER.webp

An OpenGL library that is missing or broken may end the process that loads it; hence the process.
"""

from __future__ import annotations

import functools
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rsm_eval.envs import BoxEnv, env_seed, make_env

WIDTH = 400
"""Pixels; the height follows from the environment's own frames."""
_STRIP = 30
"""Height of the strip of text below a frame, pixels."""

MAX_BYTES = 1_200_000
"""A report embeds the animation as base64, which adds a third."""

_BACKDROP = ((58, 70, 84), (30, 38, 48))
"""Top and bottom colour where a scene has no sky of its own."""

Frame = NDArray[np.uint8]


def main(argv: list[str]) -> int:
    """Render the job and write both files."""
    job_path, animation_path, poster_path = (Path(argument) for argument in argv)
    with np.load(job_path, allow_pickle=False) as job:
        arrays = {key: job[key] for key in job.files}
    frames = replay(
        make_env(str(arrays["env_id"]), json.loads(str(arrays["env_args"])), render_mode="rgb_array"),
        int(arrays["seed"]),
        arrays["actions"],
        arrays["observations"],
        arrays["rewards"],
        stride=int(arrays["stride"]),
        control_dt_s=float(arrays["control_dt_s"]),
    )
    animation_path.write_bytes(encode(frames, frame_ms=float(arrays["frame_ms"]), max_bytes=MAX_BYTES))
    frames[0].save(poster_path, "WEBP", quality=80)
    return 0


def replay(
    env: BoxEnv,
    seed: int,
    actions: NDArray[np.float32],
    observations: NDArray[np.float32],
    rewards: NDArray[np.float64],
    *,
    stride: int,
    control_dt_s: float,
) -> list[Image.Image]:
    """Every `stride`-th frame of the episode, with its step, time and return written on it; closes `env`.

    Raises:
        RuntimeError: the simulator did not repeat the recorded observations.
    """
    has_sky = _prepare_scene(env)
    frames = []
    obs, _ = env.reset(seed=env_seed(seed))
    for step, action in enumerate(actions):
        if not np.allclose(obs, observations[step], rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"the simulator did not repeat the recorded episode at step {step}")
        if step % stride == 0:
            frame = _render(env)
            image = Image.fromarray(frame if has_sky else _on_backdrop(frame))
            text = f"step {step}   t = {step * control_dt_s:.2f} s   return {rewards[:step].sum():.1f}"
            frames.append(_captioned(image, text, step / max(1, len(actions) - 1)))
        obs, *_ = env.step(action.astype(env.action_space.dtype))
    env.close()
    return frames


def encode(frames: list[Image.Image], *, frame_ms: float, max_bytes: int) -> bytes:
    """An endless animated WebP of at most `max_bytes`, with fewer frames if that is what it takes."""
    keep = 1
    while True:
        buffer = io.BytesIO()
        kept = frames[::keep]
        kept[0].save(
            buffer,
            "WEBP",
            save_all=True,
            append_images=kept[1:],
            duration=round(frame_ms * keep),
            loop=0,
            quality=60,
            method=2,
        )
        if buffer.tell() <= max_bytes or len(kept) == 1:
            return buffer.getvalue()
        keep += 1


def _render(env: BoxEnv) -> Frame:
    frame: Any = env.render()
    return np.ascontiguousarray(frame, dtype=np.uint8)


def _prepare_scene(env: BoxEnv) -> bool:
    """Light a MuJoCo scene, follow the robot and keep software rendering quick; True if it has a sky."""
    model = getattr(env.unwrapped, "model", None)
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if model is None or renderer is None:
        return True
    import mujoco

    # The models of Gymnasium are lit for a window on a dark desktop.
    model.vis.headlight.ambient[:] = 0.35
    model.vis.headlight.diffuse[:] = 0.65
    model.vis.quality.shadowsize = 1024
    # Gymnasium 1.4 leaves the model's tracking camera for a free one that a runner runs away from.
    track = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    config = getattr(renderer, "default_cam_config", None) or {}
    if track >= 0 and "trackbodyid" not in config:
        renderer.camera_id = track
    return bool((model.tex_type == int(mujoco.mjtTexture.mjTEXTURE_SKYBOX)).any())


def _on_backdrop(frame: Frame) -> Frame:
    """Replace what nothing was drawn on (pure black) by a vertical gradient."""
    empty = frame.max(axis=2) == 0
    top, bottom = (np.array(colour, dtype=np.float64) for colour in _BACKDROP)
    ramp = np.linspace(0.0, 1.0, len(frame))[:, None]
    gradient = (top + ramp * (bottom - top)).astype(np.uint8)
    return np.where(empty[:, :, None], gradient[:, None, :], frame)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(14)


def _captioned(image: Image.Image, text: str, progress: float) -> Image.Image:
    """The frame at WIDTH over a strip with the text and a progress bar."""
    height = round(image.height * WIDTH / image.width)
    canvas = Image.new("RGB", (WIDTH, height + _STRIP), (16, 21, 28))
    canvas.paste(image.resize((WIDTH, height), Image.Resampling.BILINEAR))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, height, round(WIDTH * progress), height + 2), fill=(86, 156, 255))
    draw.text((12, height + 8), text, font=_font(), fill=(232, 236, 242))
    return canvas


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
