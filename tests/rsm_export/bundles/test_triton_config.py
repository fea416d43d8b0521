"""config.pbtxt, read with Triton's own protobuf definition."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from rsm_export.bundles import bundle_writer
from rsm_export.bundles.bundle_writer import write_bundle
from rsm_export.bundles.triton_config import triton_config
from tritonclient.grpc import model_config_pb2

from rsm_common.errors import BundleError
from rsm_serve.bundle.contract import CONFIG_FILE, list_versions, load_bundle
from tests.bundles import make_model, make_probe, make_spec


def parse(text):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def publish(repository, spec):
    return write_bundle(repository, spec, make_model(spec), make_probe(spec))


def shapes(tensors):
    return {tensor.name: list(tensor.dims) for tensor in tensors}


def described(policy_dir):
    """(versions that config.pbtxt lets Triton serve, its input shapes)."""
    config = parse((policy_dir / CONFIG_FILE).read_text())
    assert config.version_policy.WhichOneof("policy_choice") == "specific"
    return list(config.version_policy.specific.versions), shapes(config.input)


def test_triton_reads_what_the_specification_says():
    spec = make_spec("arm.v2_x-1", "12", obs_size=5, action_size=3, steps=7, particles=4)
    config = parse(triton_config(spec))
    assert (config.name, config.platform, config.backend) == ("arm.v2_x-1", "onnxruntime_onnx", "onnxruntime")
    assert config.default_model_filename == "model.onnx"
    assert config.max_batch_size == 64
    assert list(config.version_policy.specific.versions) == [12]
    assert shapes(config.input) == {"obs": [5], "noise": [7, 4, 3]}
    assert shapes(config.output) == {"action": [3], "q": [1]}
    tensors = [*config.input, *config.output]
    assert {tensor.data_type for tensor in tensors} == {model_config_pb2.TYPE_FP32}
    assert not any(tensor.optional for tensor in config.input), "Triton's backend draws no noise"
    # q is one number per row, and Triton has no shape without axes.
    assert [tensor.name for tensor in tensors if tensor.HasField("reshape")] == ["q"]
    assert list(config.output[1].reshape.shape) == []
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.dynamic_batching == model_config_pb2.ModelDynamicBatching()


def test_warm_up_covers_the_smallest_and_the_largest_batch():
    config = parse(triton_config(make_spec()))
    assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, config.max_batch_size]
    for warm_up in config.model_warmup:
        assert {name: list(value.dims) for name, value in warm_up.inputs.items()} == shapes(config.input)
        assert all(value.zero_data for value in warm_up.inputs.values())
        assert {value.data_type for value in warm_up.inputs.values()} == {model_config_pb2.TYPE_FP32}


def test_a_policy_without_critics_has_no_q():
    assert shapes(parse(triton_config(make_spec(has_q=False))).output) == {"action": [2]}


def test_an_unknown_field_would_be_noticed():
    with pytest.raises(text_format.ParseError):
        parse(triton_config(make_spec()) + "max_batchsize: 3\n")


def test_the_description_is_that_of_the_version_it_names(tmp_path):
    publish(tmp_path, make_spec("tiny", "1"))
    assert described(tmp_path / "tiny") == ([1], {"obs": [4], "noise": [3, 2, 2]})
    publish(tmp_path, make_spec("tiny", "2", obs_size=6, steps=1))
    assert described(tmp_path / "tiny") == ([2], {"obs": [6], "noise": [1, 2, 2]})


class Killed(BaseException):
    """The process ends here; nothing is cleaned up."""


def test_killed_between_version_and_description_both_still_agree(tmp_path, monkeypatch):
    publish(tmp_path, make_spec("tiny", "1"))

    def die(policy_dir, spec):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(bundle_writer, "_publish_config", die)
        with pytest.raises(Killed):
            publish(tmp_path, make_spec("tiny", "2", obs_size=6))
    # Version 2 is complete, and Triton goes on with version 1, which is what config.pbtxt describes.
    assert load_bundle(tmp_path / "tiny").spec.version == "2"
    versions, inputs = described(tmp_path / "tiny")
    assert versions == [1]
    assert inputs["obs"] == [load_bundle(tmp_path / "tiny" / "1").spec.observation.size]
    # The next export catches up.
    publish(tmp_path, make_spec("tiny", "3", obs_size=6))
    assert described(tmp_path / "tiny")[0] == [3]


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_description_that_cannot_be_written_takes_its_version_back(tmp_path, monkeypatch, earlier):
    for version in range(earlier):
        publish(tmp_path, make_spec("tiny", str(version + 1)))

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rsm_common.atomic.write_file", full)
        with pytest.raises(BundleError, match="No space left"):
            publish(tmp_path, make_spec("tiny", str(earlier + 1)))
    left = sorted(path.name for path in (tmp_path / "tiny").iterdir())
    assert left == (["1", "config.pbtxt"] if earlier else [])


def test_a_description_that_was_written_keeps_its_version(tmp_path, monkeypatch):
    """Interrupted after the rename: taking the version back would leave config.pbtxt naming nothing."""
    from rsm_common import atomic

    write_file = atomic.write_file

    def interrupted(path, content):
        write_file(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr("rsm_common.atomic.write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, make_spec())
    assert described(tmp_path / "tiny")[0] == list_versions(tmp_path / "tiny") == [1]


def test_a_slower_export_does_not_turn_the_description_back(tmp_path):
    publish(tmp_path, make_spec("tiny", "2"))
    publish(tmp_path, make_spec("tiny", "1", obs_size=6))
    assert described(tmp_path / "tiny") == ([2], {"obs": [4], "noise": [3, 2, 2]})
