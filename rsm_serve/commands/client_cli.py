"""The command `rsm-client`: ask a server from the shell; needs only the base install."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from rsm_common.commandline import EXIT_OK, GroupedCommand, GroupedOption, run_command
from rsm_common.errors import UsageError
from rsm_common.policy import ActResult, Adjustment
from rsm_common.spec import PolicySpec
from rsm_serve.client import PolicyClient, check_health
from rsm_serve.client.connection import (
    CA_VARIABLE,
    CERT_VARIABLE,
    KEY_VARIABLE,
    TOKEN_VARIABLE,
    Tls,
)
from rsm_serve.client.target import TLS_SCHEME, Target
from rsm_serve.commands import replay as replaying
from rsm_serve.commands import replay_report, replay_targets
from rsm_serve.commands.bench import measure, table
from rsm_serve.recording import format as recording
from rsm_serve.security.tokens import read_tokens

EXIT_NOT_SERVING = 1
EXIT_DIFFERENT = 1
DEFAULT_ADDRESS = "127.0.0.1:8001"
CONNECTION, REQUEST, SECURITY, OUTPUT = "Connection", "Request", "Security", "Output"
"""Sections of the help texts."""


def _option(group: str, *names: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option in a section of the help text."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def _command(*examples: tuple[str, str]) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand of rsm-client.

    Args:
        examples: (purpose, command line) of each example in its help text.
    """
    return command.command(cls=GroupedCommand, examples=examples)


