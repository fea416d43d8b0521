"""The command `rsm-client`: ask a server from the shell; needs only the base install."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from rsm_common.commandline import EXIT_OK, GroupedCommand, run_command
from rsm_common.errors import InvalidRequestError, UsageError
from rsm_serve.client import check_health
from rsm_serve.client.target import TLS_SCHEME, Target
from rsm_serve.commands import replay as replaying
from rsm_serve.commands import replay_report, replay_targets
from rsm_serve.commands.bench import measure, table
from rsm_serve.commands.client_options import (
    CONNECTION,
    DEFAULT_ADDRESS,
    OUTPUT,
    REQUEST,
    client_id_option,
    connect,
    connection_options,
    credentials,
    option,
    tls_of_options,
)
from rsm_serve.commands.client_values import answer_json, read_observation
from rsm_serve.recording import format as recording

EXIT_NOT_SERVING = 1
EXIT_DIFFERENT = 1


def _command(*examples: tuple[str, str]) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand of rsm-client.

    Args:
        examples: (purpose, command line) of each example in its help text.
    """
    return command.command(cls=GroupedCommand, examples=examples)


@click.group("rsm-client", context_settings={"max_content_width": 110})
@click.version_option(package_name="rsm-toolkit")
def command() -> None:
    """Send requests to a policy server."""
    # Our errors explain what is wrong with a connection, so gRPC need not log it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@_command(
    ("The current version of the only policy of a server on this machine", "rsm-client info"),
    (
        "Version 3 of a policy, over TLS",
        "rsm-client info --address grpcs://robots.example:8001/pendulum:3",
    ),
)
@connection_options
def info(address: str, policy: str | None, version: str | None, timeout_s: float) -> int:
    """Print the specification of a policy as JSON."""
    with connect(address, policy, version, timeout_s) as client:
        content = json.loads(client.spec.to_json())
        content["server"] = {
            "address": client.target.address,
            "version": client.server_version,
            "max_batch_size": client.max_batch_size,
        }
    click.echo(json.dumps(content, indent=2))
    return EXIT_OK


@_command(
    (
        "One action, with a seed that replays it",
        "rsm-client act --obs 0.1,0,-0.2,0 --seed 7",
    ),
    (
        "The observations in a file",
        "rsm-client act --address unix:/run/rsm.sock --obs-file obs.npy",
    ),
)
@connection_options
@option(REQUEST, "--obs", default=None, help="One observation, comma separated.  [default: zeros]")
@option(REQUEST, "--obs-file", type=click.Path(path_type=Path), help="A .npy file of shape [O] or [B, O].")
@option(
    REQUEST,
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    help="Seed of the noise. The seed of an answer repeats the answer.",
)
@option(REQUEST, "--deterministic", is_flag=True, help="Use the constant seed of deterministic actions.")
@client_id_option
def act(
    address: str,
    policy: str | None,
    version: str | None,
    timeout_s: float,
    obs: str | None,
    obs_file: Path | None,
    seed: int | None,
    deterministic: bool,
    client_id: str,
) -> int:
    """Sample an action and print it as JSON."""
    with connect(address, policy, version, timeout_s, client_id) as client:
        rows = read_observation(client.spec, obs, obs_file)
        result = client.act(rows, seed=seed, deterministic=deterministic)
    click.echo(json.dumps(answer_json(result), indent=2))
    return EXIT_OK


@_command(
    ("Whether the server on this machine is ready", "rsm-client health"),
    (
        "Whether one policy is ready",
        "rsm-client health --address 192.0.2.7:8001 --policy pendulum",
    ),
)
@option(CONNECTION, "--address", default=DEFAULT_ADDRESS, show_default=True, help="host:port or unix:/path.")
@option(CONNECTION, "--policy", default="", help="Check one policy instead of the whole server.")
@option(CONNECTION, "--timeout", "timeout_s", default=1.0, show_default=True, help="Seconds to wait.")
@credentials
def health(address: str, policy: str, timeout_s: float) -> int:
    """Exit with 0 if the server is ready, 1 if it is not, and 2 if no server answers."""
    status = check_health(address, policy, timeout_s=timeout_s, tls=tls_of_options())
    click.echo(status)
    return EXIT_OK if status == "SERVING" else EXIT_NOT_SERVING


