"""The specification inside the graph: a bare model.onnx runs, and says where it comes from."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import onnx
import pytest
from onnx import helper
from rsm_export.graph.metadata import embed_spec

from rsm_common.errors import BundleError
from rsm_eval.cli import main as evaluate
from rsm_eval.sources import open_policy as open_source
from rsm_serve.bundle.onnx_file import POLICY_KEY, read_metadata
from rsm_serve.local import open_policy
from tests.bundles import make_model, make_spec, reference_action
from tests.rsm_eval.tiny_env import ENV_ID
from tests.rsm_export.embedding import read_spec, with_spec

SPEC = dataclasses.replace(
    make_spec("arm", "7"),
    env_id=ENV_ID,
    sampling={"schedule": "cosine", "eta": 1.0},
    accuracy={"max_error": 1e-7},
    evaluation={"mean": 3.5},
    provenance={"run": "arm", "step": 160, "torch": "2.13.0", "exported": "2026-11-22T00:00:00Z"},
)
EMBEDDED = dataclasses.replace(SPEC, version="0", accuracy=None, provenance={"run": "arm", "step": 160})


@pytest.fixture
def bare(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(with_spec(make_model(SPEC), SPEC))
    return path


def test_what_is_embedded_is_read_back_by_onnx_and_without_it(bare):
    assert read_spec(onnx.load(bare)) == EMBEDDED
    metadata = read_metadata(bare.read_bytes())
    assert metadata == {entry.key: entry.value for entry in onnx.load(bare).metadata_props}
    assert metadata["rsm.schema_version"] == "2"
    assert (metadata["rsm.name"], metadata["rsm.steps"], metadata["rsm.particles"]) == ("arm", "3", "2")
    assert "\n" not in metadata[POLICY_KEY]


def test_neither_version_nor_time_nor_tools_change_the_bytes():
    model = make_model(SPEC)
    other = dataclasses.replace(
        SPEC,
        version="8",
        accuracy={"max_error": 2e-7},
        provenance={"step": 160, "run": "arm", "torch": "2.14.0", "exported": "2027-01-01T00:00:00Z"},
    )
    assert with_spec(model, SPEC) == with_spec(model, other)
    assert with_spec(model, SPEC) != with_spec(model, dataclasses.replace(SPEC, env_id="Other-v0"))


def test_embedding_twice_is_embedding_once():
    model = onnx.load_from_string(make_model(SPEC))
    embed_spec(model, make_spec("before"))
    embed_spec(model, SPEC)
    assert model.SerializeToString(deterministic=True) == with_spec(make_model(SPEC), SPEC)


def test_a_graph_without_a_specification():
    assert read_spec(onnx.load_from_string(make_model(SPEC))) is None
    assert read_metadata(make_model(SPEC)) == {}


def test_a_bare_graph_acts_and_says_that_nothing_vouches_for_it(bare, caplog):
    with caplog.at_level(logging.WARNING):
        policy = open_policy(bare)
    assert "no manifest" in caplog.text
    assert policy.spec == EMBEDDED
    obs, noise = np.ones((5, 4), np.float32), np.ones((5, 3, 2, 2), np.float32)
    np.testing.assert_allclose(
        policy.act(obs, noise=noise).action, reference_action(SPEC, obs, noise), atol=1e-6
    )


def test_a_bare_graph_is_evaluated(bare, tmp_path, caplog):
    with open_source(str(bare)) as opened:
        assert opened.kind == "bundle"
    result = tmp_path / "result.json"
    command = ["--env", ENV_ID, "--policy", str(bare), "--episodes", "2", "--seeds", "0", "--json", str(result)]
    assert evaluate(command) == 0
    assert f"rsm-export {bare} --repo DIR" in caplog.text
    assert len(json.loads(result.read_text())["policies"]) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "rsm.policy in its metadata"),
        (b"not a graph", "ONNX file"),
        (b"\x72\xff\xff\xff\xff\x0f", "ONNX file"),
        (b"\x72\x04\x0a\x09ab", "ONNX file"),
        (b"\xff" * 20, "ONNX file"),
        (b"\x0b\x00", "ONNX file"),
    ],
)
def test_what_is_no_graph_of_ours(tmp_path, content, words):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=words):
        open_policy(path)


def test_a_graph_whose_specification_is_damaged_or_of_another_policy(tmp_path):
    path = tmp_path / "model.onnx"
    model = onnx.load_from_string(make_model(SPEC))
    helper.set_model_props(model, {POLICY_KEY: '{"schema_version": 99}'})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"graph .*got 99; install a newer"):
        open_policy(path)
    path.write_bytes(with_spec(make_model(SPEC), make_spec(action_size=3)))
    with pytest.raises(BundleError, match="wanted noise of the graph"):
        open_policy(path)


def test_a_truncated_bare_graph(bare):
    content = bare.read_bytes()
    for size in (1, len(content) // 2, len(content) - 1):
        bare.write_bytes(content[:size])
        with pytest.raises(BundleError, match=r"ONNX file|rsm.policy|JSON"):
            open_policy(bare)


def test_reading_metadata_steps_over_what_it_does_not_know():
    """Every wire type of protobuf, in a message that onnx would call unknown fields."""
    unknown = b"\x80\x7d\x01" + b"\x89\x7d" + bytes(8) + b"\x95\x7d" + bytes(4) + b"\x9a\x7d\x02hi"
    entry = b"\x72\x08\x0a\x01k\x12\x03abc"
    assert read_metadata(unknown + entry + unknown) == {"k": "abc"}
