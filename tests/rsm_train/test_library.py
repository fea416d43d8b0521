"""rsm_train.train: the runs of the command, from a program, with its environments, callbacks and classes."""

from __future__ import annotations

import functools
import json
import logging
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rsm_export.cli import main as export_main
from safetensors.torch import load_file

from rsm_common.errors import CheckpointError, ConfigError, RsmError, UnsupportedEnvError
from rsm_common.policy import Policy
from rsm_eval.cli import main as eval_main
from rsm_train import Progress, Run, StopTraining, train
from rsm_train.algorithms.common import load_params
from rsm_train.algorithms.dpmd import DPMD
from rsm_train.cli import main
from rsm_train.model.networks import init_denoiser
from rsm_train.run.checkpoint_files import list_checkpoints
from tests.rsm_train.training_envs import MODULE, CountingEnv, LongEnv

ENV_ID = f"{MODULE}:RsmLong-v0"
TINY: dict[str, Any] = {
    "preset": "quick",
    "total_steps": 60,
    "warmup_steps": 20,
    "eval_every": 30,
    "eval_episodes": 1,
    "log_every": 10,
    "checkpoint_every": 20,
    "batch_size": 8,
    "num_envs": 2,
    "updates_per_step": 1.0,
    "width": 16,
    "particles": 2,
}


def make_env() -> Any:
    """The environment of ENV_ID."""
    return gym.make(ENV_ID, disable_env_checker=True)


def make_long(limit: int) -> Any:
    return gym.wrappers.TimeLimit(LongEnv(), limit)


