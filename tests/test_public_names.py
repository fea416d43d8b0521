"""The face of the packages: names to import, versions, and what importing them costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import rsm_serve
import rsm_train
from tests.hang import HANG_S

PACKAGES = ("rsm_serve", "rsm_train", "rsm_eval", "rsm_export")


@pytest.mark.parametrize(
    ("package", "name"),
    [
        (package, name)
        for package in (rsm_serve, rsm_train)
        for name in package.__all__
        if name != "__version__"
    ],
)
def test_a_public_name_is_that_of_its_module(package, name):
    found = getattr(package, name)
    home = importlib.import_module(found.__module__)
    assert getattr(home, name) is found
    assert name in dir(package)


def test_the_names_that_the_pages_promise():
    from rsm_serve import AsyncPolicyClient, PolicyClient, PolicySpec, load_bundle, open_policy

    assert PolicyClient is importlib.import_module("rsm_serve.client").PolicyClient
    assert all(callable(name) for name in (AsyncPolicyClient, PolicySpec, load_bundle, open_policy))

    from rsm_train import Progress, Run, StopTraining, train

    assert train is importlib.import_module("rsm_train.library").train
    assert all(callable(name) for name in (Progress, Run, StopTraining))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_the_version_of_the_distribution(package):
    assert importlib.import_module(package).__version__ == importlib.metadata.version("rsm-toolkit")
    assert "__version__" in dir(importlib.import_module(package))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_is_not_there_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = importlib.import_module(package).nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing_else(package):
    code = f"import sys; before = set(sys.modules); import {package}; print(*set(sys.modules) - before)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True
    )
    loaded = {name.partition(".")[0] for name in output.stdout.split()} - sys.stdlib_module_names
    assert loaded == {package, "rsm_common"}


def test_training_without_its_extra_is_one_sentence():
    code = (
        "import sys\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "from rsm_common.errors import MissingExtraError\n"
        "from rsm_train import Progress, Run, StopTraining, train\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n"
        "    train(env='HalfCheetah-v5')\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True
    )
    assert output.stdout == (
        'rsm_train.train needs: pip install "rsm-toolkit[train]" (module torch is missing)\n'
    )


def test_the_client_needs_only_the_base_install():
    code = (
        "import sys\n"
        "for name in ('onnxruntime', 'torch', 'onnx', 'prometheus_client', 'uvloop', 'grpc_health'):\n"
        "    sys.modules[name] = None\n"
        "from rsm_serve import AsyncPolicyClient, PolicyClient, PolicySpec, check_health, load_bundle\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=HANG_S, check=True)
