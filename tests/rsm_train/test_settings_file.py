"""Files of settings: what --save-config writes means the same to --config, and mistakes are one sentence."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rsm_common.errors import ConfigError
from rsm_train.algorithms.registry import ALGORITHMS
from rsm_train.cli import main
from rsm_train.config import PRESETS, RunConfig, resolve
from rsm_train.run.many_seeds import plan, resume_command
from rsm_train.setting_types import checked
from rsm_train.settings_file import format_settings, read_settings
from tests.rsm_train.training_envs import MODULE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_ID = f"{MODULE}:RsmLong-v0"
TINY = (
    f"--env {ENV_ID} --preset quick --total-steps 40 --warmup-steps 20 --eval-every 20 --eval-episodes 1 "
    "--batch-size 8 --num-envs 2 --width 16"
).split()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def saved(tmp_path: Path, **given: Any) -> Path:
    return write(tmp_path / "run.toml", format_settings(*resolve({"env": "Hopper-v5", **given})))


CHANGES: list[dict[str, Any]] = [
    {"preset": preset, "algo": algo} for algo in ALGORITHMS for preset in ALGORITHMS[algo].presets
]
CHANGES += [
    {"out": 'runs/"a b"\\c', "seed": 2**63 - 1, "wandb": "project"},
    {"env_arg": {"size": 3, "model": "walker.xml", "terminate": False, "scale": 1e-30, "odd name": "ü"}},
    {"preset": "quick", "threads": "none", "tau": 0.1 + 0.2},
    {"policy_lr_final": 1e-5, "policy_lr_decay_start": 5, "temperature_schedule": "kl", "target_kl": 1.0},
]


@pytest.mark.parametrize("given", CHANGES, ids=str)
def test_a_saved_file_means_the_same_settings(given, tmp_path):
    wanted = resolve({"env": "Hopper-v5", **given})
    found = resolve({}, file=read_settings(saved(tmp_path, **given)))
    assert found == wanted
    assert [dataclasses.astuple(config) for config in found] == [dataclasses.astuple(c) for c in wanted]


def test_a_saved_file_does_not_depend_on_presets(tmp_path, monkeypatch):
    wanted = resolve({"env": "Hopper-v5", "preset": "quick"})
    path = saved(tmp_path, preset="quick")
    other = {"total_steps": 7, "width": 3, "policy_lr_final": 1e-6, "threads": 4}
    monkeypatch.setitem(PRESETS, "quick", dataclasses.replace(PRESETS["quick"], settings=other))
    assert resolve({"env": "Hopper-v5", "preset": "quick", "total_steps": 99_999}) != wanted
    assert resolve({}, file=read_settings(path)) == wanted


def test_a_saved_file_has_every_setting_with_its_help_in_the_groups_of_the_options(tmp_path):
    run, algorithm = resolve({"env": "Hopper-v5"})
    text = format_settings(run, algorithm)
    words = " ".join(re.sub(r"^#", "", text, flags=re.M).split())
    keys = re.findall(r"^(?:# )?([a-z_0-9]+) = ", text, re.M)
    fields = [item for config in (run, algorithm) for item in dataclasses.fields(config)]
    assert sorted(keys) == sorted({item.name for item in fields} - {"env_arg"})
    for item in fields:
        assert item.name == "env_arg" or " ".join(item.metadata["help"].split()) in words, item.name
    assert re.findall(r"^# --- (.+) ---$", text, re.M)[:3] == ["Environment", "Algorithm", "Run"]
    assert max(map(len, text.splitlines())) <= 112
    assert re.search(r"needs temperature_schedule\n?#? ?kl.\n# target_kl = 2.0\n", text)
    assert '\npolicy_lr_final = "none"\n' in text
    assert '\n# wandb = ""\n' in text


def test_a_value_that_toml_lacks_is_refused(tmp_path):
    run, algorithm = resolve({"env": "Hopper-v5", "env_arg": {"size": None}})
    with pytest.raises(ConfigError, match=r"as env_arg, as TOML has no others, got {'size': None}"):
        format_settings(run, algorithm)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht = 3", "that algorithm dpmd has in {path}, got widht; did you mean width?"),
        ("total-steps = 3", "got total-steps; did you mean total_steps?"),
        ("[training]\nseed = 1", "that algorithm dpmd has in {path}, got training"),
        ('algo = "sac"\nreverse_samples = 3', "algorithm sac has in {path}, got reverse_samples"),
        ('total_steps = "many"', "wanted a whole number as total_steps in {path}, got 'many'"),
        ("total_steps = true", "wanted a whole number as total_steps in {path}, got True"),
        ("tau = [0.1]", "wanted a number as tau in {path}, got [0.1]"),
        ("eval_one_particle = 1", "wanted true or false as eval_one_particle in {path}, got 1"),
        ("seed = 2020-01-01", "wanted a whole number as seed in {path}, got datetime.date"),
        ('vector = "threads"', "wanted one of sync, async, envpool as vector in {path}, got 'threads'"),
        ('preset = "fast"', "wanted a preset of paper"),
        ('algo = "ppo"', "wanted an algorithm of dpmd"),
        ("algo = 3", "wanted text as algo in {path}, got 3"),
        ("env_arg = 3", "wanted names with values as env_arg in {path}, got 3"),
        ("[env_arg]\nsize = [1]", "wanted a number, a boolean or text as size of env_arg in {path}, got [1]"),
        ("target_kl = 1.0", "kl with target_kl in {path}, which has no effect otherwise; leave target_kl in"),
        ("width = 3\nwidth = 4\n", "settings in TOML in {path}, got: Cannot overwrite a value (at line 2"),
        ("width = \n", "wanted settings in TOML in {path}, got: Invalid value (at line 1"),
        ("tau = nan", "wanted a finite tau, got nan"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(text, message, tmp_path, capsys):
    path = write(tmp_path / "run.toml", text)
    assert main(["--config", str(path), "--env", "Hopper-v5", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message.format(path=repr(str(path))) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (
        ("missing", "No such file or directory; correct the path"),
        ("", "Is a directory"),
        ("binary", "wanted settings in TOML in .*, got: 'utf-8' codec"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_settings(tmp_path / name)


def test_an_option_replaces_a_setting_of_the_file(tmp_path, capsys):
    path = saved(tmp_path, preset="kl", target_kl=1.0)
    file = read_settings(path)
    run, algorithm = resolve({"env": "Hopper-v5", "width": 16, "temperature_schedule": "constant"}, file=file)
    assert (run.updates_per_step, vars(algorithm)["width"]) == (1.0, 16)
    with pytest.raises(ConfigError, match="kl with --target-kl, which has no effect"):
        resolve({"temperature_schedule": "constant", "target_kl": 1.0}, file=file)
    with pytest.raises(ConfigError, match="wanted a whole number as width in .*run.toml"):
        resolve({}, file=dataclasses.replace(file, settings={**file.settings, "width": "wide"}))


def test_a_file_of_another_algorithm_names_what_is_too_much(tmp_path, capsys):
    path = saved(tmp_path)
    assert main(["--config", str(path), "--algo", "sac", "--out", str(tmp_path / "run")]) == 2
    assert f"that algorithm sac has in {str(path)!r}, got " in capsys.readouterr().err


def test_save_config_writes_the_file_and_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run.toml", "old")
    assert main([*TINY, "--save-config", "run.toml"]) == 0
    assert capsys.readouterr().out == "settings: run.toml\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    assert main(["--config", "run.toml", "--save-config", "a/again.toml", "--width", "24"]) == 0
    first, second = (tomllib.loads(Path(name).read_text()) for name in ("run.toml", "a/again.toml"))
    assert second == first | {"width": 24}
    for options, message in (
        (["--seeds", "0-1"], "wanted --save-config or --seeds, got both"),
        (["--dry-run"], "wanted --save-config or --dry-run, got both"),
    ):
        assert main([*TINY, "--save-config", "new.toml", *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["--env", "Hopper-v5", "--save-config", "a"]) == 2
    assert "wanted to write 'a', got " in capsys.readouterr().err


def test_a_run_of_a_file_is_that_of_the_options_and_is_resumed_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--out", "options"]) == 0
    assert main(["--resume", "--out", "options", "--save-config", "run.toml"]) == 0
    assert main(["--config", "run.toml", "--out", "file"]) == 0
    own, other = (json.loads(Path(name, "config.json").read_text()) for name in ("options", "file"))
    for config in (own, other):
        del config["run"]["out"]
    assert own == other
    networks = [next(Path(name).glob("checkpoints/*40/networks.safetensors")) for name in ("options", "file")]
    assert networks[0].read_bytes() == networks[1].read_bytes()
    resume = ["--config", "run.toml", "--resume", "--out", "file"]
    assert main([*resume, "--total-steps", "60"]) == 0
    assert (tmp_path / "file" / "checkpoints" / "step_000000060").is_dir()
    text = Path("run.toml").read_text().replace("width = 16", "width = 24")
    write(tmp_path / "run.toml", text)
    capsys.readouterr()
    assert main(resume) == 2
    assert (
        "wanted --width 16 as the run in 'file' has it, got 24 in 'run.toml'; leave --width out to resume"
        in capsys.readouterr().err
    )


def test_a_file_works_with_seeds(tmp_path, monkeypatch):
    path = saved(tmp_path, preset="quick", out="runs/s{seed}", seed=7)
    file = read_settings(path)
    given = {"width": 24, "out": None, "seed": None}
    workers = plan(given, [7, 8], 1, file=file).workers
    for worker, seed in zip(workers, (7, 8), strict=True):
        assert worker.run_dir == Path(f"runs/s{seed}")
        assert sorted(worker.command[3:]) == sorted(
            [f"--config={path}", "--width=24", f"--out=runs/s{seed}", f"--seed={seed}"]
        )
        assert worker.total_steps == 12_000
    assert (
        resume_command(given, "7-8", None, file) == f"rsm-train --width=24 --config={path} --seeds=7-8 --resume"
    )
    with pytest.raises(ConfigError, match=r"wanted {seed} in --out, .* got 'runs/x'"):
        plan(given, [7, 8], 1, file=read_settings(saved(tmp_path, out="runs/x")))


def test_a_dry_run_names_the_file_as_the_origin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rsm_train.run.estimate.BUDGET_S", 0.1)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run.toml", f'env = "{ENV_ID}"\npreset = "quick"\nwidth = 16\nnum_envs = 2\n')
    assert main(["--config", "run.toml", "--num-envs", "1", "--dry-run"]) == 0
    output = capsys.readouterr().out
    for line in (r"width +16 +run.toml", r"num_envs +1 +command line", r"depth +2 +preset quick"):
        assert re.search(f"^{line}$", output, re.M), line


OWN = """
from dataclasses import dataclass, field
from rsm_train.algorithms.sdac import SDAC, SDACConfig


