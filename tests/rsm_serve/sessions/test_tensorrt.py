"""TensorRT without a GPU: the real names, and a strict fake that computes; with a GPU, the real thing."""

from __future__ import annotations

import dataclasses
import fcntl
import inspect
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rsm_common.errors import (
    BackendError,
    BundleError,
    InvalidRequestError,
    MissingExtraError,
    RsmError,
    UsageError,
)
from rsm_common.seeds import draw_noise, expand_seed
from rsm_serve.bundle.contract import load_bundle
from rsm_serve.local import LocalPolicy
from rsm_serve.sessions import engine_cache, tensorrt, tensorrt_engine
from rsm_serve.sessions.batch_sizes import bucket_sizes
from rsm_serve.sessions.engine_cache import EngineCache, default_cache_dir
from rsm_serve.sessions.onnx_structure import read_structure
from rsm_serve.sessions.onnxruntime import OnnxRuntimeSession
from rsm_serve.sessions.tensorrt import TensorRTSession
from tests import tensorrt_fake
from tests.bundles import make_model, make_probe, make_spec, write_bundle
from tests.hang import HANG_S
from tests.tensorrt_fake import FakeGpu, make_cudart, make_tensorrt
from tests.tensorrt_names import bindings_file, missing_strings, real_names, used_names

SPEC = make_spec()
MODEL = make_model(SPEC)
SOURCES = [Path(module.__file__ or "") for module in (tensorrt, tensorrt_engine)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    fake.install(monkeypatch)
    return fake


def inputs(rows: int, seed: int = 3, spec: Any = SPEC) -> tuple[Any, Any]:
    obs = np.random.default_rng(seed).normal(size=(rows, spec.observation.size)).astype(np.float32)
    return obs, draw_noise(expand_seed(seed, rows), spec.noise_shape)


def changed(model: bytes, name: str, factor: float = 0.5) -> bytes:
    """The model with one initialiser multiplied."""
    proto = onnx.load_from_string(model)
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), name))
    content: bytes = proto.SerializeToString()
    assert content != model
    return content


def expect(session: Any, model: bytes, rows: int = 5, spec: Any = SPEC) -> None:
    """The session answers as onnxruntime does."""
    obs, noise = inputs(rows, spec=spec)
    action, q = session.run(obs, noise)
    wanted, wanted_q = OnnxRuntimeSession(model, spec).run(obs, noise)
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, wanted, atol=1e-6)
    if wanted_q is None:
        assert q is None
    else:
        np.testing.assert_allclose(q, wanted_q, atol=1e-5)


# --- structure and weights ---------------------------------------------------------------------------------


def test_structure_is_what_remains_without_the_weights():
    structure = read_structure(MODEL)
    # center and scale are added and multiplied; low and high are bounds of Max and Min.
    assert set(structure.weights) == {"W", "center", "scale", "big", "widen", "narrow"} - {"big"}
    assert read_structure(changed(MODEL, "W")).digest == structure.digest


def test_weights_of_an_unused_tensor_stay_in_the_digest():
    assert read_structure(changed(MODEL, "big")).digest != read_structure(MODEL).digest


def test_scalars_are_structure():
    """Coefficients of the sampler: the builder may fold them."""

    def with_scalar(proto):
        (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == "center")
        tensor.CopyFrom(numpy_helper.from_array(np.array(2, np.float32), "center"))

    assert "center" not in read_structure(edited(with_scalar)).weights


@pytest.mark.parametrize("name", ["low", "high", "axes_tn", "axis_o"])
def test_constants_that_a_runtime_may_bake_are_structure(name):
    assert read_structure(changed(MODEL, name, 2)).digest != read_structure(MODEL).digest


def edited(edit: Any) -> bytes:
    proto = onnx.load_from_string(MODEL)
    edit(proto)
    content: bytes = proto.SerializeToString()
    return content