def networks(run: Run | Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, and what its training goes on from."""
    newest = list_checkpoints(run.directory if isinstance(run, Run) else run)[-1]
    return load_file(newest / "networks.safetensors") | load_file(newest / "training.safetensors")


def assert_same(run: Run | Path, other: Run | Path) -> None:
    first, second = networks(run), networks(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; not to be changed."""
    return train(env=ENV_ID, out=tmp_path_factory.mktemp("known") / "run", **TINY)


def options(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def test_a_run_is_that_of_the_command_bit_for_bit(known, tmp_path):
    assert main(["--env", ENV_ID, *options(TINY), "--out", str(tmp_path / "run")]) == 0
    assert_same(known, tmp_path / "run")
    other = json.loads((tmp_path / "run" / "config.json").read_text())
    own = json.loads((known.directory / "config.json").read_text())
    for config in (own, other):
        del config["run"]["out"]
    assert own == other
    assert train(ENV_ID, out=tmp_path / "other", seed=1, **TINY).metrics != known.metrics
    with pytest.raises(AssertionError):
        assert_same(known, tmp_path / "other")


def test_a_run_has_its_numbers_and_its_policy(known):
    assert (known.steps, known.finished, known.settings["particles"]) == (60, True, 2)
    assert [point.step for point in known.evaluations] == [30, 60]
    assert known.final_return == known.evaluations[-1].mean == known.metrics[-1]["eval_mean"]
    assert known.best_return == max(point.mean for point in known.evaluations)
    assert [path.name for path in known.checkpoints] == [
        path.name for path in list_checkpoints(known.directory)
    ]
    policy: Policy = known.policy
    assert policy.spec.provenance["step"] == 60
    best = known.best_policy.spec.evaluation
    assert best is not None
    assert best["mean"] == known.best_return
    assert policy.act(np.zeros(2), seed=1).action.shape == (2,)
    assert Run(str(known.directory)).final_return == known.final_return


def test_a_directory_without_a_run_is_refused(known, tmp_path):
    for path in (tmp_path, tmp_path / "missing", known.checkpoints[-1]):
        with pytest.raises(CheckpointError, match="wanted a run directory, got .* where no run has begun"):
            Run(path)


# --- environments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_a_function_learns_what_its_id_learns_and_the_run_says_so(known, vector, tmp_path):
    run = train(env=make_env, out=tmp_path / "run", vector=vector, **TINY)
    assert_same(known, run)
    assert run.metrics[-1]["eval_returns"] == known.metrics[-1]["eval_returns"]
    name = f"<factory {__name__}:make_env>"
    config = json.loads((run.directory / "config.json").read_text())
    assert config["run"]["env"] == run.policy.spec.env_id == name


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CountingEnv(), f"{__name__}:<lambda>"),
        (CountingEnv, f"{MODULE}:CountingEnv"),
        (functools.partial(make_long, limit=5), f"{__name__}:make_long(limit=5)"),
    ],
)
def test_functions_of_every_kind_have_names(make, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(env=make, **TINY | {"total_steps": 20, "eval_every": 20})
    assert run.settings["env"] == f"<factory {name}>"
    assert run.directory.parent == Path("runs")
    assert all(character not in str(run.directory) for character in "<>(): ")


def test_a_run_with_a_function_is_resumed_with_this_function_alone(known, tmp_path, capsys):
    out = tmp_path / "run"
    stopped = train(env=make_env, out=out, on_progress=lambda event: event.step >= 20, **TINY)
    assert stopped.steps == 20
    call = f"rsm_train.train(env=make_env, out={str(out)!r}, resume=True)"
    for env, got in ((None, "none"), (LongEnv, f"{MODULE}:LongEnv"), (ENV_ID, ENV_ID)):
        with pytest.raises(ConfigError, match=f"got {got}; go on in a program with") as caught:
            train(env=env, out=out, resume=True)
        assert call in str(caught.value)
    assert main(["--resume", "--out", str(out)]) == 2
    assert f"wanted the Python function {__name__}:make_env, which" in (error := capsys.readouterr().err)
    assert call in error
    with pytest.raises(ConfigError) as caught:
        train(env=make_env, out=out, **TINY)
    assert f"go on with {call}, or choose another" in str(caught.value)
    run = train(env=make_env, out=out, resume=True)
    assert run.finished
    assert_same(known, run)


def the_same() -> Callable[[], Any]:
    env = LongEnv()
    return lambda: env


def failing() -> Any:
    raise ModuleNotFoundError("no motor")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (the_same(), "wanted another environment at every call of .*<lambda>.*, got the same one again"),
        (
            lambda: "Hopper-v5",
            r"<lambda>\(\) to return a gymnasium.Env, got 'Hopper-v5'; correct this function",
        ),
        (lambda size: LongEnv(), "create an environment with .*, got TypeError: .*'size'"),
        (failing, r"with .*failing\(\), got ModuleNotFoundError: no motor \(test_library.py"),
        (lambda: gym.make("CartPole-v1"), "continuous actions"),
    ],
)
def test_a_wrong_function_is_one_sentence_and_leaves_nothing(make, message, tmp_path):
    with pytest.raises(UnsupportedEnvError, match=message) as caught:
        train(env=make, out=tmp_path / "run", **TINY)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_function_that_no_worker_can_get_is_refused(tmp_path):
    lock = threading.Lock()

    def make() -> Any:
        assert lock is not None
        return CountingEnv()

    with pytest.raises(ConfigError, match=r"that can be sent .*cannot pickle '_thread.lock'.*use vector sync"):
        train(env=make, vector="async", out=tmp_path / "run", **TINY)
    assert train(env=make, out=tmp_path / "run", **TINY).finished


def test_evaluation_elsewhere_needs_an_id_and_export_does_not(tmp_path, capsys):
    run = train(env=make_env, out=tmp_path / "run", **TINY)
    assert export_main([str(run.directory), "--repo", str(tmp_path / "repo"), "--name", "own"]) == 0
    for source in (run.directory, tmp_path / "repo" / "own"):
        capsys.readouterr()
        evaluation = ["--policy", str(source), "--episodes", "1", "--latency-calls", "0"]
        assert eval_main(evaluation) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.endswith(
            f"got the environment that the Python function {__name__}:make_env makes; register it, and name "
            "its id with --env"
        )
        assert eval_main([*evaluation, "--env", ENV_ID]) == 0


# --- callbacks --------------------------------------------------------------------------------------------


def test_every_line_of_metrics_evaluation_and_checkpoint_is_told(known, tmp_path):
    events: list[Progress] = []
    run = train(env=ENV_ID, out=tmp_path / "run", on_progress=events.append, **TINY)
    assert_same(known, run)
    assert [event.values for event in events if event.kind != "checkpoint"] == run.metrics
    saved = [(event.step, event.checkpoint) for event in events if event.kind == "checkpoint"]
    assert [step for step, _ in saved] == [20, 30, 40, 60]
    assert all(path is not None and path.name == f"step_{step:09}" for step, path in saved)
    kinds = [event.kind for event in events if event.step == 60]
    assert kinds == ["train", "checkpoint", "eval"]
    assert events[0].checkpoint is None
    assert {event.total_steps for event in events} == {60}


