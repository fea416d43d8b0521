"""What --list-presets and --dry-run say of configurations."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from rsm_train.algorithms.registry import ALGORITHMS
from rsm_train.cli import main
from rsm_train.config import PRESETS, Preset, RunConfig, resolve
from rsm_train.run.describe import text


def test_every_preset_and_every_change_is_listed(capsys):
    assert main(["--list-presets"]) == 0
    output = capsys.readouterr().out
    defaults = {item.name: item.default for item in dataclasses.fields(RunConfig)}
    for name, preset in PRESETS.items():
        assert re.search(rf"^{name}( \(.*\))?: {re.escape(preset.description)}$", output, re.M)
        for setting, value in preset.settings.items():
            if defaults.get(setting, value) != value:
                default = re.escape(text(defaults[setting]))
                assert re.search(rf"^{setting} +{default} +-> +{text(value)}$", output, re.M)
    assert re.search(r"^particles +32 +-> +8  ", output, re.M)


def test_settings_of_one_algorithm_win_and_are_named(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "odd", Preset("Odd.", {"width": 5, "batch_size": 7}))
    for algo, own in (("dpmd", {"width": 6}), ("sac", {"width": 9})):
        monkeypatch.setattr(ALGORITHMS[algo], "presets", {**ALGORITHMS[algo].presets, "odd": own})
    algorithm: Any
    run, algorithm = resolve({"env": "Hopper-v5", "preset": "odd"})
    assert (run.batch_size, algorithm.width) == (7, 6)
    assert dataclasses.asdict(resolve({"env": "Hopper-v5", "preset": "odd", "width": 3})[1])["width"] == 3
    assert main(["--list-presets"]) == 0
    odd = capsys.readouterr().out.partition("odd (dpmd, sac): Odd.")[2]
    assert re.search(r"^width +256 +-> +6 +dpmd", odd, re.M)
    assert re.search(r"^width +256 +-> +9 +sac", odd, re.M)
    assert "sdac" not in odd


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (True, "on"), (12_000, "12,000"), (3e-4, "0.0003"), ("raw", "raw"), (1e-8, "1e-08")],
)
def test_values_are_short(value, shown):
    assert text(value) == shown
