"""rsm-export: make a bundle from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rsm_export.config import ExportConfig
from rsm_serve.commandline import dataclass_options, require_extra, run_command


@click.command("rsm-export", context_settings={"max_content_width": 110})
@click.version_option(package_name="rsm-toolkit")
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
@click.option(
    "--repo",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of bundles, also a Triton model repository; created if needed.",
)
@click.option("--name", help="Name of the policy; by default that of the run.")
@dataclass_options(ExportConfig)
def command(source: Path, repo: Path, name: str | None, **settings: Any) -> None:
    """Unroll a policy into one ONNX graph and write it as the next version in a repository.

    The graph must act like the checkpoint, or nothing is written. Of a run, the checkpoint with the best
    evaluation is taken.
    """
    require_extra("rsm-export", "export", ["torch", "onnx", "onnxruntime", "safetensors"])
    from rsm_export.exporter import export_checkpoint

    made = export_checkpoint(source, repo, name, ExportConfig(**settings))
    if made.verification is None:
        click.echo("not verified")
    else:
        for check in made.verification.checks:
            click.echo(f"{check.name + ':':<14}{check.finding}")
    spec, cost = made.spec, made.cost
    click.echo(
        f"{'graph:':<14}{spec.sampler}, {spec.steps} steps, {spec.particles} particles, {spec.precision}; "
        f"{cost.nodes} nodes, {cost.flops / 1e6:.3g} MFLOP and {cost.activation_bytes / 1e6:.3g} MB written "
        f"per action, {cost.weight_bytes / 1e6:.3g} MB of weights"
    )
    click.echo(f"{'bundle:':<14}{made.path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of rsm-export; returns the exit status."""
    return run_command(command, argv)