def stopping(event: Progress) -> None:
    if event.step >= 30:
        raise StopTraining


@pytest.mark.parametrize("callback", [lambda event: np.True_ if event.step >= 30 else False, stopping])
def test_a_callback_stops_a_run_that_can_be_resumed(known, callback, tmp_path):
    run = train(env=ENV_ID, out=tmp_path / "run", on_progress=callback, **TINY)
    assert (run.steps, run.finished) == (30, False)
    assert run.evaluations[-1].step == 30, "the present step is finished"
    resumed = train(out=tmp_path / "run", resume=True)
    assert resumed.finished
    assert_same(known, resumed)


def test_only_true_stops(tmp_path):
    answers = iter([1, "yes", [0], None, False, 0.5] * 10)
    assert train(env=ENV_ID, out=tmp_path / "run", on_progress=lambda event: next(answers), **TINY).finished


def test_a_fault_of_a_callback_passes_and_loses_nothing_that_was_saved(known, tmp_path):
    def fault(event: Progress) -> None:
        if event.kind == "eval":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(env=ENV_ID, out=tmp_path / "run", on_progress=fault, **TINY)
    assert_same(known, train(out=tmp_path / "run", resume=True))


# --- a guest in the process -------------------------------------------------------------------------------


def state_of_the_process() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
        "logging": (logging.getLogger().handlers[:], logging.getLogger().level, gym.logger.min_level),
        "hook": sys.excepthook,
    }


