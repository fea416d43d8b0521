import dataclasses
import json
import re
import shlex
from typing import Any

import pytest

from rsm_common.commandline import _default_text
from rsm_train.algorithms.registry import ALGORITHMS
from rsm_train.cli import EXAMPLES, main
from rsm_train.config import RunConfig
from tests.rsm_train.runs import tiny_run


def test_trains_and_says_where(tmp_path, capsys):
    out = tmp_path / "run"
    options = (
        "--preset quick --total-steps 60 --warmup-steps 50 --eval-every 60 --eval-episodes 1 --batch-size 8"
    )
    assert main(["--env", "InvertedPendulum-v5", *options.split(), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert output.endswith(f"run directory: {out}\n")
    evaluation = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    for title in ("final:", "best: "):
        mean, one = evaluation["eval_mean"], evaluation["eval1_mean"]
        assert f"{title} step        60  {mean:9.1f} ± 0.0  with one particle {one:9.1f} ± 0.0\n" in output
    assert (out / "checkpoints" / "step_000000060" / "networks.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--env"]),
        (["--env", "Nope-v1"], ["Nope-v1", "environment"]),
        (["--env", "CartPole-v1"], ["CartPole-v1", "Box"]),
        (["--env", "Hopper-v5", "--algo", "ppo"], ["dpmd"]),
        (["--env", "Hopper-v5", "--preset", "fast"], ["paper, reference, kl, quick"]),
        (["--env", "Hopper-v5", "--device", "cuda:7"], ["cuda:7"]),
        (["--env", "Hopper-v5", "--particles", "0"], ["particles"]),
        (["--env", "Hopper-v5", "--particles", "x"], ["particles"]),
        (["--env", "Hopper-v5", "--dry-run", "--resume"], ["wanted --dry-run or --resume, got both"]),
        (["--env", "Hopper-v5", "--jobs", "2"], ["wanted --seeds beside --jobs"]),
    ],
)
def test_mistakes_get_one_sentence_and_status_2(arguments, words, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert "Traceback" not in error
    assert not out.exists(), "nothing half-written"


def test_help_names_every_setting(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--env", "--algo", "--preset", "--total-steps", "--diffusion-steps", "--particles"):
        assert option in text


def test_help_has_a_section_for_every_option_and_two_examples(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:3] == ["Environment", "Algorithm", "Run"]
    assert {"Evaluation", "Checkpoints", "Diffusion policy", "Networks", "Optimisation"} < set(titles)
    assert titles[-2:] == ["Other", "Examples"]
    other, _, examples = text.partition("\nOther:\n")[2].partition("\nExamples:\n")
    assert re.findall(r"--[\w-]+", other) == ["--version", "--help"]
    assert examples.count("# ") == 2


def test_the_examples_of_the_help_are_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for _, example in EXAMPLES for line in example.splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "rsm-train"
        # click reads every option before it shows the presets, and refuses an unknown one.
        assert main([*arguments, "--list-presets"]) == 0, capsys.readouterr().err


def test_a_finished_run_whose_evaluations_are_lost_is_one_sentence(tmp_path, capsys):
    run = tiny_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    assert main(["--resume", "--out", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"rsm-train: wanted an evaluation in the metrics of the run in {str(run)!r}, got none"
    )


def help_by_option(capsys):
    """What --help says of each option, in one line each."""
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.partition("Environment:")[2].partition("Examples:")[0]
    entries = re.split(r"^  (?=-)|^(?=\S)", lines, flags=re.M)
    entries = [entry for entry in entries if entry.startswith("-")]
    return {entry.split()[0].partition("/")[0]: " ".join(entry.split()) for entry in entries}


def test_help_has_the_text_and_every_default_of_every_algorithm(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")  # wide enough to break no line at a hyphen
    shown = help_by_option(capsys)
    configs: dict[str, Any] = {name: algorithm.Config for name, algorithm in ALGORITHMS.items()}
    for label, config in {"run": RunConfig, **configs}.items():
        for item in dataclasses.fields(config):
            entry = shown[f"--{item.name.replace('_', '-')}"]
            assert item.metadata["help"] in entry, f"{label}: {item.name}"
            if item.default not in (dataclasses.MISSING, None):
                default = ("off", "on")[item.default] if isinstance(item.default, bool) else item.default
                own = re.search(rf"[\[;] [^;]*\b{label}: ([^;\]]+)", entry.replace("[", "[ "))
                common = re.search(r"\[default: ([^;\]]+)", entry)
                found = own or common
                assert found is not None, f"{label}: {item.name}"
                assert found[1] == str(default), f"{label}: {item.name}"
    assert shown["--temperature"].endswith("[default: 5.0; sac: 1.0]")
    assert shown["--temperature-scale"].endswith("[default: 1.0; sdac: 0.2]")
    assert shown["--critics"].endswith("[default: 2]")


def test_equal_defaults_share_their_label():
    assert _default_text({"a": 1, "b": 2, "c": 2, "d": 1}) == "  [default: 1; b, c: 2]"
    assert _default_text({"a": None, "b": True}) == "  [default: none; b: on]"
    assert _default_text({"a": None, "b": dataclasses.MISSING}) == ""
    assert _default_text({"a": "none", "b": "none"}) == "  [default: none]"
