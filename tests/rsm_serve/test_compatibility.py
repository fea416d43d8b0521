"""Files of earlier schema versions, checked in as they were written, and versions that never were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rsm_common.errors import BundleError
from rsm_common.manifest import MANIFEST_FILE, manifest_json
from rsm_common.seeds import draw_noise, expand_seed
from rsm_common.spec import DEFAULT_TOLERANCE, PolicySpec
from rsm_serve.bundle.contract import PAYLOAD_FILES, SPEC_FILE, load_bundle
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from tests.bundles import make_spec, reference_action
from tests.hang import HANG_S

GOLDEN = Path(__file__).parent.parent / "data" / "bundle_v1"
"""Repository with the policy "tiny" of schema version 1, written by the code of that time."""


def test_the_golden_bundle_is_really_of_version_1():
    data = json.loads((GOLDEN / "tiny" / "1" / SPEC_FILE).read_bytes())
    assert data["schema_version"] == 1
    assert not {"sampling", "accuracy", "tolerance"} & set(data)


def test_a_bundle_of_version_1_loads_and_answers():
    policy = open_policy(GOLDEN / "tiny")  # verified by its hashes, its probe replayed
    obs = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    noise = draw_noise(expand_seed(3, 7), (3, 2, 2))
    answer = policy.act(obs, seed=3)
    np.testing.assert_allclose(answer.action, reference_action(make_spec(), obs, noise), atol=1e-6)
    assert answer.q is not None
    np.testing.assert_allclose(answer.q, obs.sum(axis=1), atol=1e-5)


def test_a_bundle_of_version_1_is_served():
    config = ServerConfig(repo=GOLDEN, addresses=("127.0.0.1:0",))
    with background_server(config) as server, PolicyClient(server.addresses[0], timeout_s=HANG_S) as client:
        assert client.spec.evaluation == {"episodes": 2, "mean": 3.5}
        answer = client.act(np.ones(4), seed=1)
    np.testing.assert_allclose(answer.action, open_policy(GOLDEN / "tiny").act(np.ones(4), seed=1).action)


def test_version_1_is_written_back_as_the_present_one():
    spec = load_bundle(GOLDEN / "tiny").spec
    assert (spec.sampling, spec.accuracy, spec.tolerance) == (None, None, DEFAULT_TOLERANCE)
    assert spec.provenance == {"run": "tiny", "step": 160}
    again = json.loads(spec.to_json())
    assert again["schema_version"] == 2
    assert PolicySpec.from_json(spec.to_json()) == spec
    before = json.loads((GOLDEN / "tiny" / "1" / SPEC_FILE).read_bytes())
    assert {key: again[key] for key in before} == before | {"schema_version": 2}


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (0, "wanted policy.json of schema version 1, 2 or 3, got 0; export the policy again"),
        (-1, "got -1; export"),
        (99, "wanted policy.json of schema version 1, 2 or 3, got 99; install a newer rsm-toolkit"),
        ("1", "got '1'; export"),
        (None, "got None; export"),
        (True, "got True; export"),
        (1.0, "got 1.0; export"),
        ([1], r"got \[1\]; export"),
    ],
)
def test_other_schema_versions_say_why(tmp_path, version, message):
    version_dir = tmp_path / "tiny" / "1"
    version_dir.mkdir(parents=True)
    files = {name: (GOLDEN / "tiny" / "1" / name).read_bytes() for name in PAYLOAD_FILES}
    files[SPEC_FILE] = json.dumps(json.loads(files[SPEC_FILE]) | {"schema_version": version}).encode()
    for name, content in (files | {MANIFEST_FILE: manifest_json(files)}).items():
        (version_dir / name).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        load_bundle(version_dir)


@pytest.mark.parametrize(
    ("version", "shown"), [(0, "0"), (99, "99"), ("1", "'1'"), (None, "None"), (True, "True")]
)
def test_other_schema_versions_of_the_manifest(tmp_path, version, shown):
    data = json.loads((GOLDEN / "tiny" / "1" / MANIFEST_FILE).read_bytes()) | {"schema_version": version}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=f"wanted manifest schema version 1, got {shown};"):
        load_bundle(tmp_path)
