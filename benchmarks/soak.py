"""Put a server under mixed load, check every answer, and look for losses and growth.

    python benchmarks/soak.py --seconds 600 [--out FILE]
    python benchmarks/soak.py --counts 8 4 1000 [--out FILE]

The first form takes 600 s. The second one ends after 8 reloads, 4 kills and 1000 answers; no time limits it.

One rsm-serve process follows a repository of three policies. Client processes of every kind send requests, some
with short deadlines. Every few seconds another version of one policy, with another graph, becomes current,
because it was published or because CURRENT points back. Clients cancel, leave their streams, are killed and
restarted. The graphs compute a known function, so each client checks each answer by its seeds and version. The
exit status is 1 if an answer is wrong, lost or unexpected, or if memory, threads or files grow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from record import write_record
from soak_clients import KINDS, MAX_BATCH, Step, write_policy

from rsm_common.atomic import write_file
from rsm_serve.bundle.contract import CURRENT_FILE
from tests.hang import HANG_S
from tests.server_process import ServerProcess, running_server, wait_until

ROOT = Path(__file__).parent.parent
CLIENTS = Path(__file__).with_name("soak_clients.py")
RELOAD_S = 5.0
KILL_S = 7.0
WINDOW_S = 0.5
"""Before and after the first answer of a new version: the window of a reload."""

RSS_GROWTH = 1.10
"""Of the median of the last quarter over that of the second, beside `RSS_SLACK_MIB`."""
RSS_SLACK_MIB = 8.0
THREADS_GROWTH, FILES_GROWTH = 4, 16
"""Absolute; connections come and go."""

LEFT = 50
"""Requests that are cancelled, and as many that are abandoned, before a soak by counts ends."""


@dataclass(frozen=True)
class Counts:
    """What a soak contains that ends by counts and not by seconds."""

    reloads: int
    kills: int
    """At most as many as reloads: a client is killed while a version is replaced."""
    answers: int


class Client:
    """A client process, seen from its parent."""

    def __init__(self, kind: str, address: str, folder: Path, number: int, seed: str) -> None:
        self.kind = kind
        self.killed = False
        self._out = folder / f"{number}-{kind}.jsonl"
        paths = [str(ROOT), str(ROOT / "export"), os.environ.get("PYTHONPATH", "")]
        with self._out.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(CLIENTS), kind, address, f"{seed}/{number}"],
                stdout=out,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )

    def kill(self) -> None:
        """SIGKILL."""
        self.killed = True
        self._process.kill()
        self._process.wait(HANG_S)

    def stop(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    @property
    def answered(self) -> int:
        """Answers that it has reported."""
        return int(self.told()["outcomes"].get("answered", 0))

    def wait_for_answer(self) -> None:
        """Wait until it reports an answer."""
        wait_until(lambda: self.answered > 0, f"an answer to {self.kind}")

    def result(self) -> dict[str, Any]:
        """The last report of a client that was told to stop."""
        try:
            self._process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self.killed = False  # not by plan: what it had not told is lost
        return self.told()

    def told(self) -> dict[str, Any]:
        """The last complete report."""
        whole = [line for line in self._out.read_text().splitlines(keepends=True) if line.endswith("\n")]
        nothing = {"started": 0, "outcomes": {}, "details": [], "final": False, "steps": [], "version": ""}
        return json.loads(whole[-1]) if whole else nothing


@dataclass
class Sample:
    """The server at one moment."""

    rss_mib: float
    threads: int
    files: int


class Versions:
    """Publishes versions of alpha; each has another graph than the one before it."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._newest = 1
        self._current, self._before = 1, 1
        self.switches = self.published = 0

    def change(self) -> None:
        """Two new versions, then back to the one before, and so on."""
        self.switches += 1
        if self.switches % 3 == 0:
            wanted = self._before
        else:
            wanted = self._newest + (2 if self._newest % 2 == self._current % 2 else 1)
            wanted += wanted % 2 == self._current % 2
            self._newest = wanted
            self.published += 1
            write_policy(self._repository / ".new", "alpha", wanted).rename(
                self._repository / "alpha" / str(wanted)
            )
        write_file(self._repository / "alpha" / CURRENT_FILE, f"{wanted}\n".encode())
        self._before, self._current = self._current, wanted

    @property
    def current(self) -> str:
        """The version that CURRENT names."""
        return str(self._current)