@pytest.mark.parametrize(
    "edit",
    [
        lambda proto: setattr(proto.graph.node[7], "op_type", "Sigmoid"),
        lambda proto: setattr(proto.graph.node[1].attribute[0], "i", 1),
        lambda proto: setattr(proto.opset_import[0], "version", 17),
        lambda proto: setattr(proto.graph.initializer[0], "name", "V"),
        lambda proto: proto.graph.initializer[0].dims.__setitem__(slice(None), [2, 4]),
        lambda proto: setattr(proto.graph.initializer[0], "data_type", onnx.TensorProto.FLOAT16),
        lambda proto: proto.graph.node[3].input.__setitem__(0, "obs_W"),
        # The same weight as a bound: a runtime may bake it.
        lambda proto: proto.graph.node[10].input.__setitem__(1, "scale"),
    ],
)
def test_every_change_of_the_graph_changes_the_digest(edit):
    assert read_structure(edited(edit)).digest != read_structure(MODEL).digest


def test_a_weight_that_is_an_output_too_or_seen_by_a_subgraph_is_structure():
    def as_output(proto):
        proto.graph.output.append(helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [4, 2]))

    def with_subgraph(proto):
        proto.graph.node[0].attribute.append(helper.make_attribute("body", helper.make_graph([], "b", [], [])))

    assert "W" not in read_structure(edited(as_output)).weights
    assert read_structure(edited(with_subgraph)).weights == ()


@pytest.mark.parametrize("content", [MODEL[:-3], b"\xff" * 20, b"no onnx at all"])
def test_damaged_protobuf_is_refused(content):
    with pytest.raises(ValueError):
        read_structure(content)


# --- running -----------------------------------------------------------------------------------------------


def test_bucket_sizes():
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert bucket_sizes(20) == [1, 2, 4, 8, 16, 20]


@pytest.mark.parametrize("version", ["11.4.0.106", "10.12.0.36"])
def test_actions_are_onnxruntimes_for_every_batch(gpu, tmp_path, version, monkeypatch):
    gpu.version = version
    gpu.install(monkeypatch)
    session = TensorRTSession(MODEL, SPEC, max_batch_size=8, cache_dir=tmp_path)
    assert session.runtime == f"tensorrt {version} on Fake H100, CUDA graphs"
    before = dict(gpu.counts)
    for rows in range(1, 9):
        expect(session, MODEL, rows)
    assert gpu.counts["launch"] - before["launch"] == 8
    assert gpu.counts["enqueue"] == before["enqueue"], "every run is a captured graph"
    expect(session, MODEL, 19)
    assert gpu.counts["launch"] - before["launch"] == 8 + 3, "8 + 8 + 3 rows"
    action, _ = session.run(*inputs(0))
    assert action.shape == (0, 2)


def test_a_graph_without_critics_gives_no_values(gpu, tmp_path):
    spec = make_spec(has_q=False)
    session = TensorRTSession(make_model(spec), spec, max_batch_size=2, cache_dir=tmp_path)
    expect(session, make_model(spec), spec=spec)
    session.close()
    assert gpu.leaks() == {}


def test_a_replayed_graph_sees_new_observations(gpu, tmp_path):
    session = TensorRTSession(MODEL, SPEC, max_batch_size=4, cache_dir=tmp_path)
    (obs, noise), (other, _) = inputs(2, seed=1), inputs(2, seed=2)
    first, second = session.run(obs, noise)[0], session.run(other, noise)[0]
    assert np.abs(first - second).min() > 1e-3
    assert np.array_equal(session.run(obs, noise)[0], first)


def test_answers_belong_to_the_caller(gpu, tmp_path):
    session = TensorRTSession(MODEL, SPEC, max_batch_size=4, cache_dir=tmp_path)
    first = session.run(*inputs(3, seed=1))
    kept = [np.copy(array) for array in first if array is not None]
    session.run(*inputs(3, seed=2))
    session.close()
    for array, copy in zip(first, kept, strict=True):
        assert array is not None
        assert np.array_equal(array, copy)
        assert array.flags.owndata


def test_padding_is_zero_and_not_an_earlier_callers_rows(gpu, tmp_path):
    session = TensorRTSession(MODEL, SPEC, max_batch_size=4, cache_dir=tmp_path)
    session.run(*inputs(4))
    obs, noise = inputs(3, seed=9)
    action, q = session.run(obs, noise)
    assert action.shape == (3, 2)
    assert q is not None
    assert q.shape == (3,)
    pinned = [data.view(np.float32) for kind, data in gpu.memory.values() if kind == "pinned"]
    sizes = {4 * 4: obs, 4 * 12: noise}
    for data in pinned:
        if data.size in sizes:
            rows = data.reshape(4, -1)
            assert np.array_equal(rows[:3], sizes[data.size].reshape(3, -1))
            assert not rows[3].any()
    assert sorted(data.size for data in pinned) == [4, 8, 16, 48]