@_command(
    ("1000 calls and 1000 steps of a stream", "rsm-client bench"),
    (
        "Steps with 8 observations each, as JSON",
        "rsm-client bench --mode stream --steps 5000 --rows 8 --json",
    ),
)
@connection_options
@option(REQUEST, "--mode", type=click.Choice(["act", "stream", "both"]), default="both", show_default=True)
@option(
    REQUEST,
    "--steps",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Number of measured calls.",
)
@option(
    REQUEST,
    "--warm-up",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Number of calls before the measurement.",
)
@option(REQUEST, "--rows", type=click.IntRange(1), default=1, show_default=True, help="Observations per call.")
@option(OUTPUT, "--json", "as_json", is_flag=True, help="Print JSON.")
@client_id_option
def bench(
    address: str,
    policy: str | None,
    version: str | None,
    timeout_s: float,
    mode: str,
    steps: int,
    warm_up: int,
    rows: int,
    as_json: bool,
    client_id: str,
) -> int:
    """Measure the latency of one client in a closed loop."""
    report: dict[str, Any] = {"steps": steps, "rows": rows}
    with connect(address, policy, version, timeout_s, client_id) as client:
        obs = np.zeros((rows, client.spec.observation.size), np.float32)
        report["policy"] = f"{client.spec.name}:{client.spec.version}"
        if mode in ("act", "both"):
            report["act"] = measure(client.act, obs, steps, warm_up)
        if mode in ("stream", "both"):
            with client.stream() as stream:
                report["stream"] = measure(stream.act, obs, steps, warm_up)
    click.echo(json.dumps(report, indent=2) if as_json else table(report))
    return EXIT_OK


@_command(
    (
        "Ask the server again",
        "rsm-client replay records --against 127.0.0.1:8001",
    ),
    (
        "Ask version 4 of a bundle",
        "rsm-client replay records --against bundles/pendulum --version 4",
    ),
)
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR_OR_FILES...")
@option(
    CONNECTION,
    "--against",
    required=True,
    metavar="TARGET",
    help="Server or bundle that answers the requests: host:port, unix:/path, "
    "grpc://host:port/NAME[:VERSION], or a bundle's directory.",
)
@option(
    CONNECTION,
    "--policy",
    default="",
    help="Policy of the records.  [default: the policy of --against, or all]",
)
@option(
    CONNECTION,
    "--version",
    default="",
    help="Version that answers.  [default: the recorded version]",
)
@option(REQUEST, "--limit", type=click.IntRange(1), help="Largest number of records.  [default: all]")
@option(
    OUTPUT,
    "--tolerance",
    type=click.FloatRange(0, 1),
    help="Largest difference, as a fraction of the action range.  [default: the policy's]",
)
@option(
    CONNECTION,
    "--timeout",
    "timeout_s",
    default=30.0,
    show_default=True,
    help="Deadline in seconds, for the connection and for each call.",
)
@option(OUTPUT, "--json", "as_json", is_flag=True, help="Print JSON.")
@credentials
def replay(
    records: tuple[Path, ...],
    against: str,
    policy: str,
    version: str,
    limit: int | None,
    tolerance: float | None,
    timeout_s: float,
    as_json: bool,
) -> int:
    """Send recorded requests again, and compare the actions with the recorded ones.

    The records are those of rsm-serve --record. The exit status is 0 if all actions agree, 1 if an action
    differs, and 2 if no record could be compared.
    """
    reader = recording.read(*records)
    report = replay_report.Report(against, tolerance)
    target = _answering(against, version, timeout_s)
    try:
        replaying.replay(reader, target, report, policy=policy, limit=limit)
    finally:
        target.close()
    report.unreadable = reader.unreadable
    if reader.vanished:
        click.echo(
            f"rsm-client: {reader.vanished} files were deleted by the recorder before they were read", err=True
        )
    if not report.compared and not report.failed_now:
        raise UsageError(_nothing_compared(report))
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else replay_report.table(report))
    return EXIT_OK if report.agrees else EXIT_DIFFERENT


def _answering(against: str, version: str, timeout_s: float) -> replay_targets.Against:
    try:
        here = Path(against).exists()
    except OSError:  # too long a name for a file, or a directory that may not be searched
        here = False
    if here:
        return replay_targets.Bundles(Path(against), version)
    try:
        target = Target.parse(against, version=version or None)
    except InvalidRequestError as error:
        raise UsageError(f"{error}; and there is no bundle of that path") from None
    address = f"{TLS_SCHEME if target.tls else ''}{target.address}"
    return replay_targets.Server(target, lambda name, number: connect(address, name, number, timeout_s))


def _nothing_compared(report: replay_report.Report) -> str:
    for what, why in report.missing.items():
        return f"wanted answers for {what} to compare, got none: {why}"
    return (
        f"wanted records of answered requests, got none among {report.records} ({report.other_policies} of "
        f"other policies, {report.unreadable} unreadable); check the path and --policy"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
