"""rsm-export: make a bundle from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from rsm_serve.commandline import require_extra, run_command


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
def command(source: Path, repo: Path, name: str | None) -> None:
    """Unroll a policy into one ONNX graph and write it as the next version in a repository.

    The graph must act like the checkpoint (to 1e-5 of the action range at batches of 1, 7 and 64), or
    nothing is written. Of a run, the checkpoint with the best evaluation is taken.
    """
    require_extra("rsm-export", "export", ["torch", "onnx", "onnxscript", "onnxruntime", "safetensors"])
    from rsm_export.exporter import export_checkpoint

    made = export_checkpoint(source, repo, name)
    spec = made.spec
    click.echo(
        f"parity: max error {made.parity.max_error:.1e} of the action range over {made.parity.rows} rows"
    )
    click.echo(
        f"graph: {made.nodes} nodes, {made.model_bytes / 1e3:.0f} kB, "
        f"{spec.steps} steps, {spec.particles} particles, {spec.precision}"
    )
    click.echo(f"bundle: {made.path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of rsm-export; returns the exit status."""
    return run_command(command, argv)