@pytest.mark.parametrize(
    ("fails", "text"),
    [(lambda rows: True, "no CUDA graphs"), (lambda rows: rows > 2, "CUDA graphs for 2 of 3 batch sizes")],
)
def test_without_capture_it_runs_plainly_and_says_so(gpu, tmp_path, caplog, fails, text):
    gpu.capture_fails_for = fails
    session = TensorRTSession(MODEL, SPEC, max_batch_size=4, cache_dir=tmp_path)
    assert session.runtime.endswith(text)
    warnings = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert len(warnings) == 1
    assert "cudaStreamEndCapture" in warnings[0]
    for rows in (1, 3, 4):
        expect(session, MODEL, rows)
    session.close()
    assert gpu.leaks() == {}


def test_a_capture_that_misses_the_engine_is_not_replayed(gpu, tmp_path):
    """TensorRT refuses, CUDA is content: the graph would hold the copies and nothing else."""
    gpu.execute_fails = lambda capturing: capturing
    session = TensorRTSession(MODEL, SPEC, max_batch_size=4, cache_dir=tmp_path)
    assert session.runtime.endswith("no CUDA graphs")
    expect(session, MODEL)
    session.close()
    assert gpu.leaks() == {}


def test_memory_is_not_freed_under_copies_that_are_under_way(gpu, tmp_path):
    gpu.capture_fails_for = lambda rows: True
    session = TensorRTSession(MODEL, SPEC, max_batch_size=1, cache_dir=tmp_path)
    gpu.execute_fails = lambda capturing: True
    with pytest.raises(BackendError, match="TensorRT refuses the execution"):
        session.run(*inputs(1))
    assert any(gpu.streams.values()), "the copies to the GPU are pending"
    session.close()
    assert gpu.leaks() == {}


def test_a_graph_that_cannot_be_instantiated_is_destroyed(gpu, tmp_path):
    gpu.cuda_fails["cudaGraphInstantiate"] = "cudaErrorMemoryAllocation"
    session = TensorRTSession(MODEL, SPEC, max_batch_size=4, cache_dir=tmp_path)
    assert session.runtime.endswith("no CUDA graphs")
    expect(session, MODEL)
    session.close()
    assert gpu.leaks() == {}


def test_close_gives_everything_back_once(gpu, tmp_path):
    session = TensorRTSession(MODEL, SPEC, cache_dir=tmp_path)
    assert set(gpu.leaks()) == {"device memory", "pinned memory", "streams", "executable graphs", "contexts"}
    session.close()
    assert gpu.leaks() == {}
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run(*inputs(1))


def test_a_dropped_session_gives_everything_back(gpu, tmp_path):
    session = TensorRTSession(MODEL, SPEC, max_batch_size=2, cache_dir=tmp_path)
    session.run(*inputs(1))
    del session
    assert gpu.leaks() == {}


@pytest.mark.parametrize(
    "call",
    ["cudaStreamCreateWithFlags", "cudaHostAlloc", "cudaMalloc", "cudaStreamSynchronize", "cudaMemcpyAsync"],
)
def test_a_gpu_that_refuses_is_one_sentence_and_no_leak(gpu, tmp_path, call):
    gpu.cuda_fails[call] = "cudaErrorMemoryAllocation"
    with pytest.raises(BundleError, match=f"{call} failed with cudaErrorMemoryAllocation") as caught:
        TensorRTSession(MODEL, SPEC, max_batch_size=2, cache_dir=tmp_path)
    del caught
    assert gpu.leaks() == {}


def test_no_memory_for_a_context_is_one_sentence_and_no_leak(gpu, tmp_path):
    gpu.context_fails = True
    with pytest.raises(BundleError, match="execution context"):
        TensorRTSession(MODEL, SPEC, cache_dir=tmp_path)
    assert gpu.leaks() == {}


@pytest.mark.parametrize("call", ["cudaGraphLaunch", "cudaStreamSynchronize", "cudaSetDevice"])
def test_a_failing_run_is_a_backend_error(gpu, tmp_path, call):
    session = TensorRTSession(MODEL, SPEC, max_batch_size=2, cache_dir=tmp_path)
    gpu.cuda_fails[call] = "cudaErrorLaunchFailure"
    with pytest.raises(BackendError, match=f"{call} failed with cudaErrorLaunchFailure"):
        session.run(*inputs(1))
    gpu.cuda_fails.clear()
    expect(session, MODEL, 2)


