"""What the program tells a user to do can be done: the options, commands, extras and pages it names exist."""

from __future__ import annotations

import ast
import dataclasses
import errno
import functools
import importlib
import json
import os
import pydoc
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
import numpy as np
import pytest
from numpy.typing import NDArray
from rsm_export import build as build_module
from rsm_export.cli import main as rsm_export

from rsm_common import atomic
from rsm_common.errors import CheckpointError, UsageError
from rsm_eval.cli import main as rsm_eval
from rsm_eval.sources import open_policy
from rsm_serve.bundle.probe import Probe
from rsm_train.cli import main as rsm_train
from rsm_train.config import resolve
from rsm_train.foreign import import_weights
from rsm_train.policy import TorchPolicy
from rsm_train.run import checkpoint as checkpoint_module
from rsm_train.run.run_directory import require_new, resume_settings
from tests.foreign import Arrays, policy_arrays
from tests.rsm_eval.tiny_env import ENV_ID

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "rsm_common": ("rsm-train", "rsm-export", "rsm-serve", "rsm-client", "rsm-eval"),
    "rsm_train": ("rsm-train",),
    "export/rsm_export": ("rsm-export",),
    "rsm_serve": ("rsm-serve", "rsm-client"),
    "rsm_eval": ("rsm-eval",),
}
"""Package -> the commands whose options its sentences name without saying which command."""

HOMES = {"rsm_train/model/samplers/": ("rsm-export",)}
"""Parts of a package whose sentences are those of another command."""

NOT_OURS = ("rsm_common/provenance.py", "rsm_eval/plots.py")
"""Files with options of git and variables of style sheets, which are not advice."""

VALUE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for a value that only a run knows."""

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-]*" + VALUE + ")")
COMMAND = re.compile(r"(?<![\w/-])rsm-(?:train|export|serve|client|eval)(?![\w-])")
FOREIGN = re.compile(r"\b(?:openssl|pip|wandb|nvidia-smi) [^;`'\"]*")
"""Commands of others, with their own options."""


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string below a node but docstrings, a formatted one as a whole."""
    hidden = {
        id(part)
        for node in ast.walk(tree)
        for part in (
            node.values
            if isinstance(node, ast.JoinedStr)
            else [node.value]
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            else []
        )
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in hidden:
            yield node.lineno, node.value


@functools.cache
def sentences() -> list[tuple[str, str]]:
    """(place, text) of every string that the program may print."""
    trees = {path: tree for path, tree in modules().items() if path not in NOT_OURS}
    return [(f"{path}:{line}", text) for path, tree in trees.items() for line, text in texts(tree)]


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Path below the root -> syntax tree of every module that is not generated."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    paths = [path for path in found if path.parent.name != "pb"]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def home(place: str) -> tuple[str, ...]:
    """The commands whose options a sentence of this place may name."""
    return next(names for start, names in {**HOMES, **PACKAGES}.items() if place.startswith(start))


def command_of(name: str) -> click.Command:
    """The click command behind a script of the wheel."""
    module, _, function = PROJECT["scripts"][name].partition(":")
    found: list[click.Command] = []
    with mock.patch.object(click.Command, "main", lambda command, *_, **__: found.append(command)):
        getattr(importlib.import_module(module), function)([])
    return found[0]


@pytest.fixture(scope="module")
def commands():
    """Name -> click command."""
    return {name: command_of(name) for name in PROJECT["scripts"]}


def all_options(command: click.Command) -> set[str]:
    """The options of a command and its subcommands."""
    own = {"--help", *(name for given in command.params for name in (*given.opts, *given.secondary_opts))}
    return own.union(*map(all_options, command.commands.values())) if isinstance(command, click.Group) else own


def unknown_options(text: str, owners: tuple[str, ...], options: dict[str, set[str]]) -> list[str]:
    """Options that a text names and that do not exist.

    An option belongs to the command that the text names last before it, or to one of `owners`.
    """
    text = FOREIGN.sub("", text)
    named = {match.start(): (match[0],) for match in COMMAND.finditer(text)}
    unknown = []
    for match in OPTION.finditer(text):
        before = [names for start, names in named.items() if start < match.start()]
        if not any(match[0] in options[name] for name in (before[-1] if before else owners)):
            unknown.append(match[0])
    return unknown


def identifiers() -> set[str]:
    """Every name in the code: of a function, parameter, field, variable, module or keyword."""
    found = {part for path in modules() for part in Path(path).with_suffix("").parts}
    for tree in modules().values():
        for node in ast.walk(tree):
            found.update(str(getattr(node, key)) for key in ("name", "arg", "id", "attr") if hasattr(node, key))
    return found


def refusals() -> Iterator[tuple[str, str]]:
    """(place, text) of every sentence in a raise statement or a call of an error class."""
    for path, tree in modules().items():
        for node in ast.walk(tree):
            made = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Error", "_require"))
            if made or isinstance(node, ast.Raise):
                yield from ((f"{path}:{line}", text) for line, text in texts(node) if " " in text)


def test_every_option_that_the_program_names_exists(commands):
    options = {name: all_options(command) for name, command in commands.items()}
    wrong = [
        f"{place}: {' '.join(unknown)} in {text!r}"
        for place, text in sentences()
        if (unknown := unknown_options(text, home(place), options))
    ]

    assert not wrong, "\n".join(wrong)
    assert sum(len(OPTION.findall(text)) for _, text in sentences()) > 200  # the walk finds the sentences


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("choose another --repo", []),
        ("choose another --repro", ["--repro"]),
        ("export it with rsm-export RUN --repo DIR", []),
        ("train it with rsm-train --repo DIR", ["--repo"]),
        ("pip install --upgrade rsm-toolkit; or use --jobs", ["--jobs"]),
        (f"wanted --{VALUE} of at least 1", []),
    ],
)
def test_a_wrong_option_is_noticed(commands, text, unknown):
    options = {name: all_options(command) for name, command in commands.items()}

    assert unknown_options(text, ("rsm-export",), options) == unknown