@pytest.fixture
def odd_torch() -> Iterator[None]:
    """A caller that has set everything in torch otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")


def test_the_settings_of_the_caller_do_not_count_and_are_as_before(known, odd_torch, tmp_path):
    before = state_of_the_process()
    run = train(env=ENV_ID, out=tmp_path / "run", **TINY)
    assert state_of_the_process() == before
    with pytest.raises(ConfigError):
        train(env=ENV_ID, out=tmp_path / "run", **TINY)
    assert state_of_the_process() == before
    torch.set_default_device(None)
    assert_same(known, run)


def test_it_works_in_a_thread(known, tmp_path):
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(train(env=ENV_ID, out=tmp_path / "run", **TINY)))
    thread.start()
    thread.join()
    assert_same(known, runs[0])


def test_nothing_is_printed_unless_asked(known, tmp_path, capfd, caplog):
    train(env=ENV_ID, out=tmp_path / "run", on_progress=stopping, **TINY)
    with caplog.at_level(logging.INFO, logger="rsm_train"):
        train(out=tmp_path / "run", resume=True, threads=2)
    assert capfd.readouterr() == ("", "")
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said[0] == ("INFO", "resuming at step 30")
    assert said[1][0] == "WARNING"
    assert said[1][1].startswith("the run goes on with threads 2 instead of 1")
    train(env=ENV_ID, out=tmp_path / "loud", verbose=True, **TINY)
    assert "step        60  evaluation" in capfd.readouterr().err


def raise_at(number: int) -> Callable[[Progress], None]:
    def callback(event: Progress) -> None:
        if (event.kind, event.step) == ("train", 40):
            signal.raise_signal(number)

    return callback


def test_ctrl_c_saves_and_is_then_what_it_always_is(known, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(env=ENV_ID, out=tmp_path / "run", on_progress=raise_at(signal.SIGINT), **TINY)
    assert Run(tmp_path / "run").steps == 40
    assert_same(known, train(out=tmp_path / "run", resume=True))


def test_a_handler_of_the_caller_gets_its_signal_after_the_checkpoint(tmp_path):
    heard: list[int] = []

    def handler(*_: Any) -> None:
        heard.append(len(list_checkpoints(tmp_path / "run")))

    before = signal.signal(signal.SIGTERM, handler)
    try:
        run = train(env=ENV_ID, out=tmp_path / "run", on_progress=raise_at(signal.SIGTERM), **TINY)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [3]
    assert (run.steps, run.finished) == (40, False)


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"env": 3}, "an environment id, or a function that makes environments, as env, got 3"),
        ({"env": LongEnv()}, "as env, got <.*LongEnv.*; give a function"),
        ({"env": None}, "wanted an environment, got none; give one with env"),
        ({"widht": 3}, "got widht; did you mean width?"),
        ({"total-steps": 3}, "got total-steps; did you mean total_steps?"),
        ({"algo": "sac", "preset": None, "reverse_samples": 3}, "algorithm sac has, got"),
        ({"total_steps": "many"}, "wanted a whole number as total_steps, got 'many'"),
        ({"total_steps": 60.5}, "wanted a whole number as total_steps, got 60.5"),
        ({"seed": True}, "wanted a whole number as seed, got True"),
        ({"policy_lr": "1e-3"}, "wanted a number as policy_lr, got '1e-3'"),
        ({"normalize_observation": 1}, "wanted true or false as normalize_observation, got 1"),
        ({"vector": "threads"}, "wanted one of sync, async, envpool as vector, got 'threads'"),
        ({"preset": 3}, "wanted text as preset, got 3"),
        ({"env_arg": [1]}, "wanted names with values as env_arg, got"),
        ({"env_arg": {"size": [1]}}, "wanted a number, a boolean or text as size of env_arg, got"),
        (
            {"env": make_env, "env_arg": {"size": 1}},
            "env_arg beside an environment id, got {'size': 1} beside a",
        ),
        ({"total_steps": 10}, "warmup_steps <= total_steps"),
        ({"target_kl": 1.0}, "with target_kl, which has no effect otherwise; leave target_kl out"),
        ({"config": "missing.toml"}, "cannot read the settings in 'missing.toml'"),
        ({"resume": True}, "wanted a run to resume"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(given, message, tmp_path):
    env = {} if "resume" in given else {"env": ENV_ID}
    with pytest.raises(RsmError, match=message.replace("?", r"\?")) as caught:
        train(**TINY | env | {"out": tmp_path / "run"} | given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_and_whole_floats_are_numbers(tmp_path):
    numbers: dict[str, Any] = {"total_steps": 6e1, "seed": np.int64(3), "policy_lr": 1, "tau": np.float32(0.5)}
    run = train(**TINY | numbers, env=ENV_ID, out=tmp_path / "run")
    found = {name: run.settings[name] for name in numbers}
    assert found == {"total_steps": 60, "seed": 3, "policy_lr": 1.0, "tau": 0.5}
    assert [type(value) for value in found.values()] == [int, int, float, float]


def test_what_is_given_replaces_the_file_and_the_file_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'env = "{ENV_ID}"\npreset = "quick"\nwidth = 24\nparticles = 3\nthreads = "none"\n')
    given = {name: value for name, value in TINY.items() if name not in ("preset", "width")}
    run = train(config=file, out=tmp_path / "run", **given)
    settings = run.settings
    assert [settings[name] for name in ("preset", "width", "particles", "depth", "threads")] == [
        *("quick", 24, 2, 2, None)
    ]


# --- algorithms -------------------------------------------------------------------------------------------


class OwnStart(DPMD):
    """DPMD with a policy of its own at the start."""

    def __init__(self, config: Any, obs_size: int, action_size: int, **parts: Any) -> None:
        super().__init__(config, obs_size, action_size, **parts)
        hidden = [config.width] * config.depth
        own = init_denoiser(obs_size, action_size, hidden, parts["generator"])
        own[f"layers.{config.depth}.weight"].zero_()
        for params in (self.agent.policy, self.agent.policy_average):
            load_params(params, own)


def test_a_class_is_an_algorithm(known, tmp_path):
    assert train(env=ENV_ID, algo=DPMD, out=tmp_path / "known", **TINY).settings["algo"] == "dpmd"
    assert_same(known, tmp_path / "known")
    whole = train(env=ENV_ID, algo=OwnStart, out=tmp_path / "whole", **TINY)
    assert whole.settings["algo"] == f"{__name__}:OwnStart"
    with pytest.raises(AssertionError):
        assert_same(known, whole)
    train(env=ENV_ID, algo=OwnStart, out=tmp_path / "parts", on_progress=stopping, **TINY)
    parts = train(algo=OwnStart, out=tmp_path / "parts", resume=True)
    assert_same(whole, parts)


def test_a_class_that_cannot_be_found_again_is_refused(tmp_path):
    class Inner(DPMD):
        pass

    for algo, message in (
        (Inner, r"found by its name, got .*<locals>.Inner, which is not at the top level"),
        (Path, "a class with Config, presets and update"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(env=ENV_ID, algo=algo, out=tmp_path / "run", **TINY)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
