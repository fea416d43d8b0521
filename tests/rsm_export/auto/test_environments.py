"""rsm-export --env and --auto in environments with arguments, and in environments that fail."""

from __future__ import annotations

import pytest
from rsm_export.cli import main

from rsm_common.spec import PolicySpec
from tests.rsm_eval.bad_envs import BAD
from tests.rsm_train.runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in an environment with 5 observation elements, by its argument."""
    arguments = {"env": BAD, "env_arg": {"obs_size": 5}, "total_steps": 100, "warmup_steps": 100}
    return tiny_run(tmp_path_factory.mktemp("runs") / "bad", **arguments)


@pytest.mark.parametrize("how", [["--env", BAD], ["--auto", "--steps=1", "--particles=1"]])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("reward nan", f"environment {BAD}: wanted a reward that is a finite float32 number in step 2"),
        ("constructor file", "got FileNotFoundError: [Errno 2] No such file or directory"),
    ],
)
def test_an_environment_that_fails_is_one_sentence_and_no_bundle(run, tmp_path, capsys, how, fault, words):
    argv = [str(run), "--repo", str(tmp_path / "bundles"), "--episodes=2", f"--env-arg=fault={fault}", *how]
    assert main(argv) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("rsm-export: ")
    assert words in last
    assert not list(tmp_path.glob("bundles/*"))


def test_the_arguments_of_training_are_those_of_the_comparison_and_of_the_bundle(run, tmp_path):
    argv = [str(run), "--repo", str(tmp_path), "--name", "bad", "--env", BAD, "--episodes=2"]
    assert main(argv) == 0
    spec = PolicySpec.from_json((tmp_path / "bad" / "1" / "policy.json").read_bytes())
    assert (spec.env_args, spec.observation.size) == ({"obs_size": 5}, 5)


def test_arguments_without_an_environment_to_act_in_are_refused(run, tmp_path, capsys):
    assert main([str(run), "--repo", str(tmp_path), "--env-arg", "obs_size=5"]) == 2
    assert "wanted --auto or --env with --tolerance, --episodes or --env-arg" in capsys.readouterr().err