def test_every_subcommand_that_the_program_names_exists(commands):
    client = commands["rsm-client"]
    assert isinstance(client, click.Group)
    named = {(place, word) for place, text in sentences() for word in re.findall(r"rsm-client ([a-z]+)", text)}

    assert {(place, word) for place, word in named if word not in client.commands} == set()
    assert named


def test_every_extra_that_the_program_names_exists():
    named = {
        (place, name)
        for place, text in sentences()
        for names in re.findall(r"rsm-toolkit\[([a-z,-]+)\]", text)
        for name in names.split(",")
    }

    assert {(place, name) for place, name in named if name not in PROJECT["optional-dependencies"]} == set()
    assert named


def test_no_page_is_named_that_an_installed_package_lacks():
    assert [(place, text) for place, text in sentences() if re.search(r"[\w./-]+\.md\b", text)] == []


def test_every_command_of_python_that_the_program_names_works():
    named = {name for _, text in sentences() for name in re.findall(r"python -m pydoc ([\w.]+\w)", text)}

    assert len(named) == 2
    for name in named:
        assert pydoc.render_doc(name)


def test_every_variable_that_the_program_names_is_read():
    named = {(place, name) for place, text in sentences() for name in re.findall(r"\bRSM_[A-Z_]+\b", text)}
    read = {text for _, text in sentences() if re.fullmatch("RSM_[A-Z_]+", text)}

    assert {(place, name) for place, name in named if name not in read} == set()
    assert named


def test_every_setting_that_a_refusal_names_exists():
    known = identifiers() | {text for _, text in sentences() if text.isidentifier()}
    known.add("class_count")  # of tritonclient
    named = {
        (place, name)
        for place, text in refusals()
        for name in re.findall(r"(?<![\w/.])(?:[a-z]+(?:_[a-z0-9]+)+|[a-z]+(?==))(?![\w.])", text)
    }

    assert {(place, name) for place, name in named if name not in known} == set()
    assert len(named) > 50


@pytest.fixture
def locked():
    """The directory of another user, which this one may not read."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        path = Path(parent) / "locked"
        path.mkdir(mode=0o700)
        os.seteuid(65534)
        yield path
        os.seteuid(0)


@pytest.mark.parametrize(
    "use",
    [require_new, lambda path: resume_settings({"out": str(path)}), lambda path: open_policy(str(path))],
    ids=["begin", "resume", "evaluate"],
)
def test_a_directory_of_another_user_is_one_sentence(locked, use):
    with pytest.raises(UsageError) as caught:
        use(locked)
    assert f"cannot read {str(locked)!r}: Permission denied; " in str(caught.value)


def full_as(number: int) -> Callable[..., None]:
    """A function that writes nothing and raises the error of that number."""

    def write(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return write


full = full_as(errno.ENOSPC)


TINY = shlex.split(
    f"--env {ENV_ID} --preset quick --compile off --num-envs 1 --eval-episodes 1 --width 16 --batch-size 8 "
    "--total-steps 8 --warmup-steps 8 --checkpoint-every 8 --eval-every 8"
)
"""Options of rsm-train for a run of a moment."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of TINY; take copies of it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert rsm_train([*TINY, "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def advised(error: str, command: str) -> list[str]:
    """The arguments of the last command of a name in an error, up to a comma, semicolon or line's end."""
    (*_, found) = re.finditer(rf"\b{command} ([^,;\n]+)", error)
    return shlex.split(found[1])