def test_the_thread_that_runs_selects_the_device(gpu, tmp_path):
    session = TensorRTSession(MODEL, SPEC, max_batch_size=2, cache_dir=tmp_path)
    before = gpu.counts["set_device"]
    session.run(*inputs(1))
    assert gpu.counts["set_device"] == before + 1


def test_shapes_that_numpy_would_broadcast_are_refused(gpu, tmp_path):
    session = TensorRTSession(MODEL, SPEC, max_batch_size=2, cache_dir=tmp_path)
    obs, noise = inputs(2)
    for wrong in ((obs[:, :1], noise), (obs, noise[:1]), (obs, noise[:, :1])):
        with pytest.raises(InvalidRequestError, match="wanted"):
            session.run(*wrong)


def test_it_is_a_session_for_a_policy(gpu, tmp_path):
    bundle = load_bundle(write_bundle(tmp_path / "repository", SPEC))
    session = TensorRTSession(bundle.model, SPEC, cache_dir=tmp_path / "cache")
    policy = LocalPolicy(bundle, session, warm_up_rows=(1, 64))
    probe = make_probe(SPEC)
    np.testing.assert_allclose(policy.act(probe.obs, noise=probe.noise).action, probe.action, atol=1e-5)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "spec", "text"),
    [
        (MODEL, make_spec(obs_size=5), "obs"),
        (MODEL, make_spec(has_q=False), "q"),
        (make_model(make_spec(has_q=False)), SPEC, "q"),
        (MODEL, make_spec(particles=3), "noise"),
    ],
)
def test_a_graph_that_is_not_the_policys_is_refused(gpu, tmp_path, model, spec, text):
    with pytest.raises(BundleError, match=text):
        TensorRTSession(model, spec, cache_dir=tmp_path)
    assert gpu.leaks() == {}


def test_all_parser_errors_are_told(gpu, tmp_path):
    gpu.parse_errors = [("node_1", "Mish", "no bf16"), ("node_2", "Loop", "dynamic")]
    with pytest.raises(
        BundleError, match=r"node 'node_1' of Mish: no bf16; node 'node_2' of Loop: dynamic\); export"
    ):
        TensorRTSession(MODEL, SPEC, cache_dir=tmp_path)
    assert gpu.counts["build"] == 0


def test_what_is_no_onnx_is_the_parsers_to_refuse(gpu, tmp_path):
    with pytest.raises(BundleError, match="cannot parse the graph of policy 'tiny' .*not ONNX"):
        TensorRTSession(b"\xff" * 20, SPEC, cache_dir=tmp_path)


