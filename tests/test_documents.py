"""README, tutorial and the page about training: every command and program is run as it stands, in order.

Each begins in an empty directory.

A line of output in a document must appear in the real output, with any numbers in the places of numbers.
A block that both documents show is run once, so there is one training.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsm_train import Run
from rsm_train.config import resolve
from rsm_train.settings_file import read_settings
from tests.hang import HANG_S

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
TRAINING = ROOT / "docs" / "howto" / "train.md"
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
DOCUMENTED_ADDRESS = "127.0.0.1:8001"
SOLVED = 950.0


class Session:
    """A shell session: commands in one directory, servers in the background."""

    def __init__(self, directory: Path, address: str) -> None:
        self._directory, self._address = directory, address
        bin_directory = str(Path(sys.executable).parent)
        self._env = {**os.environ, "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}"}
        self._servers: list[subprocess.Popen[str]] = []
        self._outputs: dict[str, str] = {}

    def run(self, command: str) -> str:
        """Return what a command line prints. It is run once; a final & keeps it running once it is ready."""
        if command not in self._outputs:
            self._outputs[command] = self._run(command.replace(DOCUMENTED_ADDRESS, self._address))
        return self._outputs[command]

    def _run(self, command: str) -> str:
        if command.endswith("&"):
            return self._start(command.removesuffix("&"))
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self._directory,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def python(self, code: str) -> str:
        """Run a Python block and return what it printed."""
        script = self._directory / f"block_{hashlib.sha256(code.encode()).hexdigest()[:8]}.py"
        script.write_text(code.replace(DOCUMENTED_ADDRESS, self._address))
        return self.run(f"python {script.name}")

    def _start(self, command: str) -> str:
        server = subprocess.Popen(
            ["bash", "-euc", f"exec {command}"],
            cwd=self._directory,
            env=self._env,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._servers.append(server)
        assert server.stdout is not None
        line = server.stdout.readline()
        # Whatever else it prints must not fill the pipe.
        threading.Thread(target=server.stdout.read, daemon=True).start()
        return line

    def stop(self) -> None:
        """End the servers by SIGTERM; each must drain and report success."""
        for server in self._servers:
            server.send_signal(signal.SIGTERM)
        statuses = [server.wait(timeout=HANG_S) for server in self._servers]
        assert not any(statuses), statuses


@contextlib.contextmanager
def session(directory: Path) -> Iterator[Session]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shell = Session(directory, f"127.0.0.1:{port}")
    try:
        yield shell
    finally:
        shell.stop()


def console_steps(block: str) -> Iterator[tuple[str, list[str]]]:
    """(command, lines of output) of a console block; a backslash continues a command."""
    for step in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        command, *output = step.splitlines()
        yield command, [line for line in output if line.strip() and line.strip() != "..."]


def line_pattern(line: str) -> re.Pattern[str]:
    """A pattern that the line matches whatever its numbers, addresses and column widths are."""
    line = line.replace(DOCUMENTED_ADDRESS, "127.0.0.1:1")
    words = [
        NUMBER.pattern.join(re.escape(part) for part in NUMBER.split(re.sub(r"-{4,}", "----", word)))
        for word in line.split()
    ]
    return re.compile(r"\s*" + r"\s+".join(words).replace(re.escape("----"), "-+") + r"\s*")


def assert_shown(expected: list[str], output: str) -> None:
    lines = output.splitlines()
    for line in expected:
        pattern = line_pattern(line)
        assert any(pattern.fullmatch(got) for got in lines), f"the document shows:\n{line}\ngot:\n{output}"


def test_line_patterns_accept_other_numbers_and_nothing_else():
    pattern = line_pattern("mean  1000.0 ± 0.0 over 20 episodes at 127.0.0.1:8001")
    assert pattern.fullmatch("mean 998.25 ± 1.5  over 3 episodes at 127.0.0.1:4711")
    assert not pattern.fullmatch("median 1000.0 ± 0.0 over 20 episodes at 127.0.0.1:8001")
    assert not pattern.fullmatch("mean  1000.0 ± 0.0 over 20 episodes")


def dry_run(command: str) -> None:
    """Check that make knows the target of an installation, which is not run again."""
    target = shlex.split(command, comments=True)[:2]
    subprocess.run([target[0], "-n", target[1]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def run_document(shell: Session, document: Path) -> dict[str, str]:
    """Run every block; returns the output of each command, and of the programs under "python"."""
    outputs = {}
    for kind, block in BLOCK.findall(document.read_text()):
        if kind == "python":
            outputs["python"] = shell.python(block)
            continue
        for command, expected in console_steps(block):
            if command.startswith("make "):  # this very test runs under make
                dry_run(command)
                continue
            outputs[command] = shell.run(command)
            assert_shown(expected, outputs[command])
    return outputs


def returns(outputs: dict[str, str]) -> list[float]:
    """Mean returns in the first table of `rsm-eval`."""
    table = next(output for command, output in outputs.items() if command.startswith("rsm-eval"))
    rows = re.findall(r"^(?:Torch policy|Bundle|Server)\s+([\d.,]+)", table, re.MULTILINE)
    return [float(mean.replace(",", "")) for mean in rows[:3]]  # the second table has the same names


@pytest.mark.slow
def test_readme_and_tutorial_are_true_from_training_to_the_client(tmp_path):
    """One test for both documents, because they share one training."""
    with session(tmp_path) as shell:
        for document in (README, TUTORIAL):
            outputs = run_document(shell, document)
            names = {command.split()[0] for command in outputs}
            assert {"rsm-train", "rsm-export", "rsm-serve", "rsm-client", "rsm-eval", "python"} <= names
            assert len(returns(outputs)) == 3
            assert min(returns(outputs)) >= SOLVED, "the quick preset solves InvertedPendulum-v5"
            assert float(outputs["python"].removeprefix("return ")) >= SOLVED


@pytest.mark.slow
def test_the_page_about_training_is_true(tmp_path):
    with session(tmp_path) as shell:
        outputs = run_document(shell, TRAINING)
    assert [command.split()[1] for command in outputs if command != "python"] == ["--env", "--config"]
    (toml,) = re.findall(r"^```toml\n(.*?)^```$", TRAINING.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "page.toml").write_text(toml)
    run, _ = resolve({}, file=read_settings(tmp_path / "page.toml"))
    assert (run.env, run.env_arg) == ("InvertedPendulum-v5", {"reset_noise_scale": 0.02})
    steps = {path.name: Run(path).steps for path in (tmp_path / "runs").iterdir()}
    assert steps == dict.fromkeys(("from-file", "notebook", "own", "warm"), 1000)