def test_a_checkpoint_is_not_resumed_as_if_it_were_a_run(run, capsys):
    checkpoint = run / "checkpoints" / "step_000000008"
    before = sorted(run.rglob("*"))
    capsys.readouterr()

    assert rsm_train(["--resume", "--out", str(checkpoint), "--total-steps", "16"]) == 2
    assert f"give its run: rsm-train --resume --out {run}" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
    assert rsm_train(["--resume", "--out", str(run), "--total-steps", "16"]) == 0


def test_an_algorithm_that_is_not_known_is_refused_in_the_name_of_the_command(capsys):
    assert rsm_train(["--algo", "nope"]) == 2
    assert capsys.readouterr().err.startswith("rsm-train: wanted an algorithm of ")


def test_a_setting_without_effect_is_named_as_the_option_that_was_given(capsys):
    settings = ["--env", ENV_ID, "--preset", "quick", "--dry-run"]
    assert rsm_train([*settings, "--target-entropy", "3"]) == 2
    assert capsys.readouterr().err.endswith("leave --target-entropy out\n")


def test_what_a_diverged_run_is_told_to_change_makes_it_another_run(tmp_path):
    """So the advice is to begin one: a resume refuses these settings."""
    (tmp_path / "config.json").write_text(
        json.dumps({"run": {"env": ENV_ID}, "algorithm": dataclasses.asdict(resolve({"env": ENV_ID})[1])})
    )
    for setting in ("policy_lr", "critic_lr", "temperature"):
        with pytest.raises(UsageError, match="begin a run in another directory"):
            resume_settings({"out": str(tmp_path), setting: 0.123})
    assert any("begin a run in another directory with lower learning rates" in text for _, text in sentences())