def test_a_failed_build_tells_the_loggers_last_errors(gpu, tmp_path):
    gpu.build_fails = True
    with pytest.raises(BundleError, match="cannot build an engine for policy 'tiny' .*no tactic fits"):
        TensorRTSession(MODEL, SPEC, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.engine"))


def test_a_tensorrt_that_does_not_start(gpu, tmp_path):
    gpu.cuda_fails["Builder"] = ""
    with pytest.raises(BundleError, match="does not start on Fake H100"):
        TensorRTSession(MODEL, SPEC, cache_dir=tmp_path)


def test_a_batch_size_below_one_is_a_usage_error(gpu, tmp_path):
    with pytest.raises(UsageError, match="max_batch_size >= 1, got 0"):
        TensorRTSession(MODEL, SPEC, max_batch_size=0, cache_dir=tmp_path)


@pytest.mark.parametrize("version", ["10.11.0.33", "8.6.1"])
def test_an_old_tensorrt_is_refused(gpu, tmp_path, version, monkeypatch):
    gpu.version = version
    gpu.install(monkeypatch)
    with pytest.raises(UsageError, match=f"needs TensorRT 10.12 or newer, got {version}"):
        TensorRTSession(MODEL, SPEC, cache_dir=tmp_path)


def test_no_gpu_is_one_sentence(gpu, tmp_path):
    TensorRTSession(MODEL, SPEC, cache_dir=tmp_path).close()
    gpu.devices = 0
    with pytest.raises(UsageError, match="wanted an NVIDIA GPU .*cudaErrorNoDevice"):
        TensorRTSession(MODEL, SPEC, cache_dir=tmp_path)


@pytest.mark.parametrize("module", ["tensorrt", "cuda.bindings"])
def test_a_missing_module_names_the_extra(gpu, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    with pytest.raises(MissingExtraError, match=r'pip install "rsm-toolkit\[serve-gpu\]" \(.*' + module):
        TensorRTSession(MODEL, SPEC, cache_dir=tmp_path)


@pytest.mark.skipif(bindings_file() is None, reason="tensorrt bindings are not installed")
def test_bindings_without_their_libraries_are_one_sentence(tmp_path):
    """In a process of its own: what the tensorrt package does, with the real bindings and no libnvinfer."""
    if subprocess.run([sys.executable, "-c", "import tensorrt_bindings"], capture_output=True).returncode == 0:
        pytest.skip("the libraries are there")
    (tmp_path / "tensorrt.py").write_text("from tensorrt_bindings import *\n")
    code = (
        "from rsm_common.errors import MissingExtraError\n"
        "from rsm_serve.sessions.tensorrt_engine import load_tensorrt\n"
        "try:\n    load_tensorrt()\nexcept MissingExtraError as error:\n    print(error)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    assert (
        'needs: pip install "rsm-toolkit[serve-gpu]" (tensorrt is there, but does not load: lib'
        in output.stdout
    )
    assert len(output.stdout.splitlines()) == 1


# --- the cache ---------------------------------------------------------------------------------------------


def opened(tmp_path: Path, model: bytes = MODEL, spec: Any = SPEC, **options: Any) -> TensorRTSession:
    return TensorRTSession(model, spec, cache_dir=tmp_path, **{"max_batch_size": 4, **options})


def engines(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("*.engine"))


def test_a_second_start_takes_the_engine_from_the_cache(gpu, tmp_path):
    opened(tmp_path)
    expect(opened(tmp_path), MODEL)
    assert gpu.counts["build"] == 1
    assert gpu.counts["refit"] == 0, "the same weights are in it"
    assert len(engines(tmp_path)) == 1


def cut(content: bytes) -> bytes:
    return content[:-10]


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [cut, flip, lambda content: b"", lambda content: b"[1]\n" + content, lambda content: b"\xff\n" + content,
     lambda content: b'{"format": 1}\n'],
)  # fmt: skip
def test_a_damaged_entry_is_built_again(gpu, tmp_path, caplog, damage):
    opened(tmp_path)
    (path,) = engines(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    expect(opened(tmp_path), MODEL)
    assert gpu.counts["build"] == 2
    assert "damaged" in caplog.text
    opened(tmp_path)
    assert gpu.counts["build"] == 2, "the new entry is sound"


def test_an_entry_that_tensorrt_refuses_is_built_again(gpu, tmp_path, caplog):
    opened(tmp_path)
    (path,) = engines(tmp_path)
    EngineCache(tmp_path).store(path.stem, b"a sound file, but no plan", "00")
    expect(opened(tmp_path), MODEL)
    assert gpu.counts["build"] == 2
    assert "refuses the cached engine" in caplog.text
    assert engines(tmp_path) == [path], "the new one has taken its place"


@pytest.mark.parametrize(
    "change",
    [
        lambda gpu: setattr(gpu, "version", "11.5.0.1"),
        lambda gpu: setattr(gpu, "name", "Fake B200"),
        lambda gpu: setattr(gpu, "capability", (10, 0)),
    ],
)
def test_another_version_or_gpu_has_an_engine_of_its_own(gpu, tmp_path, monkeypatch, change):
    opened(tmp_path)
    change(gpu)
    gpu.install(monkeypatch)
    expect(opened(tmp_path), MODEL)
    assert gpu.counts["build"] == 2
    assert len(engines(tmp_path)) == 2


def test_profiles_and_precision_have_engines_of_their_own(gpu, tmp_path):
    opened(tmp_path)
    opened(tmp_path, max_batch_size=8)
    opened(tmp_path, spec=dataclasses.replace(SPEC, precision="fp16"))
    assert gpu.counts["build"] == len(engines(tmp_path)) == 3


def test_of_two_starts_at_once_one_builds(gpu, tmp_path, monkeypatch):
    second_waits, answers = threading.Event(), []
    locks = itertools.count(1)

    def flock(file, operation):
        if next(locks) == 2:
            second_waits.set()
        fcntl_flock(file, operation)

    fcntl_flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    build = tensorrt_fake.Builder.build_serialized_network

    def slow_build(self, network, config):
        if gpu.counts["build"] == 0:
            other.start()
            assert second_waits.wait(HANG_S), "the second start did not ask for the lock"
        return build(self, network, config)

    monkeypatch.setattr(tensorrt_fake.Builder, "build_serialized_network", slow_build)
    other = threading.Thread(target=lambda: answers.append(opened(tmp_path)))
    expect(opened(tmp_path), MODEL)
    other.join(HANG_S)
    assert gpu.counts["build"] == 1
    expect(answers[0], MODEL)


def test_a_cache_that_cannot_be_written_costs_a_warning(gpu, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    expect(opened(tmp_path / "file"), MODEL)
    assert "no cache of TensorRT engines" in caplog.text


def test_without_file_locks_nothing_is_cached(gpu, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    expect(opened(tmp_path), MODEL)
    assert "no cache of TensorRT engines" in caplog.text
    assert not engines(tmp_path)


def test_a_full_disk_costs_a_warning(gpu, tmp_path, caplog, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_cache, "write_file", full)
    expect(opened(tmp_path), MODEL)
    assert "No space left on device" in caplog.text
    assert not engines(tmp_path)


def test_the_cache_is_bounded_and_forgets_what_was_not_used(tmp_path, monkeypatch):
    cache = EngineCache(tmp_path)
    monkeypatch.setattr(engine_cache, "MAX_CACHE_BYTES", 2500)
    for age, key in enumerate(("oldest", "old")):
        cache.store(key, b"x" * 1000, "00")
        os.utime(cache.path(key), (1000 + age, 1000 + age))
    assert cache.read("oldest") is not None, "and now it was used last"
    cache.store("new", b"x" * 1000, "00")
    assert [path.stem for path in engines(tmp_path)] == ["new", "oldest"]
    cache.store("huge", b"x" * 9000, "00")
    assert [path.stem for path in engines(tmp_path)] == ["huge"], "what was just built is kept"


def test_the_cache_lies_in_the_home_directory_and_is_private(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    TensorRTSession(MODEL, SPEC, max_batch_size=1)
    assert default_cache_dir() == tmp_path / ".cache" / "rsm-toolkit" / "tensorrt"
    assert engines(default_cache_dir())
    assert default_cache_dir().stat().st_mode & 0o077 == 0


# --- refit -------------------------------------------------------------------------------------------------


def test_new_weights_of_the_same_shape_are_refitted(gpu, tmp_path):
    opened(tmp_path)
    trained = changed(changed(MODEL, "W"), "center", 0.9)
    expect(opened(tmp_path, trained), trained)
    assert (gpu.counts["build"], gpu.counts["refit"]) == (1, 1)
    expect(opened(tmp_path), MODEL)
    assert (gpu.counts["build"], gpu.counts["refit"]) == (1, 1), "the entry still holds the first weights"


@pytest.mark.parametrize("name", ["low", "high"])
def test_a_changed_constant_that_is_no_weight_is_built(gpu, tmp_path, name):
    opened(tmp_path)
    other = changed(MODEL, name)
    expect(opened(tmp_path, other), other)
    assert (gpu.counts["build"], gpu.counts["refit"]) == (2, 0)


def test_another_structure_is_built(gpu, tmp_path):
    opened(tmp_path)
    other = make_model(SPEC, work=1)
    expect(opened(tmp_path, other), other)
    assert (gpu.counts["build"], gpu.counts["refit"]) == (2, 0)


def test_a_failed_refit_is_a_build_that_is_kept(gpu, tmp_path, caplog):
    opened(tmp_path)
    gpu.refit_fails = True
    trained = changed(MODEL, "W")
    expect(opened(tmp_path, trained), trained)
    assert "cannot be refitted (the weights do not fit)" in caplog.text
    assert gpu.counts["build"] == 2
    expect(opened(tmp_path, trained), trained)
    expect(opened(tmp_path), MODEL)
    assert gpu.counts["build"] == 2, "both have an engine now"


def test_weights_that_the_engine_does_not_take_are_not_left_stale(gpu, tmp_path, caplog, monkeypatch):
    opened(tmp_path)
    monkeypatch.setattr(tensorrt_fake.Refitter, "get_all_weights", lambda self: ["center"])
    trained = changed(MODEL, "W")
    expect(opened(tmp_path, trained), trained)
    assert "does not take" in caplog.text
    assert gpu.counts["build"] == 2


def test_weights_that_tensorrt_does_not_know_by_name_make_an_engine_for_one_file(gpu, tmp_path, caplog):
    gpu.unmarkable = {"W"}
    opened(tmp_path)
    assert "cannot refit W of policy 'tiny'" in caplog.text
    opened(tmp_path)
    assert gpu.counts["build"] == 1
    trained = changed(MODEL, "W")
    expect(opened(tmp_path, trained), trained)
    assert (gpu.counts["build"], gpu.counts["refit"]) == (2, 0)
    assert "cannot be refitted" not in caplog.text, "it lies under a key of its own, where nobody tries"


def test_timings_are_read_used_and_written_back(gpu, tmp_path):
    opened(tmp_path)
    opened(tmp_path, make_model(SPEC, work=1))
    assert gpu.timings_seen[0] == b""
    assert gpu.timings_seen[1].startswith(tensorrt_fake.TIMINGS)
    (path,) = tmp_path.glob("*.timings")
    for content in (b"damaged", tensorrt_fake.TIMINGS + json.dumps("another GPU").encode()):
        path.write_bytes(content)
        gpu.timings_seen.clear()
        opened(tmp_path, make_model(SPEC, work=2 + len(content)))
        assert gpu.timings_seen == [content, b""], "refused, and begun anew"
        assert path.read_bytes() == tensorrt_fake.TIMINGS + json.dumps(gpu.name).encode()


def test_what_tensorrt_logs_goes_to_logging(gpu, tmp_path, caplog):
    trt = make_tensorrt(gpu)
    shared = tensorrt_engine._shared_logger(trt)
    assert tensorrt_engine._shared_logger(trt) is shared
    with caplog.at_level(logging.DEBUG, logger=tensorrt_engine.__name__):
        for severity in trt.ILogger.Severity:
            shared.log(severity, severity.name)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "ERROR", "WARNING", "DEBUG", "DEBUG"]
    assert shared.last_errors() == "INTERNAL_ERROR; ERROR"


# --- the fake and our source against the real names --------------------------------------------------------

TENSORRT_10_ONLY = {
    "NetworkDefinitionCreationFlag": "TensorRT 11 knows no other networks and needs no flag",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": "as above",
}
REMOVED = {
    *(f"BuilderFlag.{name}" for name in ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "STRONGLY_TYPED")),
    *(f"BuilderFlag.{name}" for name in ("OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")),
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    "IExecutionContext.execute_async_v2",
    "ICudaEngine.num_bindings",
    "Builder.build_engine",
}


def ours() -> set[str]:
    names = set().union(*(used_names(path.read_text()) for path in SOURCES))
    return {name for name in names if not name.startswith("cuda.")}


def real() -> dict[str, str]:
    names = real_names()
    if names is None:
        pytest.skip("needs the TensorRT bindings and a C compiler")
    return names


def test_every_name_that_we_use_is_in_the_real_bindings():
    assert ours() - set(TENSORRT_10_ONLY) <= set(real())
    assert {name.split(".")[0] for name in ours()} >= {
        kind.__name__
        for kind in vars(tensorrt_fake).values()
        if isinstance(kind, type)
        and kind.__module__ == tensorrt_fake.__name__
        and hasattr(make_tensorrt(FakeGpu()), kind.__name__)
    }


def test_no_name_that_tensorrt_11_removed_is_used():
    assert not ours() & REMOVED
    assert not REMOVED & set(real()), "still there: no reason to avoid it"


def test_the_name_check_can_fail():
    names = used_names("recipe.trt.BuilderFlag.FP16\nbuilder.invent()\nself._context.guess()")
    assert names == {"BuilderFlag", "BuilderFlag.FP16", "Builder.invent", "IExecutionContext.guess"}
    assert names - set(real()) == {"BuilderFlag.FP16", "Builder.invent", "IExecutionContext.guess"}


@pytest.mark.skipif(bindings_file() is None, reason="tensorrt bindings are not installed")
def test_every_name_is_among_the_strings_of_the_bindings():
    path = bindings_file()
    assert path is not None
    assert not missing_strings(ours(), path)
    assert missing_strings({"Builder.create_nonsense"}, path) == {"Builder.create_nonsense"}


OF_OUR_OWN = {"FakeGpu", "MisuseError", "CudaErrors", "CopyKinds", "CaptureModes"}


def fake_members() -> dict[str, Any]:
    """Public members of the fake's classes, by class and name."""
    kinds = {name: kind for name, kind in vars(tensorrt_fake).items() if isinstance(kind, type)}
    ours = {name: kind for name, kind in kinds.items() if kind.__module__ == tensorrt_fake.__name__}
    ours = {name: kind for name, kind in ours.items() if name not in OF_OUR_OWN}
    return {
        ("ILogger." if kind.__name__ == "Severity" else "") + f"{name}.{member}": value
        for name, kind in ours.items()
        if not name.startswith("_")
        for member, value in inspect.getmembers(kind)
        if not member.startswith("_")
        if not (issubclass(kind, int) and member in dir(int))
        if member not in ("name", "value")
    }


def test_the_fake_has_only_what_the_real_one_has():
    names = real()
    members = fake_members()
    assert set(members) <= set(names)
    for name, member in members.items():
        if inspect.isfunction(member) and names[name]:
            for parameter in list(inspect.signature(member).parameters)[1:]:
                assert f"{parameter}:" in names[name], f"{name} has no parameter {parameter}"
    assert len(members) > 40


def test_every_name_of_cuda_is_in_the_real_bindings():
    used = set().union(*(used_names(path.read_text()) for path in SOURCES))
    cuda_names = {name.removeprefix("cuda.") for name in used if name.startswith("cuda.")}
    assert "cudaGraphInstantiate" in cuda_names
    assert not [name for name in cuda_names if not reaches(make_cudart(FakeGpu()), name)]
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings are not installed")
    assert not [name for name in cuda_names if not reaches(runtime, name)]


def reaches(thing: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


# --- the real thing ----------------------------------------------------------------------------------------


@pytest.fixture
def real_tensorrt(tmp_path: Path) -> None:
    try:
        TensorRTSession(MODEL, SPEC, max_batch_size=1, cache_dir=tmp_path / "first").close()
    except (MissingExtraError, UsageError) as error:  # no TensorRT, or no GPU
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.usefixtures("real_tensorrt")
def test_on_a_gpu_actions_are_onnxruntimes(tmp_path):
    session = opened(tmp_path, max_batch_size=64)
    assert session.runtime.endswith("CUDA graphs")
    obs, noise = inputs(70)
    wanted, wanted_q = OnnxRuntimeSession(MODEL, SPEC).run(obs, noise)
    for rows in (1, 2, 3, 7, 33, 64, 70):
        action, q = session.run(obs[:rows], noise[:rows])
        np.testing.assert_allclose(action, wanted[:rows], atol=2e-5)
        assert q is not None
        assert wanted_q is not None
        np.testing.assert_allclose(q, wanted_q[:rows], atol=2e-5)
    first, second = session.run(obs[:1], noise[:1])[0], session.run(obs[1:2], noise[:1])[0]
    assert np.abs(first - second).max() > 1e-3
    session.close()


@pytest.mark.gpu
@pytest.mark.usefixtures("real_tensorrt")
def test_on_a_gpu_the_cache_hits_and_refits(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trained = changed(MODEL, "W")
    for model in (MODEL, MODEL, trained):
        session = opened(tmp_path, model)
        obs, noise = inputs(5)
        np.testing.assert_allclose(
            session.run(obs, noise)[0], OnnxRuntimeSession(model, SPEC).run(obs, noise)[0], atol=2e-5
        )
        session.close()
    origins = [record.args[1] for record in caplog.records if record.msg.startswith("TensorRT engine of")]
    assert origins == ["built", "cached", "refitted"]


@pytest.mark.gpu
@pytest.mark.usefixtures("real_tensorrt")
def test_on_a_gpu_nonsense_is_a_bundle_error(tmp_path):
    with pytest.raises(RsmError, match="cannot parse"):
        TensorRTSession(b"nonsense", SPEC, cache_dir=tmp_path)
