"""Corrupt, mismatched and unsafe input, through the real commands: one sentence, status 2, nothing written."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rsm_export.cli import main as rsm_export

from rsm_common.manifest import MANIFEST_FILE, manifest_json
from rsm_eval.cli import main as rsm_eval
from rsm_serve.bundle.contract import MAX_JSON_BYTES, MODEL_FILE, PAYLOAD_FILES, SPEC_FILE
from rsm_serve.bundle.probe import MAX_PROBE_BYTES, PROBE_FILE
from rsm_serve.commands.serve_cli import main as rsm_serve
from rsm_train.foreign import import_weights
from tests.bundles import make_model, make_probe, make_spec, write_bundle
from tests.foreign import critic_arrays, policy_arrays
from tests.hang import HANG_S
from tests.rsm_eval.tiny_env import ENV_ID

FILES = [*PAYLOAD_FILES, MANIFEST_FILE]


def rewrite(version_dir, name, content):
    """Change a file and make the manifest agree with it: an attacker can do that too."""
    (version_dir / name).write_bytes(content)
    files = {payload: (version_dir / payload).read_bytes() for payload in PAYLOAD_FILES}
    (version_dir / MANIFEST_FILE).write_bytes(manifest_json(files))


def change_spec(version_dir, **changes):
    data = json.loads((version_dir / SPEC_FILE).read_bytes()) | changes
    rewrite(version_dir, SPEC_FILE, json.dumps(data).encode())


def written(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*"))


class Refusal:
    """Runs commands that must refuse: status 2, one sentence on stderr that has the words, no new file."""

    def __init__(self, directory, capfd):
        self._directory, self._capfd = directory, capfd

    def __call__(self, command, arguments, words):
        before = written(self._directory)
        self._capfd.readouterr()
        assert command(arguments) == 2, arguments
        out, error = self._capfd.readouterr()
        assert out == ""
        assert words in error, error
        assert "Traceback" not in error
        assert error.count("\n") == 1, error
        assert len(error) < 1000, "one sentence, whatever the file holds"
        assert written(self._directory) == before


@pytest.fixture
def refused(tmp_path, capfd):
    return Refusal(tmp_path, capfd)


@pytest.fixture
def version_dir(own_repo):
    return own_repo / "tiny" / "1"


@pytest.fixture
def bundle_refused(version_dir, refused, tmp_path):
    """The damaged bundle is refused by the server and by the evaluator."""

    def check(words):
        repo = str(version_dir.parent.parent)
        refused(rsm_serve, ["--repo", repo, "--address", "127.0.0.1:0"], words)
        report = ["--report", str(tmp_path / "out" / "report.html"), "--json", str(tmp_path / "out" / "r.json")]
        source = ["--env", ENV_ID, "--policy", str(version_dir)]
        refused(rsm_eval, [*source, "--episodes", "1", *report], words)

    return check


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte(version_dir, bundle_refused, name):
    content = bytearray((version_dir / name).read_bytes())
    content[len(content) // 2] ^= 0x20
    (version_dir / name).write_bytes(content)
    bundle_refused(f"the sha256 of {name}" if name != MANIFEST_FILE else str(version_dir))


@pytest.mark.parametrize("name", PAYLOAD_FILES)
def test_a_missing_file(version_dir, bundle_refused, name):
    (version_dir / name).unlink()
    bundle_refused(f"cannot read {name} (No such file or directory); copy the whole bundle")


def test_a_missing_manifest(version_dir, refused):
    (version_dir / MANIFEST_FILE).unlink()
    repo = str(version_dir.parent.parent)
    refused(rsm_serve, ["--repo", repo, "--address", "127.0.0.1:0"], MANIFEST_FILE)
    refused(rsm_eval, ["--env", ENV_ID, "--policy", str(version_dir)], MANIFEST_FILE)
    refused(rsm_export, ["inspect", str(version_dir)], MANIFEST_FILE)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("lost", [2, None])
def test_a_truncated_file(version_dir, bundle_refused, name, lost):
    content = (version_dir / name).read_bytes()
    (version_dir / name).write_bytes(content[:-lost] if lost else b"")
    bundle_refused(name)


@pytest.mark.parametrize("kind", ["directory", "loop", "nothing", "pipe", "device"])
@pytest.mark.parametrize("name", PAYLOAD_FILES)
def test_something_else_in_place_of_a_file(version_dir, bundle_refused, tmp_path, name, kind):
    path = version_dir / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nothing":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)  # whoever opens it for reading waits for ever
    else:
        path.symlink_to("/dev/zero")  # whoever reads it reads for ever
    bundle_refused(f"cannot read {name}")


def test_a_manifest_that_is_a_pipe(version_dir, refused):
    (version_dir / MANIFEST_FILE).unlink()
    os.mkfifo(version_dir / MANIFEST_FILE)
    refused(rsm_eval, ["--env", ENV_ID, "--policy", str(version_dir)], MANIFEST_FILE)


@pytest.mark.parametrize("name", PAYLOAD_FILES)
def test_a_link_is_judged_by_the_content_it_leads_to(version_dir, bundle_refused, tmp_path, name):
    """Kubernetes mounts volumes, and content stores share files, through links."""
    content = (version_dir / name).read_bytes()
    (version_dir / name).unlink()
    (version_dir / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(content)
    assert rsm_export(["inspect", str(version_dir)]) == 0
    (tmp_path / "elsewhere").write_bytes(b"x" * len(content))
    bundle_refused(f"the sha256 of {name}")


def test_another_action_dimension_with_right_hashes(version_dir, bundle_refused):
    action = {"names": ["a0", "a1", "a2"], "low": [-3.0] * 3, "high": [1.0] * 3}
    change_spec(version_dir, action=action, noise_shape=[3, 2, 3])
    bundle_refused("wanted noise as float32 [4, 3, 2, 3], got float32 [4, 3, 2, 2]")
    # The probe agrees as well; the graph does not.
    spec = make_spec("tiny", "1", action_size=3)
    rewrite(version_dir, SPEC_FILE, spec.to_json().encode())
    rewrite(version_dir, PROBE_FILE, make_probe(spec).to_bytes())
    bundle_refused("wanted noise of the graph as float32 ['B', 3, 2, 3]")


def test_the_graph_of_another_policy_of_the_same_shape(version_dir, bundle_refused):
    model = onnx.load_from_string(make_model(make_spec()))
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "W")
    weights.raw_data = (np.frombuffer(weights.raw_data, np.float32) * np.float32(1.01)).tobytes()
    rewrite(version_dir, MODEL_FILE, model.SerializeToString())
    bundle_refused("wanted the recorded probe actions")


def test_a_graph_that_reads_other_files(version_dir, bundle_refused, tmp_path, monkeypatch):
    """Weights outside the file would not be what was verified."""
    model = onnx.load_from_string(make_model(make_spec()))
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "W")
    (tmp_path / "W.bin").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", "W.bin"
    rewrite(version_dir, MODEL_FILE, model.SerializeToString())
    monkeypatch.chdir(tmp_path)
    bundle_refused("wanted a graph that holds its weights itself, got tensor 'W' in another file")


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_place_of_the_probe(version_dir, bundle_refused, tmp_path):
    bomb = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    buffer = io.BytesIO()
    np.savez(buffer, obs=bomb, noise=bomb, action=bomb)
    rewrite(version_dir, PROBE_FILE, buffer.getvalue())
    bundle_refused("holds Python objects")
    buffer = io.BytesIO()
    torch.save({"obs": torch.zeros(1)}, buffer)  # a pickle in a zip archive
    rewrite(version_dir, PROBE_FILE, buffer.getvalue())
    bundle_refused("plain arrays")
    assert not (tmp_path / "exploded").exists()


def npy(shape, data, descr="<f4", version=b"\x01\x00"):
    header = str({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("obs", "words"),
    [
        (npy((10**11, 4), b"\0" * 64), "64 bytes of data"),
        (npy((2**62, 4), b""), "0 bytes of data"),
        (npy((1, 4), bytes(MAX_PROBE_BYTES)), f"more than {MAX_PROBE_BYTES} bytes"),
        (npy((0, 4), b""), "wanted obs as float32 [0, 4]"),
        (npy((-1, 4), b""), "wanted obs"),
        (npy((1, 4), bytes(32), "<f8"), "got float64"),
        (npy((1, 4), bytes(16), ">f4"), "got >f4"),
        (npy((1, 4), bytes(16), "|O"), "Python objects"),
        (npy((1, 4), bytes(16), [("a", "|O")]), "Python objects"),
        (npy((1, 4), bytes(16), version=b"\x09\x00"), "version"),
        (npy("__import__('os')", b""), "plain arrays"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "plain arrays"),
        (b"", "plain arrays"),
    ],
)
def test_an_array_that_declares_what_it_is_not_allocates_nothing(version_dir, bundle_refused, obs, words):
    good = make_probe(make_spec())
    noise, action = npy(good.noise.shape, good.noise.tobytes()), npy(good.action.shape, good.action.tobytes())
    rewrite(version_dir, PROBE_FILE, npz(obs=obs, noise=noise, action=action))
    tracemalloc.start()
    try:
        bundle_refused(words)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_PROBE_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b" " * (MAX_JSON_BYTES + 1), f"at most {MAX_JSON_BYTES} bytes of {SPEC_FILE}"),
        (b"[" * 1_000_000, "is not JSON"),
        (b'{"schema_version": 2, "steps": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"schema_version": 2, "tolerance": NaN}', "NaN is not a number in JSON"),
        (b"\x80\x04\x95", "is not JSON"),
    ],
)
def test_an_enormous_or_malicious_policy_json(version_dir, bundle_refused, content, words):
    rewrite(version_dir, SPEC_FILE, content)
    bundle_refused(words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 10**9, "noise_shape": [10**9, 2, 2]}, "at most 16777216 random numbers"),
        ({"steps": True, "noise_shape": [1, 2, 2]}, "got True"),
        ({"has_q": "no"}, "true or false as has_q"),
        ({"control_dt_s": "fast"}, "control_dt_s"),
        ({"control_dt_s": 0}, "control_dt_s"),
        ({"evaluation": [1]}, "named values as evaluation"),
        ({"provenance": None}, "named values as provenance"),
        ({"tolerance": 2.0}, "tolerance between 0 and 1"),
        ({"action": {"names": "ab", "low": [0, 0], "high": [1, 1]}}, "wanted a list, got 'ab'"),
        ({"action": {"names": ["a", "b"], "low": [0, 0], "high": [1, 10**400]}}, "finite float32"),
        ({"action": {"names": ["a", "b"], "low": [0, 0], "high": [1, 1e39]}}, "finite float32"),
        ({"version": "../2"}, "wanted a version such as 1 in policy.json, got '../2'"),
        ({"version": "0"}, "wanted a version such as 1"),
    ],
)
def test_a_policy_json_that_asks_for_too_much_or_the_wrong_thing(version_dir, bundle_refused, changes, words):
    change_spec(version_dir, **changes)
    bundle_refused(words)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", ".hidden", "", "a\nb", "x" * 5000])
def test_a_name_in_policy_json_that_leaves_the_repository(version_dir, refused, name):
    change_spec(version_dir, name=name)
    repo = str(version_dir.parent.parent)
    refused(rsm_serve, ["--repo", repo, "--address", "127.0.0.1:0"], "wanted a policy name")
    refused(rsm_eval, ["--env", ENV_ID, "--policy", str(version_dir)], "wanted a policy name")


def test_the_bundle_of_another_place(version_dir, refused):
    change_spec(version_dir, name="other")
    repo = str(version_dir.parent.parent)
    refused(rsm_serve, ["--repo", repo, "--address", "127.0.0.1:0"], "got policy.json of 'other' version 1")


@pytest.mark.parametrize("name", ["../tiny", "/etc", "a/b", "..", ".tiny"])
def test_a_name_on_the_command_line_that_leaves_the_repository(own_repo, refused, name):
    arguments = ["--repo", str(own_repo), "--address", "127.0.0.1:0", "--policy", name]
    refused(rsm_serve, arguments, "wanted a policy name")


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "model.onnx/../x"])
def test_a_manifest_that_names_other_files(version_dir, bundle_refused, path):
    files = {name: (version_dir / name).read_bytes() for name in PAYLOAD_FILES}
    (version_dir / MANIFEST_FILE).write_bytes(manifest_json({**files, path: b"x"}))
    bundle_refused("manifest.json must list size and sha256 of")
    del files[MODEL_FILE]
    (version_dir / MANIFEST_FILE).write_bytes(manifest_json({**files, path: b"x"}))
    bundle_refused("manifest.json must list size and sha256 of")


@pytest.mark.parametrize(
    "record", [{"size": -1}, {"size": 10**30}, {"size": "1"}, {"size": None}, {"size": [1]}, {}]
)
def test_a_manifest_of_odd_sizes(version_dir, bundle_refused, record):
    data = json.loads((version_dir / MANIFEST_FILE).read_bytes())
    data["files"][MODEL_FILE] = {"sha256": "0" * 64, **record}
    (version_dir / MANIFEST_FILE).write_text(json.dumps(data))
    bundle_refused(MODEL_FILE)


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b" " * (MAX_JSON_BYTES + 1), b"\xff\xfe"])
def test_an_enormous_or_malicious_manifest(version_dir, bundle_refused, content):
    (version_dir / MANIFEST_FILE).write_bytes(content)
    bundle_refused("manifest.json is damaged")


# --- checkpoints, read by rsm-export and rsm-eval ---------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return import_weights(
        tmp_path / "arm",
        policy=policy_arrays(4, 2, 8),
        critics=[critic_arrays(4, 2, 8, 1)],
        env_id=ENV_ID,
        obs_size=4,
        action_low=[-3.0, -3.0],
        action_high=[1.0, 1.0],
        steps=2,
        particles=2,
    )


@pytest.fixture
def checkpoint_refused(checkpoint, refused, tmp_path):
    def check(words):
        refused(rsm_export, [str(checkpoint), "--repo", str(tmp_path / "repo")], words)
        refused(rsm_eval, ["--env", ENV_ID, "--policy", str(checkpoint), "--episodes", "1"], words)

    return check


@pytest.mark.parametrize("name", ["networks.safetensors", "probe.safetensors"])
def test_a_pickle_in_place_of_safetensors(checkpoint, checkpoint_refused, tmp_path, name):
    torch.save({"obs": Bomb(tmp_path / "exploded")}, checkpoint / name)
    checkpoint_refused("is damaged")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["networks.safetensors", "probe.safetensors", "policy.json", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint(checkpoint, checkpoint_refused, name, damage):
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    if damage == "truncated":
        (checkpoint / name).write_bytes(content[: len(content) // 2])
    checkpoint_refused(checkpoint.name)


def test_a_checkpoint_of_another_action_dimension(checkpoint, checkpoint_refused):
    data = json.loads((checkpoint / "policy.json").read_bytes())
    data |= {"action": {"names": ["a"], "low": [-1.0], "high": [1.0]}, "noise_shape": [2, 2, 1]}
    (checkpoint / "policy.json").write_text(json.dumps(data))
    checkpoint_refused("policy.json is truncated or changed")
    (checkpoint / "sha256.json").unlink()
    checkpoint_refused("wanted a weight with 21 inputs")


@pytest.mark.parametrize("name", ["../evil", "a/b", "/tmp/evil"])
def test_a_checkpoint_whose_name_leaves_the_repository(checkpoint, refused, tmp_path, name):
    data = json.loads((checkpoint / "policy.json").read_bytes()) | {"name": name}
    (checkpoint / "policy.json").write_text(json.dumps(data))
    (checkpoint / "sha256.json").unlink()
    refused(rsm_export, [str(checkpoint), "--repo", str(tmp_path / "repo")], "wanted a policy name")


def test_as_processes(tmp_path):
    """Status and output as a shell sees them."""
    version_dir = write_bundle(tmp_path / "repo", make_spec())
    rewrite(version_dir, PROBE_FILE, b"garbage")
    for arguments in (
        ["rsm_serve.commands.serve_cli", "--repo", str(tmp_path / "repo"), "--address", "127.0.0.1:0"],
        ["rsm_eval.cli", "--env", ENV_ID, "--policy", str(version_dir)],
    ):
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "probe.npz must be an npz file" in done.stderr
        assert done.stderr.count("\n") == 1