def _credentials(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of TLS and token, which go past the subcommand to `_client`.

    No option takes a token itself: every user of the machine sees the arguments of its processes.
    """

    def keep(context: click.Context, option: click.Parameter, value: Path | None) -> None:
        context.ensure_object(dict)[option.name] = value

    for name, text in (
        ("--token-file", f"File with a token.  [default: {TOKEN_VARIABLE}, if set]"),
        # The variables do not switch TLS on: a token would travel in plaintext where that was believed.
        ("--tls-key", f"PEM private key of the certificate.  [default: with TLS, {KEY_VARIABLE}]"),
        (
            "--tls-cert",
            f"PEM certificate chain of this client; switches TLS on.  [default: with TLS, {CERT_VARIABLE}]",
        ),
        (
            "--tls-ca",
            f"PEM certificates of trusted authorities; switches TLS on, as {TLS_SCHEME} in the address does.  "
            f"[default: with TLS, {CA_VARIABLE}]",
        ),
    ):
        path = click.Path(path_type=Path)
        function = _option(SECURITY, name, type=path, help=text, expose_value=False, callback=keep)(function)
    return function


def _tls() -> Tls | None:
    """What the options say on top of the environment; None without options."""
    given = {name: click.get_current_context().obj[f"tls_{name}"] for name in ("ca", "cert", "key")}
    chosen = {name: path for name, path in given.items() if path is not None}
    return replace(Tls.from_environment(), **chosen) if chosen else None


def _client(
    address: str, policy: str | None, version: str | None, timeout_s: float, client_id: str = ""
) -> PolicyClient:
    path = click.get_current_context().obj["token_file"]
    token = None if path is None else read_tokens(path)[0]
    return PolicyClient(
        address,
        policy,
        version,
        timeout_s=timeout_s,
        connect_timeout_s=timeout_s,  # the first call is a call, too
        client_id=client_id,
        tls=_tls(),
        token=token,
    )


_client_id = _option(
    REQUEST,
    "--client-id",
    default="",
    help="Name of this client; a server with --max-action-step needs it.  [default: none]",
)


def _connection(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every subcommand shares; Connection is the first section of the help."""
    function = _credentials(function)
    for option in (
        _option(
            CONNECTION,
            "--timeout",
            "timeout_s",
            default=5.0,
            show_default=True,
            help="Deadline in seconds, for the connection and for each call.",
        ),
        _option(
            CONNECTION, "--version", default=None, help="Version of the policy.  [default: the current version]"
        ),
        _option(
            CONNECTION, "--policy", default=None, help="Name of the policy; needed if the server has several."
        ),
        _option(
            CONNECTION,
            "--address",
            default=DEFAULT_ADDRESS,
            show_default=True,
            help="host:port, unix:/path or grpc://host:port/NAME[:VERSION]; grpcs:// for TLS.",
        ),
    ):
        function = option(function)
    return function


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
@_connection
def info(address: str, policy: str | None, version: str | None, timeout_s: float) -> int:
    """Print the specification of a policy as JSON."""
    with _client(address, policy, version, timeout_s) as client:
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
@_connection
@_option(REQUEST, "--obs", default=None, help="One observation, comma separated.  [default: zeros]")
@_option(REQUEST, "--obs-file", type=click.Path(path_type=Path), help="A .npy file of shape [O] or [B, O].")
@_option(
    REQUEST,
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    help="Seed of the noise. The seed of an answer repeats the answer.",
)
@_option(REQUEST, "--deterministic", is_flag=True, help="Use the constant seed of deterministic actions.")
@_client_id
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
    with _client(address, policy, version, timeout_s, client_id) as client:
        rows = _observation(client.spec, obs, obs_file)
        result = client.act(rows, seed=seed, deterministic=deterministic)
    click.echo(json.dumps(_as_json(result), indent=2))
    return EXIT_OK


@_command(
    ("Whether the server on this machine is ready", "rsm-client health"),
    (
        "Whether one policy is ready",
        "rsm-client health --address 192.0.2.7:8001 --policy pendulum",
    ),
)
@_option(CONNECTION, "--address", default=DEFAULT_ADDRESS, show_default=True, help="host:port or unix:/path.")
@_option(CONNECTION, "--policy", default="", help="Check one policy instead of the whole server.")
@_option(CONNECTION, "--timeout", "timeout_s", default=1.0, show_default=True, help="Seconds to wait.")
@_credentials
def health(address: str, policy: str, timeout_s: float) -> int:
    """Exit with 0 if the server is ready, 1 if it is not, and 2 if no server answers."""
    status = check_health(address, policy, timeout_s=timeout_s, tls=_tls())
    click.echo(status)
    return EXIT_OK if status == "SERVING" else EXIT_NOT_SERVING


@_command(
    ("1000 calls and 1000 steps of a stream", "rsm-client bench"),
    (
        "Steps with 8 observations each, as JSON",
        "rsm-client bench --mode stream --steps 5000 --rows 8 --json",
    ),
)
@_connection
@_option(REQUEST, "--mode", type=click.Choice(["act", "stream", "both"]), default="both", show_default=True)
@_option(
    REQUEST,
    "--steps",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Number of measured calls.",
)
@_option(
    REQUEST,
    "--warm-up",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Number of calls before the measurement.",
)
@_option(REQUEST, "--rows", type=click.IntRange(1), default=1, show_default=True, help="Observations per call.")
@_option(OUTPUT, "--json", "as_json", is_flag=True, help="Print JSON.")
@_client_id
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
    with _client(address, policy, version, timeout_s, client_id) as client:
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
@_option(
    CONNECTION,
    "--against",
    required=True,
    metavar="TARGET",
    help="Server or bundle that answers the requests: host:port, unix:/path, "
    "grpc://host:port/NAME[:VERSION], or a bundle's directory.",
)
@_option(
    CONNECTION,
    "--policy",
    default="",
    help="Policy of the records.  [default: the policy of --against, or all]",
)
@_option(
    CONNECTION,
    "--version",
    default="",
    help="Version that answers.  [default: the recorded version]",
)
@_option(REQUEST, "--limit", type=click.IntRange(1), help="Largest number of records.  [default: all]")
@_option(
    OUTPUT,
    "--tolerance",
    type=click.FloatRange(0, 1),
    help="Largest difference, as a fraction of the action range.  [default: the policy's]",
)
@_option(
    CONNECTION,
    "--timeout",
    "timeout_s",
    default=30.0,
    show_default=True,
    help="Deadline in seconds, for the connection and for each call.",
)
@_option(OUTPUT, "--json", "as_json", is_flag=True, help="Print JSON.")
@_credentials
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
    target = Target.parse(against, version=version or None)
    address = f"{TLS_SCHEME if target.tls else ''}{target.address}"
    return replay_targets.Server(target, lambda name, number: _client(address, name, number, timeout_s))


def _nothing_compared(report: replay_report.Report) -> str:
    for what, why in report.missing.items():
        return f"wanted answers for {what} to compare, got none: {why}"
    return (
        f"wanted records of answered requests, got none among {report.records} ({report.other_policies} of "
        f"other policies, {report.unreadable} unreadable); check the path and --policy"
    )


def _observation(spec: PolicySpec, text: str | None, path: Path | None) -> NDArray[Any]:
    if text is not None and path is not None:
        raise UsageError("wanted --obs or --obs-file, got both; leave one of them out")
    if path is not None:
        try:
            array = np.load(path, allow_pickle=False)
            if isinstance(array, np.ndarray):
                return array
            reason = "an archive of arrays"
            array.close()
        # A damaged file can be a BadZipFile, a MemoryError, a TokenError, ..., and no list of them is complete.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"wanted a .npy file of numbers, got {str(path)!r} ({reason:.200}); check the file")
    if text is None:
        return np.zeros(spec.observation.size, np.float32)
    try:
        return np.array([float(number) for number in text.split(",")], np.float32)
    except ValueError:
        raise UsageError(f"wanted numbers such as 0.1,0,-2 for --obs, got {text!r}") from None


def _as_json(result: ActResult) -> dict[str, Any]:
    return {
        "action": result.action.tolist(),
        "q": None if result.q is None else _numbers(result.q),
        **({} if result.adjusted is None else {"adjusted": _names(result.adjusted)}),
        # Text, because JSON readers round numbers beyond 2**53.
        "seed": None if result.seed is None else _each(result.seed, str),
        "version": result.version,
        "timing_us": {
            "queue": round(result.timing.queue_us, 1),
            "batch": round(result.timing.batch_us, 1),
            "compute": round(result.timing.compute_us, 1),
            "total": round(result.timing.total_us, 1),
            "batch_rows": result.timing.batch_rows,
        },
    }


def _numbers(values: NDArray[np.float32]) -> Any:
    """As JSON has it: null for what is not a number, such as the value of a fallback."""
    return _each(values, lambda value: None if np.isnan(value) else float(value))


def _names(adjusted: NDArray[np.int32]) -> Any:
    names = {kind.value: kind.name.lower() for kind in Adjustment}
    # A newer server may know another one.
    return _each(adjusted, lambda value: names.get(value, str(value)))


def _each(array: NDArray[Any], convert: Callable[[Any], Any]) -> Any:
    """The converted numbers, in lists as deep as the array."""
    return np.vectorize(convert, otypes=[object])(array).tolist()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
