"""The command rsm-eval: environments that fail, arguments, what it imports, and its help."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from rsm_common.errors import MissingExtraError, UsageError
from rsm_eval import cli
from rsm_eval.evaluation import choose_env_args
from tests.bundles import make_spec
from tests.rsm_eval.bad_envs import BAD
from tests.rsm_eval.tiny_env import ENV_ID


def options(bundle_repo, *more):
    return ["--policy", str(bundle_repo / "tiny"), "--env", BAD, "--episodes", "2", "--latency-calls=3", *more]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "failed in step: ZeroDivisionError: the spring"),
        ("reward nan", "wanted a reward that is a finite float32 number in step 2 of its episode, got nan"),
        ("obs short", "got shape [3], float64"),
        ("constructor gl", "got AttributeError: 'NoneType' object has no attribute 'glGetError'"),
        ("constructor exit", "got SystemExit: 3"),
    ],
)
def test_an_environment_that_fails_is_one_sentence(bundle_repo, tmp_path, capsys, fault, words):
    output = tmp_path / "out.json"
    assert cli.main(options(bundle_repo, f"--env-arg=fault={fault}", "--json", str(output))) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("rsm-eval: ")
    assert BAD in last
    assert words in last
    assert not output.exists()


def test_arguments_are_parsed_and_kept(bundle_repo, tmp_path):
    output = tmp_path / "out.json"
    assert cli.main(options(bundle_repo, "--env-arg=at=7", "--env-arg=fault=", "--json", str(output))) == 0
    assert json.loads(output.read_text())["env_args"] == {"at": 7, "fault": ""}


@pytest.mark.parametrize("text", ["at", "=3"])
def test_an_argument_without_name_or_value_is_told(bundle_repo, capsys, text):
    assert cli.main(options(bundle_repo, "--env-arg", text)) == 2
    assert f"wanted NAME=VALUE, got '{text}'; write for example size=3" in capsys.readouterr().err


def test_the_arguments_of_the_policies_and_those_that_are_given_over_them():
    first, second = (dataclasses.replace(make_spec(), env_args={"size": size}) for size in (3, 4))
    assert choose_env_args(first.env_id, {}, [first]) == {"size": 3}
    assert choose_env_args(first.env_id, {"colour": "red"}, [first, first]) == {"size": 3, "colour": "red"}
    assert choose_env_args("Another-v0", {}, [first]) == {}
    assert choose_env_args(first.env_id, {"size": 5}, [first, second]) == {"size": 5}
    with pytest.raises(UsageError, match=r"got \{'size': 3\} and .*; give the arguments with --env-arg"):
        choose_env_args(first.env_id, {}, [first, second])


def test_without_a_report_nothing_is_drawn(bundle_repo):
    code = (
        "import sys; from rsm_eval.cli import main\n"
        f"assert main(['--policy', {str(bundle_repo / 'tiny')!r}, '--env', {ENV_ID!r}, '--episodes=2']) == 0\n"
        "print({'matplotlib', 'jinja2', 'PIL'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "set()"


def test_a_report_needs_its_extra_before_any_episode(bundle_repo, tmp_path, monkeypatch, capsys):
    def missing(command, extra, modules):
        if "matplotlib" in modules:
            raise MissingExtraError(f'{command} needs: pip install "rsm-toolkit[{extra}]"')

    monkeypatch.setattr(cli, "require_extra", missing)
    assert cli.main(options(bundle_repo, "--report", str(tmp_path / "report.html"))) == 2
    assert capsys.readouterr().err.startswith("rsm-eval --report needs: pip install")


def test_help_has_sections_and_examples():
    text = CliRunner().invoke(cli._command("rsm-eval"), ["--help"]).output
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == [
        "Policies:",
        "Environment:",
        "Episodes:",
        "Latency:",
        "Report:",
        "Other:",
        "Other commands:",
        "Examples:",
    ]
    assert text.count("  rsm-eval --policy ") == len(cli.EXAMPLES)
