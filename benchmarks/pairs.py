"""Compare the speed of this source tree with that of an earlier one, in pairs.

    git worktree add /tmp/before COMMIT
    python benchmarks/pairs.py --before /tmp/before [--only SECTION]... [--setting NAME]... [--out FILE]

Both trees run with the packages of this environment. They take turns, so that a slow minute of the machine
slows both. A ratio is after / before of one turn; the report has the median and the quartiles of the turns.
"before, again" is a second process of the earlier tree; its ratios show the noise.

serving   p50 of one client that sends prepared messages, unary and stream, to a server of each tree
clients   messages per second that 64 such clients get, unary and stream
learner   seconds of one update and milliseconds of one action, of benchmarks/learner.py on two threads
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import serving
from record import write_record

AFTER = Path(__file__).parent.parent
PUBLISH = """
import pathlib, random_policy
random_policy.publish(pathlib.Path({!r}), random_policy.make_spec("n1", 20, 1))
"""


def environment(tree: Path) -> dict[str, str]:
    """Variables that make Python import the packages of a tree."""
    paths = [tree, tree / "export", tree / "benchmarks", os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "lower_quartile": round(low, 4), "upper_quartile": round(high, 4)}


@contextlib.contextmanager
def servers(trees: dict[str, Path], directory: Path) -> Iterator[dict[str, serving.Server]]:
    """Run `rsm-serve` of each tree with the same random policy, on one thread."""
    with contextlib.ExitStack() as stack:
        running = {}
        for name, tree in trees.items():
            repository = directory / name
            repository.mkdir()
            code = PUBLISH.format(str(repository))
            subprocess.run([sys.executable, "-c", code], env=environment(tree), cwd=tree, check=True)
            moved = (tree / "rsm_serve" / "commands" / "serve_cli.py").exists()
            module = "rsm_serve.commands.serve_cli" if moved else "rsm_serve.cli"
            command = [
                sys.executable,
                "-P",
                "-m",
                module,
                "--repo",
                str(repository),
                "--address",
                "127.0.0.1:0",
            ]
            running[name] = stack.enter_context(serving.started(command, environment(tree)))
        yield running


def measure_serving(trees: dict[str, Path], rounds: int, directory: Path) -> dict[str, Any]:
    """Compare the latency of one client."""
    message = serving.act_message("n1")
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(servers(trees, directory))
        calls: dict[str, Callable[[], object]] = {}
        for name, server in running.items():
            channel = stack.enter_context(grpc.insecure_channel(server.address))
            calls[f"unary {name}"] = serving._unary(channel, message)
            calls[f"stream {name}"] = serving._stream(channel, message)
        serving.interleaved(calls, 1, 200)
        p50_us: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, times in serving.interleaved(calls, 1, 200).items():
                p50_us[name].append(statistics.median(times))
    return {kind: compare({name: p50_us[f"{kind} {name}"] for name in trees}) for kind in ("unary", "stream")}


def measure_clients(trees: dict[str, Path], rounds: int, directory: Path) -> dict[str, Any]:
    """Compare the throughput of many clients."""
    message = serving.act_message("n1")
    report: dict[str, Any] = {}
    with servers(trees, directory) as running:
        for kind, method in (("unary", serving.UNARY), ("stream", serving.STREAM)):
            per_s: dict[str, list[float]] = {name: [] for name in trees}
            for _ in range(rounds):
                for name, server in running.items():
                    options = ("--clients", str(serving.CLIENTS))
                    per_s[name].append(serving.load(server, method, message, 2.0, *options)["per_s"])
            report[kind] = compare(per_s)
    return report


def measure_learner(
    trees: dict[str, Path], rounds: int, directory: Path, settings: Sequence[str]
) -> dict[str, Any]:
    """Compare updates and actions of the learner."""
    report: dict[str, Any] = {}
    for setting in settings:
        found: dict[str, dict[str, list[float]]] = {}
        for number in range(rounds):
            for name, tree in trees.items():
                out = directory / f"{setting}-{number}-{name.replace(', ', '-')}.json"
                command = [sys.executable, "benchmarks/learner.py", "--setting", setting, "--threads", "2"]
                subprocess.run(
                    [*command, "--out", str(out)],
                    env=environment(tree),
                    cwd=tree,
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                (result,) = json.loads(out.read_text())["results"]
                for key in ("update_s", "act_ms"):
                    found.setdefault(key, {}).setdefault(name, []).append(result[key])
        report[setting] = {key: compare(values) for key, values in found.items()}
    return report


def compare(values: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of each tree, and the ratios to `before` turn by turn."""
    before = values["before"]
    report: dict[str, Any] = {name: statistics.median(numbers) for name, numbers in values.items()}
    for name, numbers in values.items():
        if name != "before":
            report[f"{name} / before"] = spread([now / then for now, then in zip(numbers, before, strict=True)])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="source tree to compare with")
    sections = ("serving", "clients", "learner")
    parser.add_argument("--only", action="append", choices=sections, help="may be repeated  [all]")
    parser.add_argument("--setting", action="append", help="of benchmarks/learner.py  [dpmd, sdac, quick]")
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = options.setting or ("dpmd", "sdac", "quick")
    measures: dict[str, Callable[[dict[str, Path], int, Path], dict[str, Any]]] = {
        "serving": measure_serving,
        "clients": measure_clients,
        "learner": partial(measure_learner, settings=settings),
    }
    before = options.before.resolve()
    trees = {"before": before, "after": AFTER, "before, again": before}
    report: dict[str, Any] = {"rounds": options.rounds}
    for section in options.only or sections:
        with tempfile.TemporaryDirectory() as directory:
            report[section] = measures[section](trees, options.rounds, Path(directory))
    write_record(report, options.out)


if __name__ == "__main__":
    main()
