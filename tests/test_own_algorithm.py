"""The example of CONTRIBUTING.md: an algorithm in one file outside of the toolkit, from learning to serving."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from rsm_export.cli import main as export_main
from safetensors.numpy import load_file

from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.server import background_server
from rsm_train.cli import main as train_main

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
OPTIONS = [
    *("--algo", "average_reward:AverageReward", "--preset", "quick", "--env", "InvertedPendulum-v5"),
    *("--average-rate", "0.05", "--total-steps", "320", "--warmup-steps", "100", "--eval-every", "320"),
    *("--eval-episodes", "1", "--checkpoint-every", "160", "--width", "16", "--num-envs", "2"),
]


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """The working directory of a user with the example's file."""
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(block.splitlines()) <= 45
    (tmp_path / "average_reward.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("average_reward", None)


def newest(run_dir: Path) -> dict[str, np.ndarray]:
    step = max((run_dir / "checkpoints").iterdir())
    return load_file(step / "networks.safetensors") | load_file(step / "training.safetensors")


def test_the_example_trains_resumes_exports_and_serves(own_file, capsys):
    assert train_main([*OPTIONS, "--out", "runs/whole"]) == 0
    shorter = [*OPTIONS, "--out", "runs/parts"]
    shorter[shorter.index("--total-steps") + 1] = "160"
    assert train_main(shorter) == 0
    assert train_main(["--resume", "--out", "runs/parts", "--total-steps", "320"]) == 0
    whole, parts = newest(own_file / "runs" / "whole"), newest(own_file / "runs" / "parts")
    rho = "algorithm.average.rho"
    assert whole[rho] != 0
    for name in (rho, "policy_average.layers.0.weight", "critic.layers.1.weight"):
        assert np.array_equal(whole[name], parts[name]), name
    config = json.loads((own_file / "runs" / "parts" / "config.json").read_text())
    assert config["run"]["algo"] == "average_reward:AverageReward"
    assert config["algorithm"]["average_rate"] == 0.05

    assert export_main(["runs/whole", "--repo", "bundles", "--name", "own"]) == 0
    with (
        background_server(ServerConfig(repo=own_file / "bundles", addresses=("127.0.0.1:0",))) as server,
        PolicyClient(server.addresses[0], timeout_s=10) as client,
    ):
        assert client.spec.algorithm == "average_reward:AverageReward"
        assert client.act(np.zeros(4, np.float32), seed=1).action.shape == (1,)


def test_its_settings_are_options_with_help_and_checks(own_file, capsys):
    assert train_main(["--algo", "average_reward:AverageReward", "--help"]) == 0
    assert "--average-rate" in capsys.readouterr().out
    assert train_main([*OPTIONS, "--average-rate", "2"]) == 2
    assert "wanted average_rate > 0 and <= 1, got 2.0" in capsys.readouterr().err
    wrong = [option.replace("AverageReward", "Average") for option in OPTIONS]
    assert train_main(wrong) == 2
    error = capsys.readouterr().err
    assert "wanted --algo average_reward:Average with a name that module average_reward defines" in error
