"""rsm-train: learn a diffusion policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rsm_serve.commandline import dataclass_options, require_extra, run_command


def _command() -> click.Command:
    require_extra("rsm-train", "train", ["torch", "gymnasium", "mujoco", "safetensors", "rich", "tensorboard"])
    from rsm_train.config import ALGORITHM_CONFIGS, RunConfig, resolve

    @click.command("rsm-train", context_settings={"max_content_width": 110})
    @click.version_option(package_name="rsm-toolkit")
    @dataclass_options(RunConfig, *ALGORITHM_CONFIGS.values(), defaults=False)
    def command(**given: Any) -> None:
        """Learn a diffusion policy with Reweighted Score Matching.

        A preset sets defaults; every option given on the command line wins over it.
        """
        run, algorithm = resolve(given)
        run_dir = Path(run.out or f"runs/{run.env}-{run.algo}-{run.preset}-s{run.seed}".replace(":", "_"))
        from rsm_train.loop import train

        click.echo(f"run directory: {train(run, algorithm, run_dir)}")

    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of rsm-train; returns the exit status."""
    return run_command(_command, argv)
