"""rsm-train: learn a diffusion policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from rsm_serve.commandline import dataclass_options, require_extra, run_command


def _command() -> click.Command:
    require_extra("rsm-train", "train", ["torch", "gymnasium", "mujoco", "safetensors", "rich", "tensorboard"])
    from rsm_train.config import ALGORITHM_CONFIGS, RunConfig, resolve
    from rsm_train.run_directory import default_run_dir, resume_settings
    from rsm_train.stopping import RunStopped

    @click.command("rsm-train", context_settings={"max_content_width": 110})
    @click.version_option(package_name="rsm-toolkit")
    @dataclass_options(RunConfig, *ALGORITHM_CONFIGS.values(), defaults=False)
    @click.option("--resume", is_flag=True, help="Go on with the run in --out, with its own settings.")
    def command(resume: bool, **given: Any) -> None:
        """Learn a diffusion policy with Reweighted Score Matching.

        A preset sets defaults; every option given on the command line wins over it.
        """
        if resume:
            run, algorithm, run_dir = resume_settings(given)
        else:
            run, algorithm = resolve(given)
            run_dir = default_run_dir(run)
        from rsm_train.loop import train

        try:
            click.echo(f"run directory: {train(run, algorithm, run_dir, resume=resume)}")
        except RunStopped as stopped:
            click.echo(str(stopped), err=True)

    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of rsm-train; returns the exit status."""
    return run_command(_command, argv)
