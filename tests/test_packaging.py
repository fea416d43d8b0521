"""What users install and run: the wheel, the lock, the commands of the Makefile, CI and the image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.hang import HANG_S

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "rsm_train": "rsm_train",
    "rsm_common": "rsm_common",
    "rsm_serve": "rsm_serve",
    "rsm_eval": "rsm_eval",
    "rsm_export": "export/rsm_export",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# onnxruntime-gpu and onnxruntime exclude each other, so no lock can hold both. wandb talks to a service that
# changes with time, and brings a dozen packages that nothing else here needs; so does OpenTelemetry.
UNLOCKED_EXTRAS = {"serve-gpu", "wandb", "envpool", "otel"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# --- the wheel


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=HANG_S,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_holds_the_packages_and_nothing_else(unpacked_wheel: Path) -> None:
    files = {
        path.relative_to(unpacked_wheel).as_posix() for path in unpacked_wheel.rglob("*") if path.is_file()
    }
    content = {name for name in files if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert content == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= content
    assert any(name.startswith("rsm_eval/") and "html" in name for name in content), "the report's template"
    assert any(name.endswith("/licenses/LICENSE") for name in files)


def test_entry_points_resolve_inside_the_wheel(unpacked_wheel: Path) -> None:
    entry_points = ConfigParser()
    entry_points.read(next(unpacked_wheel.glob("*.dist-info")) / "entry_points.txt")
    commands = dict(entry_points["console_scripts"])
    assert set(commands) == {"rsm-train", "rsm-export", "rsm-serve", "rsm-eval", "rsm-client"}
    # A process of its own, in which the wheel's modules come before the checkout's.
    script = "\n".join(
        [
            "import importlib, sys",
            "for target in sys.argv[2:]:",
            "    module, _, function = target.partition(':')",
            "    module = importlib.import_module(module)",
            "    assert module.__file__.startswith(sys.argv[1]), module.__file__",
            "    assert callable(getattr(module, function)), target",
        ]
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(unpacked_wheel), *commands.values()],
        cwd=unpacked_wheel,
        env={**os.environ, "PYTHONPATH": str(unpacked_wheel)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr


# --- the lock


def lock_lines() -> list[str]:
    lines = [line.partition(" #")[0].strip() for line in (ROOT / "requirements.lock").read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def linux(python: str) -> dict[str, str]:
    """What markers are evaluated with: Linux with one Python."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "platform_python_implementation": "CPython",
    }


def pins(name: str, python: str) -> list[str]:
    """The versions that the lock allows for a package on Linux with one Python."""
    locked = [Requirement(line) for line in lock_lines()]
    return [
        str(item.specifier).removeprefix("==")
        for item in locked
        if canonicalize_name(item.name) == canonicalize_name(name)
        and (item.marker is None or item.marker.evaluate(linux(python)))
    ]


def locked_requirements(python: str) -> list[Requirement]:
    """What the locked extras ask for on Linux with one Python."""
    extras = PROJECT["optional-dependencies"]
    names = [name for extra in extras if extra not in UNLOCKED_EXTRAS for name in extras[extra]]
    found = [Requirement(name) for name in [*PROJECT["dependencies"], *names]]
    return [item for item in found if item.marker is None or item.marker.evaluate(linux(python))]


def test_lock_is_exact_and_free_of_addresses() -> None:
    assert len(lock_lines()) > 50
    for line in lock_lines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+( ; [^/@]+)?", line), line
    for name in ("requirements.lock", "requirements.in"):
        assert "://" not in (ROOT / name).read_text()


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_every_requirement_within_its_range(python: str) -> None:
    for requirement in locked_requirements(python):
        versions = pins(requirement.name, python)
        assert len(versions) == 1, (
            f"{requirement.name}: wanted one pin on Python {python}, got {versions}; run: make lock"
        )
        assert requirement.specifier.contains(versions[0]), (
            f"{requirement}: {versions[0]} is locked; run: make lock"
        )


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_what_other_parts_rely_on(python: str) -> None:
    assert pins("torch", python) == ["2.13.0"]
    (protobuf,) = pins("protobuf", python)
    assert int(protobuf.split(".")[0]) < 7, "tritonclient does not take protobuf 7"
    assert pins("hatchling", python), "the build backend"


