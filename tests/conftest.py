"""Fixtures that several packages' tests share."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path

import pytest

from rsm_serve.security import watched_files
from tests.bundles import make_spec, write_bundle

# Two workers share two cores: a second thread of torch would wait for a core at every operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where the environment forbids bytecode, each process that a test starts would compile torch anew, for 5 s.
if sys.dont_write_bytecode and sys.pycache_prefix is None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# Tests that use onnxruntime without our session tell its vendor nothing either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Started by nohup, or in the background by a shell, signals arrive ignored, and so they would in every process
# that a test starts and then tells to stop.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def bundle_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the policy "tiny", version 1; not to be changed."""
    repository = tmp_path_factory.mktemp("repository")
    write_bundle(repository, make_spec("tiny"))
    return repository


@pytest.fixture
def own_repo(tmp_path: Path) -> Path:
    """A repository with the policy "tiny", version 1, for the test to change."""
    write_bundle(tmp_path / "repository", make_spec("tiny"))
    return tmp_path / "repository"


@pytest.fixture
def files_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are made afterwards look at their certificates and tokens at every use."""
    monkeypatch.setattr(watched_files, "LOOK_S", 0.0)


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients try to connect once, and wait for no server that is not there."""
    monkeypatch.setattr("rsm_serve.client.call.RETRY_S", math.inf)


def pytest_configure(config: pytest.Config) -> None:
    """Run in a random order (`--randomly-seed=N` repeats one); a test that needs a seed gives one."""
    config.option.randomly_reset_seed = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: with two workers, one is then busy with them while the other does the rest."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
