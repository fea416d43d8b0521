"""rsm-export inspect, and a bare graph that becomes a bundle again."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import onnx
import pytest
from rsm_export.bundles.inspection import graph_facts
from rsm_export.cli import main

from rsm_common.errors import BundleError
from rsm_common.manifest import MANIFEST_FILE, file_record
from rsm_serve.bundle.contract import PAYLOAD_FILES, load_bundle
from rsm_serve.client import PolicyClient
from rsm_serve.config import ServerConfig
from rsm_serve.local import open_policy
from rsm_serve.server import background_server
from tests.bundles import make_model, make_spec, reference_action, write_bundle
from tests.rsm_export.embedding import with_spec

SPEC = dataclasses.replace(
    make_spec("arm", "3", obs_size=12),
    sampling={"schedule": "cosine", "timesteps": [19, 9, 0], "eta": 1.0, "prior_std": 0.5},
    accuracy={"rows": 72, "max_error": 2.5e-7},
    tolerance=2e-3,
    precision="fp16",
    evaluation={"mean": 123.5, "episodes": 20},
    provenance={"run": "arm", "git_commit": "abc"},
)


@pytest.fixture
def version_dir(tmp_path):
    return write_bundle(tmp_path / "repo", SPEC, model=with_spec(make_model(SPEC), SPEC))


def test_everything_is_printed(version_dir, capsys):
    assert main(["inspect", str(version_dir)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for fact in (
        "all hashes agree with the manifest",
        "policy arm, version 3",
        "12 observations, 2 actions, T = 3 steps, N = 2 particles",
        "noise [B, 3, 2, 2]",
        "timesteps [19, 9, 0]",
        "prior_std 0.5",
        "precision fp16",
        "tolerance 0.002 of the action range",
        "max_error 2.5e-07",
        "mean 123.5",
        "git_commit abc",
        "probe 4 rows",
        "control period 0.05 s",
        "0 to 11 o0 to o11 -inf inf",
        "1 a1 -3 1",
        "opset ai.onnx 18",
        "IR version 9",
        "obs FLOAT [batch, 12], noise FLOAT [batch, 3, 2, 2]",
        "action FLOAT [batch, 2], q FLOAT [batch]",
        "1 Tanh",
        "2 INT64 (24 bytes)",
        "rsm.name arm",
        *(file_record((version_dir / name).read_bytes())["sha256"] for name in (*PAYLOAD_FILES, MANIFEST_FILE)),
    ):
        assert str(fact) in text, fact


def test_json_holds_it_all_and_a_policy_directory_means_its_current_version(version_dir, capsys):
    write_bundle(version_dir.parent.parent, make_spec("arm", "2"))
    assert main(["inspect", str(version_dir.parent), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(version_dir)
    assert (report["kind"], report["problem"], report["probe_rows"]) == ("bundle", None, 4)
    assert report["policy"] == json.loads(SPEC.to_json())
    assert report["files"]["model.onnx"]["verified"] is True
    assert report["graph"] == graph_facts((version_dir / "model.onnx").read_bytes())
    assert report["graph"]["operators"]["MatMul"] == 2
    assert sum(report["graph"]["operators"].values()) == report["graph"]["nodes"]
    assert report["graph"]["initializers"]["INT64"] == {"count": 2, "bytes": 24}
    assert report["metadata"]["rsm.name"] == "arm"


@pytest.mark.parametrize("name", [*PAYLOAD_FILES, MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_bundle_is_named_and_fails(version_dir, name, damage, capsys):
    path = version_dir / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content) if damage == "flipped" else path.unlink()
    assert main(["inspect", str(version_dir)]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("rsm-export: ")
    assert error.count("\n") == 1
    assert name in error or "manifest" in error
    if name != MANIFEST_FILE:
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert ("DIFFERS" if damage == "flipped" else "MISSING") in line
        assert "every hash" not in out


def test_a_bare_graph_with_and_without_a_specification(version_dir, tmp_path, capsys):
    bare = tmp_path / "mailed.onnx"
    bare.write_bytes((version_dir / "model.onnx").read_bytes())
    assert main(["inspect", str(bare)]) == 0
    out = capsys.readouterr().out
    assert "no manifest" in out
    assert "policy arm, version 0" in out
    bare.write_bytes(make_model(SPEC))
    assert main(["inspect", str(bare)]) == 2
    assert "cannot be run" in capsys.readouterr().out
    assert main(["inspect", str(bare), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["policy"] is None


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x0a" + b"\x3a\x05\xff\xff\xff\xff\xff"])
def test_what_is_no_graph_is_one_sentence(tmp_path, content, capsys):
    (tmp_path / "x.onnx").write_bytes(content)
    assert main(["inspect", str(tmp_path / "x.onnx")]) == 2
    error = capsys.readouterr().err
    assert "wanted an ONNX file" in error
    assert error.count("\n") == 1


def test_nothing_there_is_one_sentence(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err
    with pytest.raises(BundleError):
        graph_facts(b"\xff")


def test_help_shows_both_commands_and_a_wrong_call_says_so(capsys):
    assert main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "RUN_OR_CHECKPOINT --repo DIR",
        "inspect BUNDLE [--json]",
        "--name TEXT",
        "Print the content of a",
    ):
        assert words in out
    assert main(["inspect", "--help"]) == 0
    assert "--json" in capsys.readouterr().out
    for wrong in ([], ["inspect"], ["run"], ["--repo"], ["inspect", "a", "b"]):
        assert main(wrong) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_help_of_exporting_has_sections_and_two_examples(capsys):
    for arguments in (["--help"], ["runs/pendulum", "--help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
        sections = ["Bundle", "Chain", "Precision and runtime", "Checks", "Search", "Other"]
        assert [title for title in titles if title != "Other commands"] == [*sections, "Examples"]
        search = text.partition("\nSearch:\n")[2].partition("\nOther:\n")[0]
        assert "  --auto " in search
        assert "  --tolerance " in search
        other = text.partition("\nOther:\n")[2].partition("\n\n")[0]
        assert set(re.findall(r"^  (\S+)", other, flags=re.M)) <= {"--version", "--help"}
        assert text.partition("\nExamples:\n")[2].count("# ") == 2


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        ([], "rsm-export RUN_OR_CHECKPOINT --repo DIR [OPTIONS]"),
        (["runs/pendulum"], "rsm-export RUN_OR_CHECKPOINT --repo DIR [OPTIONS]"),
        (["runs/pendulum", "--repo", "x", "--foo"], "rsm-export RUN_OR_CHECKPOINT --repo DIR [OPTIONS]"),
        (["runs/pendulum", "--help"], "rsm-export RUN_OR_CHECKPOINT --repo DIR [OPTIONS]"),
        (["inspect"], "rsm-export inspect [OPTIONS] BUNDLE"),
        (["inspect", "--help"], "rsm-export inspect [OPTIONS] BUNDLE"),
    ],
)
def test_usage_shows_the_command_as_it_is_typed(arguments, usage, capsys):
    assert main(arguments) == (0 if "--help" in arguments else 2)
    output = capsys.readouterr()
    assert (output.out or output.err).startswith(f"Usage: {usage}\n")
    assert "rsm-export export" not in output.out + output.err


def test_a_run_may_be_called_like_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inspect").mkdir()
    assert main(["./inspect", "--repo", "repo"]) == 2
    assert "wanted a run or a checkpoint of rsm-train at 'inspect'" in capsys.readouterr().err
    assert main(["--repo", "repo", "inspect"]) == 2  # the options first: it is no command then
    assert "wanted a run or a checkpoint" in capsys.readouterr().err


def test_a_bare_graph_becomes_a_bundle_that_is_served(version_dir, tmp_path, capsys):
    bare, repo = tmp_path / "mailed.onnx", tmp_path / "other"
    bare.write_bytes((version_dir / "model.onnx").read_bytes())
    assert main([str(bare), "--repo", str(repo)]) == 0
    assert main([str(bare), "--repo", str(repo), "--name", "renamed"]) == 0
    assert str(repo / "arm" / "1") in capsys.readouterr().out
    bundle = load_bundle(repo / "arm")
    assert bundle.model == bare.read_bytes()
    assert (bundle.spec.version, bundle.spec.sampling) == ("1", SPEC.sampling)
    assert bundle.probe.obs.shape == (8, 12)
    assert "adopted" in bundle.spec.provenance
    # Small, because OpenVINO's tanh is off by 3e-5 where it saturates.
    obs, noise = np.full((2, 12), 0.05, np.float32), np.zeros((2, 3, 2, 2), np.float32)
    wanted = reference_action(SPEC, obs, noise)
    allowed = 1e-5 * 4  # of the action range, whatever the runtime
    np.testing.assert_allclose(open_policy(repo / "renamed").act(obs, noise=noise).action, wanted, atol=allowed)
    config = ServerConfig(repo=repo, addresses=("127.0.0.1:0",))
    with background_server(config) as server, PolicyClient(server.addresses[0], "arm", timeout_s=10) as client:
        np.testing.assert_allclose(client.act(obs, noise=noise).action, wanted, atol=allowed)


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden"])
def test_a_bare_graph_under_an_unsafe_name_writes_nothing(tmp_path, name, capsys):
    bare = tmp_path / "mailed.onnx"
    bare.write_bytes(with_spec(make_model(SPEC), dataclasses.replace(SPEC, name=name)))
    assert main([str(bare), "--repo", str(tmp_path / "repo")]) == 2
    assert "wanted a policy name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mailed.onnx"]


def test_types_that_nobody_knows_are_shown_by_number():
    model = onnx.load_from_string(make_model(SPEC))
    model.graph.initializer[0].data_type = 99
    model.graph.input[0].type.tensor_type.elem_type = 77
    weights = model.graph.initializer.add()
    weights.data_type, weights.dims[:], weights.float_data[:] = onnx.TensorProto.FLOAT, [3], [1, 2, 3]
    facts = graph_facts(model.SerializeToString())
    assert facts["initializers"]["type 99"]["count"] == 1
    assert facts["inputs"]["obs"]["dtype"] == "type 77"
    before = graph_facts(make_model(SPEC))["initializers"]["FLOAT"]["bytes"]
    assert facts["initializers"]["FLOAT"]["bytes"] == before - facts["initializers"]["type 99"]["bytes"] + 12