def test_a_finished_run_without_metrics_can_be_evaluated_as_it_says(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert rsm_train(["--resume", "--out", str(run)]) == 2

    arguments = advised(capsys.readouterr().err, "rsm-eval")
    assert rsm_eval([*arguments, "--episodes", "1"]) == 0


@pytest.mark.parametrize("content", ["{", "{}", '{"run": {"no": 1}}'])
def test_a_damaged_configuration_is_restored_as_it_says(run, content, capsys):
    (run / "config.json").write_text(content)
    assert rsm_train(["--resume", "--out", str(run), "--total-steps", "16"]) == 2

    source, target = advised(capsys.readouterr().err, "cp")
    shutil.copy(source, target)
    assert rsm_train(["--resume", "--out", str(run), "--total-steps", "16"]) == 0


def test_without_a_checkpoint_a_damaged_configuration_is_the_end_of_the_run(run, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").write_text("{")
    assert rsm_train(["--resume", "--out", str(run)]) == 2
    assert "begin a run in another directory with --out" in capsys.readouterr().err


def test_a_run_goes_on_with_the_options_of_its_last_resume(run, monkeypatch, capsys):
    """So the command that it says needs no --total-steps."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_files", full)
        assert rsm_train(["--resume", "--out", str(run), "--total-steps", "16", "--log-every", "3"]) != 0
    arguments = advised(capsys.readouterr().err, "rsm-train")
    assert arguments == ["--resume", "--out", str(run)]

    assert rsm_train(arguments) == 0
    assert (run / "checkpoints" / "step_000000016").is_dir()
    assert json.loads((run / "config.json").read_text())["run"]["log_every"] == 3


@pytest.mark.parametrize("resume", [True, False])
def test_a_command_whose_settings_could_not_be_written_is_to_be_given_again(
    resume, finished, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    if resume:
        shutil.copytree(finished, run)
    command = ["--resume", "--total-steps", "16"] if resume else TINY
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", full)
        assert rsm_train([*command, "--out", str(run)]) != 0
    error = capsys.readouterr().err
    assert "give the same command again" in error
    assert "rsm-train --resume" not in error

    assert rsm_train([*command, "--out", str(run)]) == 0
    assert (run / "checkpoints" / ("step_000000016" if resume else "step_000000008")).is_dir()


def test_a_directory_of_checkpoints_names_one_that_can_be_evaluated(run, capsys):
    assert rsm_eval(["--policy", str(run / "checkpoints"), "--episodes", "1"]) == 2
    named = capsys.readouterr().err.strip().partition("such as ")[2]
    assert rsm_eval(["--policy", named, "--episodes", "1"]) == 0


@pytest.mark.parametrize(("limit", "advice"), [(errno.EFBIG, "raise the limit"), (errno.ENOSPC, "make room")])
def test_a_place_that_is_full_is_not_only_to_be_exchanged(limit, advice, run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_as(limit))
        assert rsm_export([str(run), "--repo", str(tmp_path / "repo")]) == 2
    assert advice in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", full_as(limit))
        assert rsm_eval(["--policy", str(run), "--episodes", "1", "--json", str(tmp_path / "json")]) == 2
    assert advice in capsys.readouterr().err

    assert rsm_export([str(run), "--repo", str(tmp_path / "repo")]) == 0


def test_an_export_that_no_server_would_load_is_refused_with_options_that_help(
    run, tmp_path, monkeypatch, capsys
):
    """In the probe another particle is the best one, as rounding to int8 can have it."""
    make_probe = build_module.make_probe

    def with_another_particle(policy: TorchPolicy, obs: NDArray[np.float32]) -> Probe:
        probe = make_probe(policy, obs)
        if policy.spec.particles == 1:
            return probe
        particle_PNA, _ = policy.particles(probe.obs, probe.noise)
        far_P = np.abs(particle_PNA - probe.action[:, None]).max(axis=2).argmax(axis=1)
        return dataclasses.replace(probe, action=particle_PNA[np.arange(len(far_P)), far_P])

    monkeypatch.setattr(build_module, "make_probe", with_another_particle)
    command = [str(run), "--precision", "int8"]
    assert rsm_export([*command, "--repo", str(tmp_path / "bad")]) == 2
    error = capsys.readouterr().err
    assert "check 'probe' failed" in error
    assert "use another --precision, or --particles 1; no bundle was written" in error
    assert not list((tmp_path / "bad").rglob("model.onnx"))

    assert rsm_export([*command, "--particles", "1", "--repo", str(tmp_path / "one")]) == 0
    assert rsm_eval(["--policy", str(tmp_path / "one" / "run"), "--episodes", "1"]) == 0


def test_foreign_weights_are_accepted_when_they_are_corrected_as_it_says(tmp_path):
    arrays = policy_arrays(4, 2, 8)
    bias, weight = arrays["layers.1.bias"], arrays["layers.0.weight"]
    wrong = {
        "give floats": arrays | {"layers.1.bias": bias.astype(np.int64)},
        "as many as policy: layers.1.bias has elements": arrays | {"layers.1.bias": bias[:3]},
        "hand over weight.T": arrays | {"layers.0.weight": weight.T},
        "rename them": {f"net.{name}": array for name, array in arrays.items()},
    }

    def made(policy: Arrays, name: str) -> Path:
        return import_weights(
            tmp_path / name,
            policy=policy,
            critics=None,
            env_id=ENV_ID,
            obs_size=4,
            action_low=[-1.0, -1.0],
            action_high=[1.0, 1.0],
            steps=5,
            particles=1,
        )

    for advice, policy in wrong.items():
        with pytest.raises(CheckpointError, match=advice):
            made(policy, "no")
    assert made(arrays, "yes").is_dir()
    page = pydoc.render_doc("rsm_train.run.checkpoint")
    assert all(name in page for name in ("time.layers.0.weight", "layers.0.bias"))


def test_a_return_that_is_too_low_passes_without_the_options_that_shorten_the_chain(run, tmp_path, capsys):
    command = [str(run), "--repo", str(tmp_path), "--env", ENV_ID, "--episodes", "3", "--tolerance", "1e-7"]
    assert rsm_export([*command, "--steps", "1", "--particles", "1"]) == 2
    assert "leave out what shortens the chain (--steps, --particles" in capsys.readouterr().err

    assert rsm_export(command) == 0
