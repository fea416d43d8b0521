"""rsm-train: learn a diffusion policy."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from rsm_common.commandline import (
    GroupedCommand,
    GroupedOption,
    dataclass_options,
    parse_seeds,
    require_extra,
    run_command,
)
from rsm_common.errors import CheckpointError, ConfigError, TrainingError

if TYPE_CHECKING:
    from rsm_train.run.many_seeds import Plan

EXAMPLES = (
    (
        "Learn to balance a pendulum, in about two minutes on a CPU",
        "rsm-train --env InvertedPendulum-v5 --preset quick --out runs/pendulum",
    ),
    (
        "Learn with five seeds, in a process each; first show what it takes",
        "rsm-train --env HalfCheetah-v5 --seeds 0-4 --dry-run\n"
        "rsm-train --env HalfCheetah-v5 --seeds 0-4 --out runs/cheetah-{seed}",
    ),
)

_run_option = partial(click.option, cls=GroupedOption, group="Run")
_OPTIONS = (
    click.option(
        "--list-presets",
        is_flag=True,
        cls=GroupedOption,
        group="Algorithm",
        help="Show the settings of every preset, and exit.",
    ),
    _run_option(
        "--dry-run",
        is_flag=True,
        help="Show the settings of the run and an estimate of its time, memory and disk. Write nothing. The "
        "measurement takes a few seconds after compilation.",
    ),
    _run_option(
        "--seeds",
        help="Seeds such as 0-4 or 0,3,7. Each seed has a process. The result of a seed is the same, bit for "
        "bit, as that of a single run with this --seed and the same --threads. The default of --threads is 1 "
        "on a CPU and cores / jobs on a GPU. --out must contain {seed}. With --resume, existing runs continue.",
    ),
    _run_option(
        "--jobs",
        type=click.IntRange(1),
        help="Largest number of processes at the same time with --seeds.  [default: cores / threads; on a "
        "GPU all seeds]",
    ),
    _run_option("--resume", is_flag=True, help="Continue the run in --out with its settings."),
)
"""Options of the command that are no settings of a run."""


def _command(argv: Sequence[str]) -> click.Command:
    """The command; an --algo module:Class in its arguments brings the options of that class."""
    require_extra("rsm-train", "train", ["torch", "gymnasium", "mujoco", "safetensors", "rich", "tensorboard"])
    from rsm_train.algorithms.registry import ALGORITHMS
    from rsm_train.config import RunConfig, find_algorithm

    own = [name for name in _named_algorithms(argv) if name not in ALGORITHMS]
    classes = [*ALGORITHMS.values(), *map(find_algorithm, own)]
    configs = dict.fromkeys(algorithm.Config for algorithm in classes)

    @click.command(
        "rsm-train", cls=GroupedCommand, examples=EXAMPLES, context_settings={"max_content_width": 110}
    )
    @click.version_option(package_name="rsm-toolkit")
    @dataclass_options(RunConfig, *configs, defaults=False)
    @_command_options
    def command(
        list_presets: bool, dry_run: bool, seeds: str | None, jobs: int | None, resume: bool, **given: Any
    ) -> None:
        """Train a diffusion policy with Reweighted Score Matching.

        A preset sets defaults. An option on the command line replaces the value of the preset.
        """
        _do(given, list_presets=list_presets, dry_run=dry_run, seeds=seeds, jobs=jobs, resume=resume)

    return command


def _command_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that are no settings of a run."""
    for add in reversed(_OPTIONS):  # as decorators, the last one first
        function = add(function)
    return function


