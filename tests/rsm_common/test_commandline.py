"""Options from nested configuration dataclasses, and help texts in sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from rsm_common.commandline import (
    GroupedCommand,
    GroupedOption,
    dataclass_options,
    format_assignments,
    from_options,
    parse_assignments,
)
from rsm_common.errors import ConfigError


@dataclass(frozen=True)
class Motor:
    power_w: float = field(default=5.0, metadata={"help": "Power.", "option": "motor_power_w"})
    fuse: bool = field(default=True, metadata={"help": "Whether there is a fuse."})
    serial: str = ""

    def __post_init__(self) -> None:
        if self.power_w <= 0:
            raise ConfigError(f"wanted motor_power_w > 0, got {self.power_w}")


@dataclass(frozen=True)
class RobotConfig:
    home: Path = field(metadata={"help": "Directory."})
    motor: Motor = field(default=Motor(), metadata={"group": "Motor"})
    mode: Literal["walk", "run"] = field(default="walk", metadata={"help": "Gait.", "group": "Gait"})
    tags: tuple[str, ...] = ()


def run(*arguments):
    given: dict[str, RobotConfig] = {}

    @click.command(
        "robot", cls=GroupedCommand, examples=(("Walk", "robot --home ."), ("Run", "robot --mode run"))
    )
    @dataclass_options(RobotConfig)
    @click.option("--tag", "tags", multiple=True, cls=GroupedOption, group="Gait", help="A tag.")
    def command(**settings):
        given.update(config=from_options(RobotConfig, settings))

    result = CliRunner().invoke(command, arguments, standalone_mode=True)
    return result, given.get("config")


def test_fields_of_a_nested_dataclass_are_options_that_find_their_place():
    result, config = run("--home", "x", "--motor-power-w", "7", "--no-fuse", "--mode", "run", "--tag", "a")
    assert result.exit_code == 0, result.output
    assert config == RobotConfig(Path("x"), Motor(7.0, fuse=False), "run", ("a",))


def test_options_that_were_not_given_have_the_defaults_of_the_nested_dataclass():
    _, config = run("--home", "x")
    assert config == RobotConfig(Path("x"))


def test_help_has_a_section_per_group_and_the_examples():
    result, _ = run("--help")
    text = result.output
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Motor:", "Gait:", "Other:", "Examples:"]
    motor = text[text.index("Motor:") : text.index("Gait:")]
    assert "--motor-power-w" in motor
    assert "[default: 5.0]" in motor
    assert "--fuse / --no-fuse" in motor
    assert "--tag" in text[text.index("Gait:") : text.index("Other:")]
    assert "--help" in text[text.index("Other:") :]
    assert "  # Run\n  robot --mode run\n" in text
    assert "serial" not in text


def test_each_dataclass_checks_itself():
    with pytest.raises(ConfigError, match="motor_power_w > 0, got -1"):
        from_options(RobotConfig, {"home": Path(), "motor_power_w": -1.0})


def test_a_field_without_an_option_goes_by_its_name_and_groups_can_be_given_whole():
    assert from_options(RobotConfig, {"home": Path(), "serial": "s"}).motor.serial == "s"
    assert from_options(RobotConfig, {"home": Path(), "motor": Motor(2.0)}).motor.power_w == 2.0


@pytest.mark.parametrize("options", [{"home": Path(), "hoem": 1}, {"home": Path(), "power_w": 1.0}, {}])
def test_unknown_and_missing_options_are_type_errors(options):
    with pytest.raises(TypeError):
        from_options(RobotConfig, options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("size=3", 3),
        ("size=-0.5", -0.5),
        ("size=true", True),
        ("size=null", None),
        ('size="3"', "3"),
        ("size=walker.xml", "walker.xml"),
        ("size=a=b", "a=b"),
        ("size=", ""),
        ("size=NaN", "NaN"),
        ("size=[1, 2]", "[1, 2]"),
    ],
)
def test_values_of_assignments_are_json_scalars_or_text(text, value):
    assert parse_assignments([text]) == {"size": value}
    assert parse_assignments(format_assignments({"size": value})) == {"size": value}


def test_a_name_that_is_assigned_twice_is_refused():
    with pytest.raises(ConfigError, match="every name once, got 'size' twice"):
        parse_assignments(["size=3", "size=4"])
