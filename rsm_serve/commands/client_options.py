"""Options that subcommands of `rsm-client` share, and the client that they describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from rsm_common.commandline import GroupedOption
from rsm_serve.client import PolicyClient
from rsm_serve.client.connection import (
    CA_VARIABLE,
    CERT_VARIABLE,
    KEY_VARIABLE,
    TOKEN_VARIABLE,
    Tls,
)
from rsm_serve.client.target import TLS_SCHEME
from rsm_serve.security.token_files import read_tokens

DEFAULT_ADDRESS = "127.0.0.1:8001"
CONNECTION, REQUEST, SECURITY, OUTPUT = "Connection", "Request", "Security", "Output"
"""Sections of the help texts."""


def option(group: str, *names: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option in a section of the help text."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def credentials(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of TLS and token, which go past the subcommand to `connect`.

    No option takes a token itself: every user of the machine sees the arguments of its processes.
    """

    def keep(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
        context.ensure_object(dict)[parameter.name] = value

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
        function = option(SECURITY, name, type=path, help=text, expose_value=False, callback=keep)(function)
    return function


def tls_of_options() -> Tls | None:
    """What the options say on top of the environment; None without options."""
    given = {name: click.get_current_context().obj[f"tls_{name}"] for name in ("ca", "cert", "key")}
    chosen = {name: path for name, path in given.items() if path is not None}
    return replace(Tls.from_environment(), **chosen) if chosen else None


def connect(
    address: str, policy: str | None, version: str | None, timeout_s: float, client_id: str = ""
) -> PolicyClient:
    """Open the client that the options describe; `timeout_s`: seconds to connect, and per call.

    Raises:
        InvalidRequestError: the address or a certificate is wrong.
        ConfigError: the token's file cannot be read.
    """
    path = click.get_current_context().obj["token_file"]
    token = None if path is None else read_tokens(path, of_server=False)[0]
    return PolicyClient(
        address,
        policy,
        version,
        timeout_s=timeout_s,
        connect_timeout_s=timeout_s,  # the first call is a call, too
        client_id=client_id,
        tls=tls_of_options(),
        token=token,
    )


client_id_option = option(
    REQUEST,
    "--client-id",
    default="",
    help="Name of this client; a server with --max-action-step needs it.  [default: none]",
)


def connection_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every subcommand shares; Connection is the first section of the help."""
    function = credentials(function)
    for add in (
        option(
            CONNECTION,
            "--timeout",
            "timeout_s",
            default=5.0,
            show_default=True,
            help="Deadline in seconds, for the connection and for each call.",
        ),
        option(
            CONNECTION, "--version", default=None, help="Version of the policy.  [default: the current version]"
        ),
        option(
            CONNECTION, "--policy", default=None, help="Name of the policy; needed if the server has several."
        ),
        option(
            CONNECTION,
            "--address",
            default=DEFAULT_ADDRESS,
            show_default=True,
            help="host:port, unix:/path or grpc://host:port/NAME[:VERSION]; grpcs:// for TLS.",
        ),
    ):
        function = add(function)
    return function
