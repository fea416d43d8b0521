"""rsm-train: learn a diffusion policy."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from rsm_train.setting_types import TOML_MODULE

if TYPE_CHECKING:
    from rsm_train.run.many_seeds import Plan
    from rsm_train.setting_types import SettingsFile

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
    _run_option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML file of settings, such as total_steps = 20000. They replace those of the preset. An option "
        "on the command line replaces a setting of the file.",
    ),
    _run_option(
        "--save-config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write all settings of the run to a TOML file for --config, and exit. An existing file is "
        "replaced.",
    ),
)
"""Options of the command that are no settings of a run."""


def _command(argv: Sequence[str]) -> click.Command:
    """The command; an --algo module:Class in its arguments brings the options of that class."""
    modules = ["torch", "gymnasium", "mujoco", "safetensors", "rich", "tensorboard", TOML_MODULE]
    require_extra("rsm-train", "train", modules)
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
    def command(list_presets: bool, seeds: str | None, config: Path | None, **options: Any) -> None:
        """Train a diffusion policy with Reweighted Score Matching.

        A preset sets defaults. An option on the command line replaces the value of the preset.
        """
        if list_presets:
            from rsm_train.run.describe import describe_presets

            click.echo(describe_presets())
            return
        modes = {name: options.pop(name) for name in ("dry_run", "jobs", "resume", "save_config")}
        _do(_Given(options, _read(config, options)), seeds=seeds, **modes)

    return command


def _command_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that are no settings of a run."""
    for add in reversed(_OPTIONS):  # as decorators, the last one first
        function = add(function)
    return function


class _Given(NamedTuple):
    """The settings of a command line."""

    options: Mapping[str, Any]
    """None means not given."""
    file: SettingsFile | None
    """Of --config."""


def _do(
    given: _Given,
    *,
    seeds: str | None,
    dry_run: bool,
    jobs: int | None,
    resume: bool,
    save_config: Path | None,
) -> None:
    """Do what the options ask for: save settings, estimate, train one seed or several."""
    if dry_run and resume:
        raise ConfigError("wanted --dry-run or --resume, got both; leave one of them out")
    if jobs is not None and seeds is None:
        raise ConfigError("wanted --seeds beside --jobs, got --jobs alone; leave it out for a single run")
    if save_config is not None:
        if seeds is not None or dry_run:
            other = "--seeds" if seeds is not None else "--dry-run"
            raise ConfigError(f"wanted --save-config or {other}, got both; leave one of them out")
        _save_config(save_config, given, resume)
        return
    plan = None
    if seeds is not None:
        from rsm_train.run.many_seeds import plan as make_plan
        from rsm_train.run.many_seeds import resume_command

        plan = make_plan(given.options, parse_seeds(seeds), jobs, resume=resume, file=given.file)
    if dry_run:
        _dry_run(given, plan)
    elif plan is not None and seeds is not None:
        _train_seeds(plan, resume_command(given.options, seeds, jobs, given.file))
    else:
        _train(given, resume)


def _values(argv: Sequence[str], option: str) -> list[str]:
    """The values of an option in a command line."""
    values = [text.partition("=")[2] for text in argv if text.startswith(f"{option}=")]
    return values + [value for name, value in itertools.pairwise(argv) if name == option]


def _named_algorithms(argv: Sequence[str]) -> list[str]:
    """The algorithms that a command line and its --config name."""
    from rsm_train.settings_file import algorithm_in

    in_files = map(algorithm_in, _values(argv, "--config"))
    return [*_values(argv, "--algo"), *(name for name in in_files if name is not None)]


def _read(config: Path | None, options: Mapping[str, Any]) -> SettingsFile | None:
    if config is None:
        return None
    from rsm_train.settings_file import read_settings

    return read_settings(config, options.get("algo"))


def _save_config(path: Path, given: _Given, resume: bool) -> None:
    from rsm_train.run.run_directory import run_settings
    from rsm_train.settings_file import write_settings

    run, algorithm, _ = run_settings(given.options, resume=resume, file=given.file)
    write_settings(path, run, algorithm)
    click.echo(f"settings: {path}")


def _train(given: _Given, resume: bool) -> None:
    from rsm_train.run.metrics import mute_closed_streams
    from rsm_train.run.results import read_result
    from rsm_train.run.run_directory import run_settings
    from rsm_train.run.start import train
    from rsm_train.run.stopping import RunStopped

    run, algorithm, run_dir = run_settings(given.options, resume=resume, file=given.file)
    try:
        train(run, algorithm, run_dir, resume=resume)
    except RunStopped as stopped:
        click.echo(str(stopped), err=True)
        return
    finally:
        mute_closed_streams()  # for what is said now
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


def _dry_run(given: _Given, plan: Plan | None) -> None:
    from rsm_train.config import resolve, run_directory
    from rsm_train.run.describe import describe_run
    from rsm_train.run.estimate import estimate, format_estimate, total_s
    from rsm_train.run.metrics import duration

    options, file = given
    run, algorithm = resolve(options if plan is None else plan.settings, file=file)
    run_dir = run_directory(run)
    origins = {} if file is None else {name: file.path for name in file.settings if options.get(name) is None}
    if plan is not None:
        origins |= plan.origins
    click.echo(describe_run(options, run, algorithm, origins))
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
