"""Training as a function: the settings of rsm-train as keyword arguments, and the run as an object."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsm_common.commandline import require_extra
from rsm_common.errors import CheckpointError, ConfigError
from rsm_train.setting_types import TOML_MODULE

if TYPE_CHECKING:
    import gymnasium

    from rsm_train.algorithms.common import Algorithm
    from rsm_train.environments.factory import EnvFactory
    from rsm_train.policy import TorchPolicy
    from rsm_train.progress import Callback
    from rsm_train.run.results import EvalPoint


class Run:
    """A run in its directory: that of a call of `train`, or of `rsm-train`.

    Each attribute is read from the directory when it is first used, and kept. A run that goes on has a new
    object.
    """

    def __init__(self, directory: str | Path) -> None:
        """Look at a run directory.

        Args:
            directory: its path.

        Raises:
            CheckpointError: no run has begun there.
        """
        self.directory = Path(directory)
        """The run directory."""
        if not (self.directory / "config.json").is_file() or (self.directory / "policy.json").is_file():
            raise CheckpointError(
                f"wanted a run directory, got {str(self.directory)!r}, where no run has begun; correct the path"
            )

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting of the run by its name, presets resolved.

        Raises:
            CheckpointError: config.json is damaged.
        """
        from rsm_train.run.run_directory import stored_settings

        return stored_settings(self.directory)

    @functools.cached_property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that are kept, oldest first."""
        from rsm_train.run.checkpoint_files import list_checkpoints

        return list_checkpoints(self.directory)

    @functools.cached_property
    def steps(self) -> int:
        """Steps of all environments at the newest checkpoint; 0 before the first one."""
        from rsm_train.run.checkpoint_files import read_state

        return int(read_state(self.checkpoints[-1])["step"]) if self.checkpoints else 0

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last step. If it has not, `resume=True` continues it."""
        return self.steps >= int(self.settings["total_steps"])

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        from rsm_eval.learning import METRICS_FILE, read_metrics

        return read_metrics(self.directory) if (self.directory / METRICS_FILE).exists() else []

    @functools.cached_property
    def evaluations(self) -> list[EvalPoint]:
        """Every evaluation in order: its step, the mean return and the standard deviation."""
        from rsm_train.run.results import read_evaluations

        return read_evaluations(self.directory)

    @property
    def final_return(self) -> float | None:
        """Mean return of the last evaluation; None without one."""
        return self.evaluations[-1].mean if self.evaluations else None

    @property
    def best_return(self) -> float | None:
        """Highest mean return of an evaluation; None without one."""
        return max((point.mean for point in self.evaluations), default=None)

    @functools.cached_property
    def policy(self) -> TorchPolicy:
        """The policy of the newest checkpoint, a `Policy` on the CPU.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        from rsm_train.run.checkpoint import load_torch_policy

        return load_torch_policy(self.checkpoints[-1] if self.checkpoints else self.directory)

    @functools.cached_property
    def best_policy(self) -> TorchPolicy:
        """The policy of the checkpoint with the best evaluation, which `rsm-export` and `rsm-eval` take.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        from rsm_train.run.checkpoint import load_torch_policy

        return load_torch_policy(self.directory)


