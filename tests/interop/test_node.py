"""A client in Node.js, made from the files in protos/ alone, talks to the server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from tests.hang import HANG_S

HERE = Path(__file__).parent
PROTOS = HERE.parent.parent / "protos"
INSTALL_S = 15
SEED = 2**64 - 1
OBS = [0.5, -1, 0.25, 2]


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory) -> Path:
    """The packages of package.json, outside the repository."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    folder: Path = tmp_path_factory.mktemp("node")
    shutil.copy(HERE / "package.json", folder)
    flags = ("--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--no-update-notifier")
    try:
        done = subprocess.run(
            ["npm", "install", "--prefer-offline", "--fetch-retries=0", *flags],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install did not end within {INSTALL_S} s")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        pytest.skip(f"npm install failed: {' '.join(lines[:2]):.200}")
    return folder / "node_modules"


def test_both_protocols(node_modules, bundle_repo):
    config = ServerConfig.from_options(repo=bundle_repo, addresses=("127.0.0.1:0",), backend="onnxruntime")
    with background_server(config) as server:
        done = subprocess.run(
            ["node", str(HERE / "client.js"), str(PROTOS), server.addresses[0]],
            env={**os.environ, "NODE_PATH": str(node_modules)},
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    here = open_policy(bundle_repo / "tiny", "onnxruntime").act(np.array(OBS, np.float32), seed=SEED)
    for protocol in ("inference", "policy"):
        assert np.allclose(answers[protocol].pop("action"), here.action, atol=1e-6)
    assert np.allclose(answers["inference"].pop("streamed"), here.action, atol=1e-6)
    assert answers["inference"].pop("error").startswith("NOT_FOUND: wanted policy 'nope'")
    assert answers == {
        "inference": {
            "id": "step 1",
            "version": "1",
            "outputs": ["action", "q"],
            "seed": str(SEED),
            "status": "NOT_FOUND",
            "shapes": {"obs": ["-1", "4"], "noise": ["-1", "3", "2", "2"], "seed": ["-1", "1"]},
        },
        "policy": {"environment": "Tiny-v0", "ids": ["7", "8"], "error": "INVALID_ARGUMENT"},
    }
