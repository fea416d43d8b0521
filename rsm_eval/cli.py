"""rsm-eval: measure policies in the simulator, print a table, write a report."""

from __future__ import annotations

import contextlib
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsm_common.commandline import (
    GroupedOption,
    aligned,
    dataclass_options,
    require_extra,
    run_command,
)
from rsm_common.default_group import DefaultCommand, DefaultGroup
from rsm_common.output import check_writable, write_atomically

if TYPE_CHECKING:
    from rsm_eval.animation import Animation, NoAnimation
    from rsm_eval.evaluation import EvalConfig, Evaluation
    from rsm_eval.learning import LearningCurve
    from rsm_eval.sources import OpenedPolicy

_MODULES = ("gymnasium", "mujoco", "scipy")
_REPORT_MODULES = ("matplotlib", "jinja2", "PIL")
EXAMPLES = (
    ("Measure the best checkpoint of a run", "rsm-eval --policy runs/pendulum"),
    (
        "Compare a run, its bundle and its server in the same episodes, with a report",
        "rsm-eval --policy runs/pendulum --policy bundles/pendulum \\\n"
        "    --policy grpc://localhost:8001/pendulum --seeds 0-4 --report report.html",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of rsm-eval; returns the exit status: 0, or 2 after a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _command(shlex.join(["rsm-eval", *arguments])), arguments)


def _command(typed: str) -> click.Command:
    require_extra("rsm-eval", "eval", _MODULES)
    from rsm_eval.curves.command import curves_command
    from rsm_eval.evaluation import EvalConfig

    @click.group(
        "rsm-eval",
        cls=DefaultGroup,
        other_usages=("curves RUN... [OPTIONS]",),
        context_settings={"max_content_width": 110},
    )
    @click.version_option(package_name="rsm-toolkit")
    def commands() -> None:
        """Measure the returns and the latency of policies in a simulator, and write a report."""

    @commands.command("evaluate", cls=DefaultCommand, usage="--policy SOURCE [OPTIONS]", examples=EXAMPLES)
    @click.option(
        "--policy",
        "sources",
        multiple=True,
        required=True,
        metavar="SOURCE",
        cls=GroupedOption,
        group="Policies",
        help="Run directory, checkpoint, bundle directory, model.onnx, grpc[s]://host:port/name or "
        "grpc:unix:path/name; repeat the option to compare policies.",
    )
    @dataclass_options(EvalConfig)
    def evaluate(sources: tuple[str, ...], **settings: Any) -> int:
        """Measure the returns and the latency of policies in a simulator, and write a report."""
        return _run(sources, EvalConfig(**settings), typed)

    commands.add_command(curves_command(typed))
    return commands


def _run(sources: Sequence[str], config: EvalConfig, typed: str) -> int:
    from rsm_eval.evaluation import evaluate
    from rsm_eval.sources import open_policy

    if config.report is not None:
        require_extra("rsm-eval --report", "eval", _REPORT_MODULES)
    for path in (config.report, config.json):
        if path is not None:
            check_writable(path)
    started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_policy(source, config.backend)) for source in sources]
        # Read before the minutes of rollouts, so that a wrong --run is refused at once.
        curve = _learning_curve(config, opened)
        evaluation = evaluate(
            opened,
            config,
            command=typed,
            started_at=started_at,
            progress=lambda text: click.echo(text, err=True),
        )
    click.echo(format_table(evaluation))
    if config.json is not None:
        write_atomically(config.json, json.dumps(evaluation.to_dict(), indent=1) + "\n")
        click.echo(f"\nmeasurements: {config.json}")
    if config.report is not None:
        _write_report(config.report, evaluation, curve)
    return 0


def _learning_curve(config: EvalConfig, opened: Sequence[OpenedPolicy]) -> LearningCurve | None:
    from rsm_eval.learning import METRICS_FILE, load_learning_curve

    if config.run is not None:
        return load_learning_curve(config.run)
    runs = [policy.run_dir for policy in opened if policy.run_dir is not None]
    runs = [run for run in runs if (run / METRICS_FILE).is_file()]
    return load_learning_curve(runs[0]) if runs else None


def _write_report(path: Path, evaluation: Evaluation, curve: LearningCurve | None) -> None:
    from rsm_eval.animation import NoAnimation
    from rsm_eval.report import render_report

    click.echo("rendering the report", err=True)
    animation = _animation(evaluation)
    if isinstance(animation, NoAnimation):
        click.echo(f"\nno animation in the report: {animation.reason}")
    write_atomically(path, render_report(evaluation, curve=curve, animation=animation))
    click.echo(f"\nreport: {path}")


def _animation(evaluation: Evaluation) -> Animation | NoAnimation:
    from rsm_eval.animation import render_animation

    trajectory = evaluation.policies[0].rollouts[0].trajectory
    assert trajectory is not None, "evaluate() records the first episode of the first policy"
    return render_animation(
        evaluation.env_id, trajectory, env_args=evaluation.env_args, control_dt_s=evaluation.control_dt_s
    )


def format_table(evaluation: Evaluation) -> str:
    """The results as aligned plain text: returns, then latency per stage in milliseconds."""
    from rsm_common.policy import STAGES
    from rsm_eval.formats import format_ms, format_return

    kind = "deterministic" if evaluation.config.deterministic else "sampled"
    title = (
        f"{evaluation.env_id}: {evaluation.policies[0].summary.episodes} episodes per policy, "
        f"evaluation seeds {evaluation.config.seeds}, {kind} actions"
    )
    rows = [["policy", "mean", "std", "IQM", "95 % interval", "min", "max", "p50 ms", "p99 ms"]]
    stages = [["latency, p50 / p99 ms", *STAGES]]
    for policy in evaluation.policies:
        s, latency = policy.summary, policy.latency
        numbers = [format_return(value) for value in (s.mean, s.std, s.iqm)]
        interval = f"[{format_return(s.iqm_low)}, {format_return(s.iqm_high)}]"
        totals = [format_ms(latency.percentile_ms("total", p)) if latency else "-" for p in (50, 99)]
        extremes = [format_return(s.minimum), format_return(s.maximum)]
        rows.append([policy.label, *numbers, interval, *extremes, *totals])
        if latency:
            pairs = [[format_ms(latency.percentile_ms(stage, p)) for p in (50, 99)] for stage in STAGES]
            stages.append([policy.label, *(" / ".join(pair) for pair in pairs)])
    tables = [aligned(rows)] + ([aligned(stages)] if len(stages) > 1 else [])
    return "\n\n".join([title, *tables])


if __name__ == "__main__":
    sys.exit(main())