def _do(
    given: Mapping[str, Any],
    *,
    list_presets: bool,
    dry_run: bool,
    seeds: str | None,
    jobs: int | None,
    resume: bool,
) -> None:
    """Do what the options ask for: list, estimate, train one seed or several."""
    if list_presets:
        from rsm_train.run.describe import describe_presets

        click.echo(describe_presets())
        return
    if dry_run and resume:
        raise ConfigError("wanted --dry-run or --resume, got both; leave one of them out")
    if jobs is not None and seeds is None:
        raise ConfigError("wanted --seeds beside --jobs, got --jobs alone; leave it out for a single run")
    plan = None
    if seeds is not None:
        from rsm_train.run.many_seeds import plan as make_plan
        from rsm_train.run.many_seeds import resume_command

        plan = make_plan(given, parse_seeds(seeds), jobs, resume=resume)
    if dry_run:
        _dry_run(given, plan)
    elif plan is not None and seeds is not None:
        _train_seeds(plan, resume_command(given, seeds, jobs))
    else:
        _train(given, resume)


def _named_algorithms(argv: Sequence[str]) -> list[str]:
    """The values of --algo in a command line."""
    values = [text.partition("=")[2] for text in argv if text.startswith("--algo=")]
    return values + [value for option, value in itertools.pairwise(argv) if option == "--algo"]


def _train(given: Mapping[str, Any], resume: bool) -> None:
    from rsm_train.config import resolve, run_directory
    from rsm_train.run.results import read_result
    from rsm_train.run.run_directory import resume_settings
    from rsm_train.run.start import train
    from rsm_train.run.stopping import RunStopped

    if resume:
        run, algorithm, run_dir = resume_settings(given)
    else:
        run, algorithm = resolve(given)
        run_dir = run_directory(run)
    try:
        train(run, algorithm, run_dir, resume=resume)
    except RunStopped as stopped:
        click.echo(str(stopped), err=True)
        return
    result = read_result(run_dir)
    if result is None:
        raise CheckpointError(
            f"wanted an evaluation in the metrics of the run in {str(run_dir)!r}, got none; evaluate its "
            f"best checkpoint with: rsm-eval --policy {shlex.quote(str(run_dir))}"
        )
    click.echo(f"final: {result.final}")
    click.echo(f"best:  {result.best}")
    click.echo(f"run directory: {run_dir}")


def _train_seeds(plan: Plan, go_on: str) -> None:
    from rsm_train.run.many_seeds import failures, format_results, interrupted, run_seeds, unfinished

    click.echo(f"{len(plan.workers)} seeds, {plan.jobs} at once", err=True)
    statuses = run_seeds(plan.workers, plan.jobs, lambda line: click.echo(line, err=True))
    click.echo(format_results(plan.workers, statuses))
    if unfinished(plan.workers, statuses):
        click.echo(f"stopped before the end; go on with: {go_on}", err=True)
    failed = failures(plan.workers, statuses)
    if failed is not None:
        raise TrainingError(failed)
    if interrupted(statuses):
        raise KeyboardInterrupt


def _dry_run(given: Mapping[str, Any], plan: Plan | None) -> None:
    from rsm_train.config import resolve, run_directory
    from rsm_train.run.describe import describe_run
    from rsm_train.run.estimate import estimate, format_estimate, total_s
    from rsm_train.run.metrics import duration

    run, algorithm = resolve(given if plan is None else plan.settings)
    run_dir = run_directory(run)
    click.echo(describe_run(given, run, algorithm, {} if plan is None else plan.origins))
    click.echo(f"\nrun directory: {run_dir}\n")
    cost = estimate(run, algorithm, run_dir)
    click.echo(format_estimate(run, cost))
    if plan is not None:
        rounds = -(-len(plan.workers) // plan.jobs)
        everything = duration(rounds * total_s(run, cost))
        click.echo(
            f"\n{len(plan.workers)} seeds, {plan.jobs} at once: about {everything}, "
            f"{plan.jobs} times the memory, {len(plan.workers)} times the disk"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of rsm-train; returns the exit status."""
    return run_command(partial(_command, sys.argv[1:] if argv is None else argv), argv, "rsm-train")


if __name__ == "__main__":
    sys.exit(main())