def soak(until: float | Counts, folder: Path, *, seed: str = "1") -> dict[str, Any]:
    """Run the soak for some seconds or until it contains the counts; `failures` states the conditions."""
    started = time.monotonic()
    repository = folder / "repository"
    for policy in ("alpha", "beta", "gamma"):
        write_policy(repository, policy, 1)
    arguments = ("--poll", "0.2", "--max-batch-size", str(MAX_BATCH))
    with running_server(repository, folder / "server.log", *arguments) as server:
        with clients_of(server, folder, seed) as clients:
            versions = Versions(repository)
            conductor = Conductor(server, clients, versions, folder, seed)
            if isinstance(until, Counts):
                conductor.conduct(until)
            else:
                conductor.conduct_for(until)
        loads = server.metric("rsm_loads_total", "policy=alpha", "result=ok")
        executions = server.metric("rsm_executions_total")
        streams = server.metric("rsm_streams_open")
        log = server.log
    ledger = [(client, client.result()) for client in clients]
    reloads = {"switched": versions.switches, "published": versions.published, "loaded": int(loads)}
    return {
        "seconds": round(time.monotonic() - started, 1) if isinstance(until, Counts) else until,
        **summary(ledger),
        "kills": conductor.kills,
        "reloads": reloads,
        "steady": steady_latency([step for client, told in ledger for step in told["steps"]]),
        "server": {
            "executions": int(executions),
            "streams_open_at_the_end": int(streams),
            "tracebacks": log.count("Traceback"),
            **growth(conductor.samples),
        },
    }


@contextmanager
def clients_of(server: ServerProcess, folder: Path, seed: str) -> Iterator[list[Client]]:
    """One client of each kind; all stop at the end."""
    clients: list[Client] = []
    try:
        for number, kind in enumerate(KINDS):
            clients.append(Client(kind, server.address, folder, number, seed))
        yield clients
    finally:
        for client in clients:
            client.stop()
        for client in clients:
            client.result()


class Conductor:
    """Replaces versions, kills clients and looks at the server.

    Args:
        clients: one of each kind, to which replacements are added.
        folder: for the clients' reports.
    """

    def __init__(
        self, server: ServerProcess, clients: list[Client], versions: Versions, folder: Path, seed: str
    ) -> None:
        self._server, self._clients, self._versions = server, clients, versions
        self._folder, self._seed = folder, seed
        self._generator = random.Random(seed)
        self._alive = {client.kind: client for client in clients}
        self.samples = list[Sample]()
        self.kills = 0

    def conduct_for(self, seconds: float) -> None:
        """Reload, kill and sample, once a second, until the time is up."""
        self._wait_for_clients()
        started = time.monotonic()
        while (now := time.monotonic() - started) < seconds:
            if now > (self._versions.switches + 1) * RELOAD_S and now < seconds - RELOAD_S / 2:
                self._versions.change()
            if now > (self.kills + 1) * KILL_S:
                self._kill()
            self._sample()
            time.sleep(max(0.0, started + len(self.samples) - time.monotonic()))

    def conduct(self, counts: Counts) -> None:
        """Reload and kill, each time until the answers show it, then wait for the rest of the answers."""
        self._wait_for_clients()
        steady = self._alive["steady"]
        for number in range(counts.reloads):
            self._versions.change()
            if self.kills < counts.kills * (number + 1) // counts.reloads:
                self._kill().wait_for_answer()
            wait_until(lambda: steady.told()["version"] == self._versions.current, "the new version")
            self._sample()
        wait_until(lambda: sum(client.answered for client in self._clients) >= counts.answers, "answers")
        wait_until(lambda: self._told("many", "cancelled") >= LEFT, "cancelled requests")
        wait_until(lambda: self._told("leaver", "abandoned") >= LEFT, "abandoned requests")

    def _wait_for_clients(self) -> None:
        """Wait until all have answers: on a busy machine they take long to start."""
        for client in self._clients:
            client.wait_for_answer()

    def _told(self, kind: str, outcome: str) -> int:
        return sum(
            int(client.told()["outcomes"].get(outcome, 0)) for client in self._clients if client.kind == kind
        )

    def _kill(self) -> Client:
        """Kill a client other than the steady one; returns its replacement."""
        kind = self._generator.choice([kind for kind in self._alive if kind != "steady"])
        self._alive[kind].kill()
        self._alive[kind] = Client(kind, self._server.address, self._folder, len(self._clients), self._seed)
        self._clients.append(self._alive[kind])
        self.kills += 1
        return self._alive[kind]

    def _sample(self) -> None:
        server = self._server
        self.samples.append(Sample(server.rss_bytes / 2**20, server.threads, server.open_files))


def summary(ledger: list[tuple[Client, dict[str, Any]]]) -> dict[str, Any]:
    """Requests by outcome, over all clients and by kind."""
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    lost = cut_off = 0
    details: list[str] = []
    for client, told in ledger:
        by_kind[client.kind].update(told["outcomes"])
        details += told["details"]
        open_requests = told["started"] - sum(told["outcomes"].values())
        if client.killed:
            cut_off += open_requests
        else:
            lost += open_requests + (not told["final"])
    total = sum(by_kind.values(), Counter[str]())
    return {
        "answers_checked": total["answered"],
        "wrong": total["wrong"],
        "lost": lost,
        "unexpected": total["unexpected"],
        "details": details,
        "cut_off_by_kill": cut_off,
        "outcomes": {kind: dict(sorted(counts.items())) for kind, counts in by_kind.items()},
    }


