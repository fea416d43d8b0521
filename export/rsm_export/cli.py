"""rsm-export: make a bundle from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsm_export.config import ExportConfig, SearchConfig
from rsm_serve.commandline import dataclass_options, require_extra, run_command
from rsm_serve.errors import ConfigError

if TYPE_CHECKING:
    from rsm_export.exporter import Export


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
@click.option(
    "--auto",
    is_flag=True,
    help="Search for the fastest chain (--steps, --sampler and --particles, where not given) whose return is "
    "within --tolerance of the full policy's.",
)
@dataclass_options(ExportConfig, SearchConfig)
def command(source: Path, repo: Path, name: str | None, auto: bool, **settings: Any) -> None:
    """Unroll a policy into one ONNX graph and write it as the next version in a repository.

    The graph must act like the checkpoint, or nothing is written. Of a run, the checkpoint with the best
    evaluation is taken.
    """
    config = ExportConfig(**{item.name: settings[item.name] for item in dataclasses.fields(ExportConfig)})
    closed_loop = SearchConfig(**{item.name: settings[item.name] for item in dataclasses.fields(SearchConfig)})
    require_extra("rsm-export", "export", ["torch", "onnx", "onnxruntime", "safetensors"])
    if auto or closed_loop.env:
        require_extra("comparing returns", "eval", ["gymnasium", "scipy", "matplotlib"])
    elif closed_loop.plot:
        raise ConfigError("wanted --auto with --plot, got --plot alone; there is nothing to draw")
    from rsm_export.exporter import export_checkpoint

    progress = partial(click.echo, err=True)
    made = export_checkpoint(source, repo, name, config, closed_loop, auto=auto, progress=progress)
    _show(made)
    if made.search is not None and closed_loop.plot is not None:
        from rsm_export.search_plot import draw

        draw(made.search, closed_loop.plot)
        click.echo(f"{'plot:':<14}{closed_loop.plot}")


def _show(made: Export) -> None:
    if made.search is not None:
        from rsm_export.search import table

        click.echo(table(made.search) + "\n")
    checks = made.verification.checks if made.verification else ()
    for check in checks:
        click.echo(f"{check.name + ':':<14}{check.finding}")
    if not checks:
        click.echo("not verified")
    spec, cost = made.spec, made.cost
    steps, particles = _plural(spec.steps, "step"), _plural(spec.particles, "particle")
    click.echo(
        f"{'graph:':<14}{spec.sampler}, {steps}, {particles}, {spec.precision}; {cost.nodes} nodes, "
        f"{made.model_bytes / 1e3:.0f} kB"
    )
    click.echo(
        f"{'per action:':<14}{cost.flops / 1e6:.3g} MFLOP, {cost.activation_bytes / 1e6:.3g} MB written, "
        f"{cost.weight_bytes / 1e6:.3g} MB of weights read"
    )
    click.echo(f"{'bundle:':<14}{made.path}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of rsm-export; returns the exit status."""
    return run_command(command, argv)
