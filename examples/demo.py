"""The whole path on a real task: learn, export, serve, query over gRPC, evaluate.

    python examples/demo.py [--seed 0] [--out demo]

Learns InvertedPendulum-v5 with DPMD, exports the policy as one ONNX graph, serves it on a free loopback
port, asks it for an action, and evaluates the policy in torch, the bundle in this process and the server
on the same episodes. Each step is the command that a user would type.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

ENV_ID = "InvertedPendulum-v5"
NAME = "pendulum"
SOLVED = 950.0
BIN = Path(sys.executable).parent
READY_LINE = re.compile(r"rsm-serve ready: address=(\S+)")


@click.command()
@click.option("--seed", default=0, show_default=True, help="Seed of the training run.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
def main(seed: int, out: Path) -> None:
    """Learn, export, serve, query, evaluate."""
    started = time.monotonic()
    out = fresh_directory(out, seed)
    run_dir, repository = out / "run", out / "bundles"
    results, report = out / "evaluation.json", out / "report.html"
    training = ["--algo", "dpmd", "--preset", "quick", "--env", ENV_ID, "--seed", str(seed)]
    run("rsm-train", *training, "--out", str(run_dir))
    run("rsm-export", str(run_dir), "--repo", str(repository), "--name", NAME)
    with served(repository) as address:
        run("rsm-client", "act", "--address", address, "--obs", "0,0.05,0,0", "--seed", "7")
        sources = [str(run_dir), str(repository / NAME), f"grpc://{address}/{NAME}"]
        policies = [argument for source in sources for argument in ("--policy", source)]
        files = ["--report", str(report), "--json", str(results)]
        run("rsm-eval", "--env", ENV_ID, *policies, "--episodes", "20", *files)
    returns = [policy["summary"]["mean"] for policy in json.loads(results.read_text())["policies"]]
    click.echo(f"\nThe whole path took {time.monotonic() - started:.0f} s. Open {report} in a browser.")
    if min(returns) < SOLVED:
        raise click.ClickException(f"wanted a mean return of at least {SOLVED:g}, got {min(returns):.1f}")


def fresh_directory(base: Path, seed: int) -> Path:
    """A directory that no earlier demo has filled."""
    number = 1
    while (path := base / f"seed{seed}-{number}").exists():
        number += 1
    path.mkdir(parents=True)
    return path


def run(*command: str) -> None:
    """Run one of the toolkit's commands, showing it; stop the demo if it fails."""
    click.echo(f"\n$ {shlex.join(command)}")
    status = subprocess.run([BIN / command[0], *command[1:]], check=False).returncode
    if status:
        raise click.ClickException(f"{command[0]} ended with status {status}")


@contextlib.contextmanager
def served(repository: Path) -> Iterator[str]:
    """Serve a repository on a free port while the block runs; yields the address."""
    command = ["rsm-serve", "--repo", str(repository), "--address", "127.0.0.1:0"]
    click.echo(f"\n$ {shlex.join(command)} &")
    server = subprocess.Popen([BIN / command[0], *command[1:]], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None, "stdout is a pipe"
        line = server.stdout.readline()
        ready = READY_LINE.match(line)
        if ready is None:
            raise click.ClickException(f"rsm-serve did not start (status {server.wait()})")
        click.echo(line.rstrip())
        yield ready[1]
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=30)
    click.echo(f"\nrsm-serve stopped with status {status}")
    if status != os.EX_OK:
        raise click.ClickException("the server did not stop cleanly")


if __name__ == "__main__":
    main()