def steady_latency(steps: list[Step]) -> dict[str, Any]:
    """Percentiles of the steady client inside and outside of reload windows, and the changes that it saw.

    Compare the p99 that reloads add with the time of a batch, which a request may always have to wait for.
    """
    changes = [now[0] for before, now in pairwise(steps) if before[2] != now[2]]
    groups: dict[str, list[float]] = {"in_reloads": [], "outside": []}
    for at_s, total_us, *_ in steps:
        near = any(abs(at_s - change_s) <= WINDOW_S for change_s in changes)
        groups["in_reloads" if near else "outside"].append(total_us)
    result: dict[str, Any] = {"version_changes_seen": len(changes), "window_s": WINDOW_S}
    for name, values in groups.items():
        percentiles = (
            {f"p{p}_us": round(float(np.percentile(values, p)), 1) for p in (50, 99)} if values else {}
        )
        result[name] = {"steps": len(values), **percentiles}
    if all(groups.values()):
        result["reloads_add_to_p99_us"] = round(result["in_reloads"]["p99_us"] - result["outside"]["p99_us"], 1)
    batches_us = [batch_us for *_, batch_us in steps]
    if batches_us:
        result["batch"] = {f"p{p}_us": round(float(np.percentile(batches_us, p)), 1) for p in (50, 99)}
    return result


def growth(samples: list[Sample]) -> dict[str, Any]:
    """Medians of the second and of the last quarter."""
    quarter = max(1, len(samples) // 4)
    parts = {"second_quarter": samples[quarter : 2 * quarter], "last_quarter": samples[-quarter:]}
    return {
        name: {
            what: round(statistics.median(getattr(sample, what) for sample in part), 1)
            for what in ("rss_mib", "threads", "files")
        }
        for name, part in parts.items()
    }


def failures(results: dict[str, Any]) -> list[str]:
    """The failed conditions; empty if all hold."""
    found = [f"{results[what]} {what}" for what in ("wrong", "lost", "unexpected") if results[what]]
    server, reloads = results["server"], results["reloads"]
    before, after = server["second_quarter"], server["last_quarter"]
    if after["rss_mib"] > RSS_GROWTH * before["rss_mib"] + RSS_SLACK_MIB:
        found.append(f"memory grew from {before['rss_mib']} to {after['rss_mib']} MiB")
    for what, limit in (("threads", THREADS_GROWTH), ("files", FILES_GROWTH)):
        if after[what] > before[what] + limit:
            found.append(f"{what} grew from {before[what]} to {after[what]}")
    if results["steady"]["version_changes_seen"] != reloads["switched"]:
        found.append(
            f"{results['steady']['version_changes_seen']} of {reloads['switched']} reloads took effect"
        )
    if reloads["loaded"] <= reloads["switched"]:  # one at the start, then every version that became current
        found.append(f"{reloads['loaded'] - 1} of {reloads['switched']} reloads loaded a version")
    if server["tracebacks"] or server["streams_open_at_the_end"]:
        found.append(
            f"{server['tracebacks']} tracebacks, {server['streams_open_at_the_end']} streams left open"
        )
    silent = [kind for kind, counts in results["outcomes"].items() if not counts.get("answered")]
    return found + ([f"no answers for {', '.join(silent)}"] if silent else [])


def show(results: dict[str, Any]) -> None:
    """A short table."""
    columns = sorted({outcome for counts in results["outcomes"].values() for outcome in counts})
    print(f"{'client':8}" + "".join(f"{column:>21}" for column in columns))
    for kind, counts in results["outcomes"].items():
        print(f"{kind:8}" + "".join(f"{counts.get(column, 0):21}" for column in columns))
    server, latency = results["server"], results["steady"]
    print(f"reloads {results['reloads']}, kills {results['kills']}, cut off {results['cut_off_by_kill']}")
    print(f"server  {server['second_quarter']} -> {server['last_quarter']}")
    print(f"steady  in reloads {latency['in_reloads']}, outside {latency['outside']}")
    print(f"        of a batch {latency.get('batch')}")
    for failure in failures(results) + results["details"]:
        print(f"FAILED  {failure}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--counts", nargs=3, type=int, metavar=("RELOADS", "KILLS", "ANSWERS"))
    parser.add_argument("--seed", default="1")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rsm-soak-") as folder:
        until = Counts(*arguments.counts) if arguments.counts else arguments.seconds
        results = soak(until, Path(folder), seed=arguments.seed)
    write_record(results, arguments.out, show=False)
    show(results)
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