def train(
    env: str | Callable[[], gymnasium.Env[Any, Any]] | None = None,
    *,
    algo: str | type[Algorithm] | None = None,
    preset: str | None = None,
    total_steps: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    on_progress: Callback | None = None,
    verbose: bool = False,
    **settings: Any,
) -> Run:
    """Train a policy with the settings of `rsm-train`, and return the run.

    The same settings give the same networks as the command, bit for bit. A setting that is not given, or is
    None, has the value of the file, else that of the preset, else its default. An error names a setting as
    it was given, or as the option of `rsm-train`.

    In the main thread, SIGINT (Ctrl-C, or the interruption of a notebook's cell), SIGTERM and SIGHUP let the
    run finish its present step and write a checkpoint. The signal then takes its usual effect, so Ctrl-C
    raises KeyboardInterrupt.

    Args:
        env: a Gymnasium id, "module:EnvId", or a function without arguments that returns another
            `gymnasium.Env` at every call. Evaluation uses the function too. A class is such a function, and
            `functools.partial` gives arguments. With vector="async", cloudpickle must be able to send the
            function to the workers.
        algo: "dpmd", "sdac", "sac", "module:Class", or a class like `rsm_train.algorithms.dpmd.DPMD`, which
            must be at the top level of its module or notebook.
        preset: "paper", "reference", "kl" or "quick".
        total_steps: steps of all environments.
        seed: of everything random.
        out: the run directory. The default is runs/ENV-ALGO-PRESET-sSEED.
        config: a TOML file of settings, as `rsm-train --save-config` writes it.
        resume: continue the run in `out`, or begin it if there is none. A run with a function as environment
            needs this function again.
        on_progress: called with a `Progress` for each line of metrics, each evaluation and each checkpoint.
            If it returns True or raises `StopTraining`, the run ends after its present step with a
            checkpoint, and can be resumed. Another exception ends the run at once, and reaches the caller.
        verbose: print progress on stderr as rsm-train does. Without it, nothing is printed, and warnings are
            logged by the logger rsm_train.
        **settings: any other setting of `rsm-train`, such as `num_envs=8`. The page Settings lists them.

    Returns:
        The run, which the callback may have stopped: see `Run.finished`.

    Raises:
        ConfigError: a setting is unknown, has a wrong type or is out of range; or `out` holds another run.
        UnsupportedEnvError: the environment cannot be created, or is not Box-to-Box.
        EnvFaultError: an environment fails in its first reset.
        CheckpointError: there is nothing to resume from, or it is damaged.
        TrainingError: the run cannot go on; its last checkpoint is intact.
        MissingExtraError: the extra train is not installed.
    """
    modules = ["torch", "gymnasium", "safetensors", "rich", "tensorboard", TOML_MODULE]
    require_extra("rsm_train.train", "train", modules)
    from rsm_train.run.run_directory import run_settings
    from rsm_train.run.start import Caller
    from rsm_train.run.start import train as train_run
    from rsm_train.run.stopping import RunStopped
    from rsm_train.settings_file import read_settings

    factory = _factory(env)
    given = {
        **{"env": env if factory is None else factory.env_id, "algo": _algorithm(algo), "preset": preset},
        **{"total_steps": total_steps, "seed": seed, "out": out},
        **settings,
    }
    file = None if config is None else read_settings(config)
    run, algorithm, run_dir = run_settings(given, resume=resume, file=file, named=str)
    if factory is not None:
        if run.env_arg:
            raise ConfigError(
                f"wanted env_arg beside an environment id, got {dict(run.env_arg)} beside a function; give the "
                "arguments with functools.partial"
            )
        if run.vector == "async":
            factory.check_pickle()
    caller = Caller(factory=factory, callback=on_progress, quiet=not verbose)
    try:
        train_run(run, algorithm, run_dir, resume=resume, caller=caller)
    except RunStopped as stopped:
        if stopped.signal is not None:
            signal.raise_signal(stopped.signal)
    return Run(run_dir)


def _factory(env: Any) -> EnvFactory | None:
    """The function that was given instead of an id; None for an id.

    Raises:
        ConfigError: something else was given.
    """
    import gymnasium

    from rsm_train.environments.factory import EnvFactory

    if env is None or isinstance(env, str):
        return None
    if not callable(env) or isinstance(env, gymnasium.Env):
        shown = " ".join(f"{env!s:.60}".split())
        raise ConfigError(
            f"wanted an environment id, or a function that makes environments, as env, got {shown}; give a "
            "function that returns a new environment at every call"
        )
    return EnvFactory(env)


def _algorithm(algo: Any) -> Any:
    """The name by which a class is found; anything else as it is.

    Raises:
        ConfigError: the class cannot be found by a name.
    """
    from rsm_train.algorithms.registry import ALGORITHMS

    if not isinstance(algo, type):
        return algo
    for name, known in ALGORITHMS.items():
        if known is algo:
            return name
    module, name = algo.__module__, algo.__qualname__
    if getattr(sys.modules.get(module), name, None) is not algo:
        raise ConfigError(
            f"wanted an algorithm that can be found by its name, got {module}:{name}, which is not at the top "
            "level of its module; define the class there"
        )
    return f"{module}:{name}"