@dataclass(frozen=True)
class OwnConfig(SDACConfig):
    sizes: tuple[int, ...] = (1, 2)
    slope: float = field(default=0.5, metadata={"help": "A slope."})


class Own(SDAC):
    Config = OwnConfig
    presets = {"paper": {}}
"""


def test_an_own_algorithm_of_a_file_brings_its_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    write(tmp_path / "own_of_file.py", OWN)
    write(tmp_path / "run.toml", 'env = "Hopper-v5"\nalgo = "own_of_file:Own"\nslope = 0.25\n')
    try:
        assert main(["--config", "run.toml", "--help"]) == 0
        assert "--slope" in capsys.readouterr().out
        assert main(["--config", "run.toml", "--slope", "0.125", "--save-config", "all.toml"]) == 0
        assert "slope = 0.125\n" in Path("all.toml").read_text()
        assert "\nsizes = [1, 2]\n" in Path("all.toml").read_text()
        _, algorithm = resolve({}, file=read_settings("all.toml"))
        assert (vars(algorithm)["slope"], vars(algorithm)["sizes"]) == (0.125, (1, 2))
    finally:
        sys.modules.pop("own_of_file", None)


def test_the_types_of_every_setting_are_checked():
    """A field of another type would be taken as it comes from a file."""
    configs: list[Any] = [RunConfig, *(algorithm.Config for algorithm in ALGORITHMS.values())]
    for config in configs:
        for item in dataclasses.fields(config):
            with pytest.raises(ConfigError, match=f"wanted .* {item.name}, got"):
                checked({item.name: object()}, config, str)