# --- the commands


def test_ci_runs_the_command_of_the_readme(tmp_path: Path) -> None:
    commands = re.findall(r"^(?:\$ )?make ([a-z]+)\b", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(commands), "README.md shows both commands, each on a line of its own"
    # CI with a make that only says how it was called.
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$PWD: make $*"\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    called = subprocess.run(
        [ROOT / ".ci" / "run"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    ).stdout
    assert called == f"{ROOT}: make test\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_runs_every_check() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    plan = subprocess.run(
        ["make", "--dry-run", "test"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    ).stdout
    for step in ("ruff check", "ruff format --check", "mypy", "protos/generate.py --check", "pytest -n 2"):
        assert step in plan
    assert "pytest" in plan.splitlines()[-1], "pytest's closing line comes last"


@pytest.mark.parametrize("script", [".ci/run", "deploy/image.sh"])
def test_shell_scripts_are_strict_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text()
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=HANG_S)


# --- the image


def dockerfile_command(instruction: str) -> list[str]:
    """The arguments of the last ENTRYPOINT or CMD of the Dockerfile."""
    found = re.findall(rf"^\s*{instruction} (\[.*\])$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    arguments: list[str] = json.loads(found[-1])
    return arguments


def test_image_starts_a_server_with_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from rsm_serve.commands.serve_cli import main

    assert dockerfile_command("ENTRYPOINT") == ["rsm-serve"]
    # click reads every option before it shows the help, and refuses an unknown one.
    assert main([*dockerfile_command("CMD"), "--help"]) == 0
    assert "--repo" in capsys.readouterr().out


def test_image_health_check_is_a_client_command(capsys: pytest.CaptureFixture[str]) -> None:
    from rsm_serve.commands.client_cli import main

    text = (ROOT / "Dockerfile").read_text()
    health_check = json.loads(re.findall(r"^HEALTHCHECK .*\\\n\s*CMD (\[.*\])$", text, flags=re.MULTILINE)[0])
    assert health_check[0] == "rsm-client"
    assert main([*health_check[1:], "--help"]) == 0
    port = health_check[-1].rpartition(":")[2]
    options = dockerfile_command("CMD")
    assert options[options.index("--address") + 1] == f"0.0.0.0:{port}"
    http_port = options[options.index("--http") + 1].removeprefix("0.0.0.0:")
    assert f"EXPOSE {port} {http_port}\n" in text
    assert "Exit with 0" in capsys.readouterr().out


def test_the_images_options_serve_metrics(bundle_repo: Path) -> None:
    """The server of the image, but for its ports and repository."""
    options = [re.sub(r"^0\.0\.0\.0:\d+$", "0.0.0.0:0", part) for part in dockerfile_command("CMD")]
    options[options.index("--repo") + 1] = str(bundle_repo)
    command = [sys.executable, "-m", "rsm_serve.commands.serve_cli", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            port = ready.strip().rpartition(" http=0.0.0.0:")[2]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as answer:
                assert b'rsm_policy_info{policy="tiny"' in answer.read()
        finally:
            process.kill()


def test_image_installs_the_locked_serve_role_for_a_plain_user() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    build, _, final = text.partition(" AS serve\n")
    installs = [step for step in re.split(r"&&|\n", build) if re.search(r"/pip .*(install|wheel) ", step)]
    assert len(installs) == 4
    assert all("-c requirements.lock" in step or "--no-deps" in step for step in installs)
    assert 'rsm-toolkit[serve]"' in installs[-1]
    assert "\nUSER rsm\n" in final
    assert "ORT_DISABLE_TELEMETRY=1" in final, "a server on a robot calls nobody"
    assert not re.search(r"\b(pip|apt-get|gcc)\b", re.sub(r"#.*", "", final)), "the last stage only copies"
