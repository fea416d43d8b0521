"""A short run of the real trainer, shared by tests that need a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsm_train.config import resolve
from rsm_train.run.start import train

TINY: dict[str, Any] = {
    "env": "InvertedPendulum-v5",
    "preset": "quick",
    "total_steps": 160,
    "warmup_steps": 100,
    "eval_every": 80,
    "eval_episodes": 2,
    "log_every": 40,
    "batch_size": 16,
    "num_envs": 2,
    "updates_per_step": 1.0,
    "width": 16,
    "particles": 4,
}


def tiny_run(directory: Path, **changes: Any) -> Path:
    """Train for a moment: real environment, real updates, real files."""
    run, algorithm = resolve(TINY | changes)
    return train(run, algorithm, directory)
