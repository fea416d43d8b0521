"""Records and run directories that the tests of learning curves share."""

from __future__ import annotations

import json

import numpy as np

from rsm_eval.curves.seed_curve import SeedCurve

STEP = 1000


def seed_curve(seed, steps, returns, *, minutes=None, total_steps=None, label="DPMD paper", task="Ant-v5"):
    return SeedCurve(
        task,
        label,
        seed,
        f"runs/s{seed}",
        np.array(steps, dtype=np.int64),
        np.array(returns, dtype=np.float64),
        None if minutes is None else np.array(minutes, dtype=np.float64),
        total_steps,
    )


def write_run(
    root, name, means, *, algo="dpmd", seed=0, env="Ant-v5", total_steps=None, every=STEP, **settings
):
    """A run directory: the k-th evaluation, of two episodes, is at step `every` k and minute k.

    Further settings go to the algorithm, "preset", "env_arg" and "updates_per_step" to the run.
    """
    run = {
        "env": env,
        "env_arg": settings.pop("env_arg", {}),
        "algo": algo,
        "preset": settings.pop("preset", "paper"),
        "updates_per_step": settings.pop("updates_per_step", 0.2),
        "seed": seed,
        "out": name,
        "eval_every": every,
        "total_steps": every * len(means) if total_steps is None else total_steps,
    }
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"run": run, "algorithm": {"width": 256, **settings}}))
    lines: list[dict[str, object]] = []
    for number, mean in enumerate(means, start=1):
        train = {"kind": "train", "episode_return": mean / 2}
        evaluation = {"kind": "eval", "eval_returns": [mean - 1, mean + 1], "eval1_returns": [mean - 5]}
        lines.append({"step": every * number, "wall_s": 60 * number - 1, **train})
        lines.append({"step": every * number, "wall_s": 60 * number, **evaluation})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory
