"""rsm-export: make a bundle from a checkpoint, and say what is in one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsm_common import atomic
from rsm_common.commandline import (
    EXIT_OK,
    EXIT_USER_ERROR,
    GroupedOption,
    dataclass_options,
    require_extra,
    run_command,
)
from rsm_common.default_group import DefaultCommand, DefaultGroup
from rsm_common.errors import ConfigError
from rsm_export.config import ExportConfig, SearchConfig
from rsm_serve.bundle.contract import MODEL_SUFFIX

if TYPE_CHECKING:
    from rsm_export.auto.search import SearchResult
    from rsm_export.exporter import Export

EXAMPLES = (
    ("Export the best checkpoint of a run", "rsm-export runs/pendulum --repo bundles --name pendulum"),
    (
        "Search for the fastest chain that loses at most 2 % of the return",
        "rsm-export runs/pendulum --repo bundles --auto --tolerance 0.02 --plot auto.svg",
    ),
)


@click.group(
    "rsm-export",
    cls=DefaultGroup,
    other_usages=("inspect BUNDLE [--json]",),
    context_settings={"max_content_width": 110},
)
@click.version_option(package_name="rsm-toolkit")
def commands() -> None:
    """Make a bundle from a checkpoint, or print the content of a bundle.

    The command writes a policy as one ONNX graph, in the next version of a repository. It first checks that
    the graph and the checkpoint give the same actions. If a check fails, it writes no bundle. From a run, it
    takes the checkpoint with the best evaluation. It also makes a bundle from a bare model.onnx.
    """


@commands.command(
    "export", cls=DefaultCommand, usage="RUN_OR_CHECKPOINT --repo DIR [OPTIONS]", examples=EXAMPLES
)
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
@click.option(
    "--repo",
    cls=GroupedOption,
    group="Bundle",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Repository: the directory of all bundles. It is created if needed. Triton can read it too.",
)
@click.option(
    "--name", cls=GroupedOption, group="Bundle", help="Name of the policy.  [default: the name of the run]"
)
@dataclass_options(ExportConfig, SearchConfig)
@click.option(
    "--auto",
    is_flag=True,
    cls=GroupedOption,
    group="Search",
    help="Search for the fastest chain whose return is within --tolerance of the full policy's. The search "
    "varies --steps, --sampler and --particles, except those that you give.",
)
@click.option(
    "--tensorrt",
    is_flag=True,
    cls=GroupedOption,
    group="Precision and runtime",
    help="The same as --backend tensorrt: build the TensorRT engine, check the graph in it and keep it for "
    "rsm-serve.",
)
def export(source: Path, repo: Path, name: str | None, auto: bool, tensorrt: bool, **settings: Any) -> None:
    """Make a bundle from a run, a checkpoint or a bare model.onnx."""
    if tensorrt:
        if settings["backend"] not in (None, "tensorrt"):
            raise ConfigError(f"wanted one runtime, got --tensorrt and --backend {settings['backend']}")
        settings["backend"] = "tensorrt"
    config = ExportConfig(**{item.name: settings[item.name] for item in dataclasses.fields(ExportConfig)})
    closed_loop = SearchConfig(**{item.name: settings[item.name] for item in dataclasses.fields(SearchConfig)})
    if source.suffix == MODEL_SUFFIX and source.is_file():
        if auto or (config, closed_loop) != (ExportConfig(), SearchConfig()):
            raise ConfigError(
                f"wanted a run or checkpoint for options that change the chain, got the graph {str(source)!r}; "
                "leave them out"
            )
        _adopt(source, repo, name)
        return
    _check_together(config, closed_loop, auto)
    require_extra("rsm-export", "export", ["torch", "onnx", "onnxruntime", "safetensors"])
    if auto or closed_loop.env:
        require_extra("comparing returns", "eval", ["gymnasium", "scipy", "matplotlib"])
    from rsm_export.exporter import export_checkpoint

    progress = partial(click.echo, err=True)
    made = export_checkpoint(source, repo, name, config, closed_loop, auto=auto, progress=progress)
    _show(made)
    if made.search is not None:
        _write_search(made.search, closed_loop)


def _check_together(config: ExportConfig, closed_loop: SearchConfig, auto: bool) -> None:
    """Refuse, before anything takes long, options that would be passed over.

    Raises:
        ConfigError: there is one.
    """
    for flag, path in (("--plot", closed_loop.plot), ("--json", closed_loop.json)):
        if path and not auto:
            raise ConfigError(f"wanted --auto with {flag}, got {flag} alone; nothing is searched")
        if path and not path.parent.is_dir():
            raise ConfigError(f"wanted {flag} in a directory that exists, got {str(path)!r}")
    if not auto and not closed_loop.env and closed_loop != SearchConfig():
        raise ConfigError(
            "wanted --auto or --env with --tolerance, --episodes or --env-arg, got neither; nothing acts"
        )
    if not auto and closed_loop.env and not config.verify:
        raise ConfigError("wanted --env as one of the checks, got --no-verify; leave one of them out")


def _show(made: Export) -> None:
    if made.search is not None:
        from rsm_export.auto.search import table

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


def _write_search(result: SearchResult, config: SearchConfig) -> None:
    from rsm_export.auto.search_plot import draw

    try:
        if config.json is not None:
            atomic.write_file(
                config.json, (json.dumps(result.to_dict(), indent=1, default=str) + "\n").encode()
            )
            click.echo(f"{'figures:':<14}{config.json}")
        if config.plot is not None:
            draw(result, config.plot)
            click.echo(f"{'plot:':<14}{config.plot}")
    except OSError as error:
        raise ConfigError(
            f"wanted to write to {str(error.filename)!r}, got {error.strerror}; the bundle is complete"
        ) from None


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _adopt(source: Path, repo: Path, name: str | None) -> None:
    require_extra("rsm-export of a model.onnx", "export", ["onnx", "onnxruntime"])
    from rsm_export.bundles.adoption import adopt_graph

    click.echo(f"bundle: {adopt_graph(source, repo, name)}")


@commands.command("inspect", short_help="Print the content of a bundle, and check its files.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the name of every element.")
def inspect(bundle: Path, as_json: bool) -> int:
    """Print the content of a bundle: sizes and bounds, sampling, accuracy, evaluation, origin, graph.

    BUNDLE is a version directory, a policy directory (its current version) or a bare model.onnx. The exit
    status is 0 only if every hash is right and it can be run.
    """
    require_extra("rsm-export inspect", "export", ["onnx", "onnxruntime"])
    from rsm_export.bundles.inspection import format_report, inspect_path

    report = inspect_path(bundle)
    click.echo(json.dumps(report, indent=2) if as_json else format_report(report))
    if report["problem"] is None:
        return EXIT_OK
    click.echo(f"rsm-export: {report['problem']}", err=True)
    return EXIT_USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of rsm-export; returns the exit status."""
    return run_command(commands, argv)
