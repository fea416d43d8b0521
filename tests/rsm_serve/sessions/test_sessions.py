"""Every installed runtime gives the same actions and the same errors; and which of them runs what."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from rsm_common.errors import BackendError, BundleError, MissingExtraError, UsageError
from rsm_common.seeds import draw_noise
from rsm_serve.bundle.contract import Bundle
from rsm_serve.local import LocalPolicy, run_bundle
from rsm_serve.sessions import choice
from rsm_serve.sessions.batch_sizes import bucket_sizes
from rsm_serve.sessions.choice import (
    AUTO_ORDER,
    BACKENDS,
    BF16_TOLERANCE,
    RUNTIMES,
    open_session,
    require_backend,
)
from tests.bundles import make_model, make_probe, make_spec, reference_action
from tests.hang import HANG_S
from tests.rsm_serve.test_local import ACTION, FLOAT, NOISE, OBS, Q, graph_with

SPEC = make_spec()
PRECISIONS = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2, "int8": 2e-2}
"""Each with the error that its test graph may have, as a fraction of the action range."""


def missing(name: str) -> str:
    """What keeps a CPU backend from running here; empty if nothing does."""
    if importlib.util.find_spec(RUNTIMES[name].module) is None:
        return f"{name} is not installed"
    if name == "openvino-bf16":
        from rsm_serve.sessions.openvino import has_bf16

        return "" if has_bf16() else "the processor has no bf16"
    return ""


def needs(*names: str) -> pytest.MarkDecorator:
    reasons = [reason for name in names if (reason := missing(name))]
    return pytest.mark.skipif(bool(reasons), reason=", ".join(reasons))


CPU_BACKENDS = [pytest.param(name, marks=needs(name)) for name, runtime in RUNTIMES.items() if not runtime.gpu]


def bundle_of(spec=SPEC, model=None):
    return Bundle(None, spec, make_model(spec) if model is None else model, make_probe(spec))  # type: ignore[arg-type]


def inputs(rows, seed=0):
    rng = np.random.default_rng(seed)
    seeds = rng.integers(2**63, size=rows, dtype=np.uint64)
    return rng.normal(size=(rows, 4)).astype(np.float32), draw_noise(seeds, SPEC.noise_shape)


@pytest.fixture(scope="module", params=CPU_BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def session(backend):
    return open_session(bundle_of(), backend)


@pytest.fixture
def atol(backend):
    """In action units; the range is 4."""
    return 4 * BF16_TOLERANCE if backend == "openvino-bf16" else 2e-6


class TestEverySession:
    def test_it_computes_the_graphs_function_at_every_batch_size(self, session, atol):
        for turn, rows in enumerate((1, 7, 64, 5, 1, 64, 33, 7, 200, 1)):
            obs, noise = inputs(rows, seed=turn)
            action, q = session.run(obs, noise)
            assert action.dtype == q.dtype == np.float32
            assert action.shape == (rows, 2)
            assert q.shape == (rows,)
            np.testing.assert_allclose(action, reference_action(SPEC, obs, noise), atol=atol)
            np.testing.assert_allclose(q, obs.sum(1), atol=max(atol, 1e-5))

    def test_a_row_does_not_depend_on_its_batch(self, session, atol):
        obs, noise = inputs(64)
        together, _ = session.run(obs, noise)
        for start, rows in ((0, 1), (63, 1), (3, 7), (20, 33)):
            part = slice(start, start + rows)
            np.testing.assert_allclose(session.run(obs[part], noise[part])[0], together[part], atol=atol)

    def test_a_new_observation_and_new_noise_give_a_new_action(self, session):
        """onnxruntime's CUDA graphs, for one, keep the inputs of the first run."""
        obs, noise = inputs(1)
        first, first_q = session.run(obs, noise)
        other_obs, other_q = session.run(obs + 1, noise)
        other_noise, _ = session.run(obs, noise - 1)
        assert np.abs(other_obs - first).max() > 0.1
        assert abs(other_q - first_q)[0] > 1
        assert np.abs(other_noise - first).max() > 0.1
        np.testing.assert_array_equal(session.run(obs, noise)[0], first)

    def test_the_arrays_belong_to_the_caller(self, session):
        obs, noise = inputs(8)
        action, q = session.run(obs, noise)
        kept = action.copy(), q.copy()
        session.run(obs + 1, noise)
        np.testing.assert_array_equal(action, kept[0])
        np.testing.assert_array_equal(q, kept[1])
        action[:], q[:] = np.nan, np.nan
        np.testing.assert_array_equal(session.run(obs, noise)[0], kept[0])

    def test_inputs_need_not_be_contiguous_and_stay_as_they_were(self, session, atol):
        obs, noise = inputs(10)
        wide = np.repeat(obs, 2, axis=1)
        action, _ = session.run(wide[::2, ::2], noise[::2])
        np.testing.assert_allclose(action, reference_action(SPEC, obs[::2], noise[::2]), atol=atol)
        np.testing.assert_array_equal(wide, np.repeat(obs, 2, axis=1))

    def test_a_graph_without_values(self, backend):
        spec = make_spec(has_q=False)
        assert open_session(bundle_of(spec), backend).run(*inputs(3))[1] is None

    def test_it_says_what_it_is(self, session, backend):
        name, _, rest = backend.partition("-")
        assert re.fullmatch(rf"{name} \d[\w.]*, CPU" + (f" {rest}" if rest else ""), session.runtime)

    @pytest.mark.parametrize(
        ("model", "words"),
        [
            (b"", "cannot load the graph"),
            (b"not a graph", "cannot load the graph"),
            (make_model(SPEC)[:200], "cannot load the graph"),
            (graph_with([("obs", FLOAT, [1, 4]), NOISE], [ACTION, Q]), r"\[1, 4\]"),
            (graph_with([("state", FLOAT, ["B", 4]), NOISE], [ACTION, Q]), "got state, noise"),
            (graph_with([OBS, NOISE], [ACTION]), "got action"),
            (graph_with([("obs", FLOAT, ["B", 5]), NOISE], [ACTION, Q]), "obs of the graph"),
        ],
    )
    def test_a_foreign_graph_is_one_sentence_that_names_the_runtime(self, backend, model, words):
        with pytest.raises(BundleError, match=words) as caught:
            open_session(bundle_of(model=model), backend)
        assert re.search(rf"{RUNTIMES[backend].module} \d", str(caught.value))
        assert "\n" not in str(caught.value)

    def test_a_closed_session_does_not_run(self, backend):
        session = open_session(bundle_of(), backend)
        session.run(*inputs(1))
        policy = LocalPolicy(bundle_of(), session, tolerance=BF16_TOLERANCE)
        policy.close()
        with pytest.raises(BackendError, match="was closed"):
            policy.act(np.zeros(4))
        session.close()

    def test_threads_are_as_many_as_asked_for_and_do_not_spin(self, backend):
        wanted = min(2, len(os.sched_getaffinity(0)))
        session: Any = open_session(bundle_of(model=make_model(SPEC, work=20)), backend, threads=wanted)
        obs, noise = inputs(64)
        for _ in range(5):
            session.run(obs, noise)
        if backend == "onnxruntime":
            options = session._session.get_session_options()
            found = options.intra_op_num_threads
            assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        else:
            found = session._compiled[64].compiled.get_property("INFERENCE_NUM_THREADS")
        assert found == wanted
        # Between the steps of a control loop nothing is computed. Workers that spin use the time all the same.
        used_s = paused_s = 0.0
        for _ in range(25):
            session.run(obs, noise)
            cpu_s, wall_s = time.process_time(), time.monotonic()
            time.sleep(0.01)
            used_s += time.process_time() - cpu_s
            paused_s += time.monotonic() - wall_s
        assert used_s < 0.4 * paused_s


class TestPrecisions:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_backend_runs_what_the_table_says(self, backend, precision):
        spec = dataclasses.replace(SPEC, precision=precision, tolerance=PRECISIONS[precision])
        if precision in RUNTIMES[backend].precisions:
            policy = run_bundle(bundle_of(spec), backend)
            obs, noise = inputs(9)
            error = np.abs(policy.act(obs, noise=noise).action - reference_action(spec, obs, noise)) / 4
            assert error.max() < (BF16_TOLERANCE if backend == "openvino-bf16" else PRECISIONS[precision])
            return
        with pytest.raises(
            BundleError, match=f"of precision {precision}, got {backend}, .*; choose one of"
        ) as caught:
            open_session(bundle_of(spec), backend)
        offered = str(caught.value).partition("choose one of ")[2].split(", ")
        assert offered
        assert all(precision in RUNTIMES[name].precisions for name in offered)

    @needs("onnxruntime")
    def test_the_table_refuses_nothing_that_onnxruntime_could_run(self):
        from rsm_serve.sessions.onnxruntime import OnnxRuntimeSession

        spec = dataclasses.replace(SPEC, precision="bf16")
        with pytest.raises(BundleError, match="cannot load the graph"):
            OnnxRuntimeSession(make_model(spec), spec)

    def test_an_unknown_precision_is_refused_by_all(self):
        bundle = bundle_of(dataclasses.replace(SPEC, precision="fp4"), b"never read")
        for backend in BACKENDS:
            with pytest.raises(BundleError, match="fp32, fp16, int8, bf16, got 'tiny' of fp4"):
                open_session(bundle, backend)

    def test_bf16_has_its_own_tolerance_and_only_where_it_was_asked_for(self):
        spec = dataclasses.replace(SPEC, tolerance=1e-7)
        assert choice.probe_tolerance("openvino-bf16", spec) == BF16_TOLERANCE
        for name in BACKENDS:
            if name != "openvino-bf16":
                assert choice.probe_tolerance(name, spec) == 1e-7

    @needs("openvino", "openvino-bf16")
    def test_openvino_computes_in_float32_unless_told_otherwise(self):
        sessions: list[Any] = [open_session(bundle_of(), name) for name in ("openvino", "openvino-bf16")]
        found = [s._compiled[1].compiled.get_property("INFERENCE_PRECISION_HINT").to_string() for s in sessions]
        assert found == ["f32", "bf16"]


@needs("openvino")
class TestOpenVINO:
    def test_pieces_cover_the_batch_and_leave_little_idle(self):
        from rsm_serve.sessions.openvino import pieces

        assert [pieces(rows) for rows in (1, 3, 5, 6, 33, 64, 130)] == [
            [(1, 1)],
            [(3, 4)],
            [(4, 4), (1, 1)],
            [(6, 8)],
            [(32, 32), (1, 1)],
            [(64, 64)],
            [(64, 64), (64, 64), (2, 2)],
        ]
        for rows in range(1, 300):
            found = pieces(rows)
            assert sum(count for count, _ in found) == rows
            assert all(4 * count >= 3 * size for count, size in found)
            assert {size for _, size in found} <= {1, 2, 4, 8, 16, 32, 64}

    @pytest.mark.parametrize("limit", [1, 2, 3, 48, 64, 100])
    def test_a_server_compiles_every_graph_before_the_first_request(self, limit):
        session: Any = open_session(bundle_of(), "openvino")
        LocalPolicy(bundle_of(), session, warm_up_rows=bucket_sizes(limit))
        known = set(session._compiled)
        for rows in range(1, limit + 1):
            session.run(*inputs(rows))
        assert set(session._compiled) == known

    def test_idle_rows_repeat_a_row_of_their_own_batch(self):
        """A scale that int8 finds over all rows must not depend on an earlier, larger batch."""
        spec = dataclasses.replace(SPEC, precision="int8")
        session = open_session(bundle_of(spec), "openvino")
        obs, noise = inputs(4)
        before, _ = session.run(obs[:3], noise[:3])
        session.run(1000 * obs, noise)
        np.testing.assert_array_equal(session.run(obs[:3], noise[:3])[0], before)

    def test_a_signal_after_sessions_ended_in_the_order_they_began_is_handled(self):
        """As with every reload: the new one begins, then the old one ends."""
        ended = subprocess.run(
            [sys.executable, "-c", RELOADED], capture_output=True, text=True, timeout=HANG_S, check=False
        )
        assert (ended.returncode, ended.stdout) == (0, "heard 15\n"), ended.stderr

    def test_bf16_needs_a_processor_that_has_it(self, monkeypatch):
        class OldCore:
            def get_property(self, device, name):
                assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
                return ["FP32", "INT8"]

        monkeypatch.setattr("rsm_serve.sessions.openvino._core", OldCore)
        with pytest.raises(UsageError, match="processor with bf16"):
            open_session(bundle_of(), "openvino-bf16")


RELOADED = """
import gc, signal
from rsm_serve.bundle.contract import Bundle
from rsm_serve.sessions.batch_sizes import bucket_sizes
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_model, make_probe, make_spec
spec = make_spec()
bundle = Bundle(None, spec, make_model(spec), make_probe(spec))
first, second = open_session(bundle, "openvino"), open_session(bundle, "openvino")
first.close()
del first
gc.collect()
second.close()
del second
gc.collect()
signal.signal(signal.SIGTERM, lambda number, frame: print("heard", number))
signal.raise_signal(signal.SIGTERM)
"""


LISTEN = """
import os, sys
seen = []
sockets = ("socket.connect", "socket.getaddrinfo", "socket.sendto")
watched = (*sockets, "os.fork", "os.posix_spawn", "subprocess.Popen")
sys.addaudithook(lambda event, args: seen.append(event) if event in watched else None)
import numpy as np
from rsm_serve.bundle.contract import Bundle
from rsm_serve.sessions.batch_sizes import bucket_sizes
from rsm_serve.sessions.choice import open_session
from tests.bundles import make_model, make_probe, make_spec
spec = make_spec()
session = open_session(Bundle(None, spec, make_model(spec), make_probe(spec)), sys.argv[1])
session.run(np.zeros((3, 4), np.float32), np.zeros((3, *spec.noise_shape), np.float32))
session.close()
quiet = list(seen)
import socket
socket.socket().connect_ex(("127.0.0.1", 9))
os.waitpid(os.fork() or os._exit(0), 0)
print(quiet, seen, "openvino_telemetry" in sys.modules)
"""


def test_a_runtime_calls_nobody_and_writes_nothing_at_home(backend, tmp_path):
    # Without what tells a vendor's telemetry that it runs under test.
    kept = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {"HOME": str(tmp_path)}
    listening = subprocess.run(
        [sys.executable, "-c", LISTEN, backend],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert listening.stdout == "[] ['socket.connect', 'os.fork'] False\n", listening.stderr
    assert list(tmp_path.iterdir()) == []


class FakeOnnxRuntime:
    """onnxruntime-gpu as far as a session uses it; anything else is an AttributeError."""

    __version__ = "9.9"

    def __init__(self, providers, used=None, preload=True):
        self.providers, self.used, self.calls = providers, used or providers, []
        if preload:
            self.preload_dlls = lambda: print("a line of onnxruntime's own")

    class SessionOptions:
        intra_op_num_threads = inter_op_num_threads = log_severity_level = 0

        def add_session_config_entry(self, key, value):
            assert key.endswith("allow_spinning")
            assert value == "0"

    def get_available_providers(self):
        return self.providers

    def InferenceSession(self, model, options, providers):  # noqa: N802
        self.calls.append((options.intra_op_num_threads, providers))
        return FakeInferenceSession(self)


class FakeInferenceSession:
    def __init__(self, runtime):
        self.runtime = runtime

    def get_providers(self):
        return self.runtime.used

    def disable_fallback(self):
        self.runtime.calls.append("no fallback")

    def get_inputs(self):
        return [Node("obs", ["batch", 4]), Node("noise", ["batch", 3, 2, 2])]

    def get_outputs(self):
        return [Node("action", ["batch", 2]), Node("q", ["batch"])]


@dataclasses.dataclass
class Node:
    name: str
    shape: list[int | str]
    type: str = "tensor(float)"


CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@needs("onnxruntime")
class TestOnnxRuntimeOnAGpu:
    @pytest.fixture
    def fake(self, monkeypatch):
        def install(*providers, **settings):
            fake = FakeOnnxRuntime(list(providers), **settings)
            monkeypatch.setattr("rsm_serve.sessions.onnxruntime.onnxruntime", fake)
            return fake

        return install

    @pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
    def test_the_installed_cpu_build_says_what_to_install(self, backend):
        import onnxruntime

        if CUDA in onnxruntime.get_available_providers():
            pytest.skip("the installed onnxruntime is not the CPU build")
        with pytest.raises(
            MissingExtraError, match=r"got [\d.]+ with .*CPUExecutionProvider.*serve-gpu"
        ) as caught:
            open_session(bundle_of(), backend)
        assert "\n" not in str(caught.value)

    def test_cuda_keeps_float32_and_captures_no_graph(self, fake, capsys):
        runtime = fake(TENSORRT, CUDA, CPU, used=[CUDA, CPU])
        session = open_session(bundle_of(), "onnxruntime-cuda", threads=3)
        cuda = {"device_id": "0", "enable_cuda_graph": "0", "use_tf32": "0"}
        assert runtime.calls == [(3, [(CUDA, cuda), (CPU, {})]), "no fallback"]
        assert session.runtime.endswith(", CUDA")
        assert capsys.readouterr().out == ""  # stdout belongs to the ready line

    def test_tensorrt_gets_its_profile_and_its_cache(self, fake, tmp_path):
        runtime = fake(TENSORRT, CUDA, CPU, preload=False)
        session = open_session(bundle_of(), "onnxruntime-tensorrt", max_batch_size=16, cache_dir=tmp_path)
        _, ((name, options), (second, _), (third, _)) = runtime.calls[0]
        assert [name, second, third] == [TENSORRT, CUDA, CPU]
        assert options == {
            "device_id": "0",
            "trt_fp16_enable": "0",
            "trt_cuda_graph_enable": "0",
            "trt_profile_min_shapes": "obs:1x4,noise:1x3x2x2",
            "trt_profile_opt_shapes": "obs:16x4,noise:16x3x2x2",
            "trt_profile_max_shapes": "obs:16x4,noise:16x3x2x2",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(tmp_path),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(tmp_path),
        }
        assert session.runtime.endswith(", TensorRT")

    def test_without_a_cache_directory_nothing_is_kept(self, fake):
        runtime = fake(TENSORRT, CUDA, CPU)
        open_session(bundle_of(), "onnxruntime-tensorrt")
        assert not any("cache" in key for key in runtime.calls[0][1][0][1])

    @pytest.mark.parametrize(
        ("backend", "used"), [("onnxruntime-cuda", [CPU]), ("onnxruntime-tensorrt", [CUDA, CPU])]
    )
    def test_a_silent_fallback_is_refused(self, fake, backend, used):
        fake(TENSORRT, CUDA, CPU, used=used)
        with pytest.raises(MissingExtraError, match=rf"wanted \w+, got {used[0]} from onnxruntime"):
            open_session(bundle_of(), backend)


class FakeRuntimes:
    """What is installed on a machine, and what fails on it; records what was opened."""

    def __init__(self, monkeypatch, modules, gpus=0, failures=()):
        self.opened: list[str] = []
        failures = dict(failures)

        def open_(name):
            def opened(bundle, settings):
                self.opened.append(name)
                if name in failures:
                    raise failures[name]
                return name

            return opened

        table = {name: dataclasses.replace(runtime, open=open_(name)) for name, runtime in RUNTIMES.items()}
        monkeypatch.setattr(choice, "RUNTIMES", table)
        monkeypatch.setattr(choice, "count_gpus", lambda: gpus)
        monkeypatch.setattr("importlib.util.find_spec", lambda module: object() if module in modules else None)


ALL_MODULES = ("onnxruntime", "openvino", "tensorrt")


class TestAuto:
    @pytest.mark.parametrize(
        ("modules", "gpus", "precision", "taken"),
        [
            (["onnxruntime"], 0, "fp32", "onnxruntime"),
            (["onnxruntime", "openvino"], 0, "fp32", "onnxruntime"),
            (["openvino"], 0, "fp32", "openvino"),
            (ALL_MODULES, 0, "fp32", "onnxruntime"),
            (ALL_MODULES, 1, "fp32", "tensorrt"),
            (["onnxruntime", "openvino"], 1, "fp32", "onnxruntime-cuda"),
            (["openvino"], 1, "fp32", "openvino"),
            (["onnxruntime", "openvino"], 0, "bf16", "openvino"),
            (["onnxruntime"], 0, "fp16", "onnxruntime"),
            (["onnxruntime"], 0, "int8", "onnxruntime"),
            (ALL_MODULES, 1, "int8", "onnxruntime"),
            (ALL_MODULES, 1, "bf16", "tensorrt"),
        ],
    )
    def test_it_takes_the_best_that_is_present_and_able(self, monkeypatch, modules, gpus, precision, taken):
        machine = FakeRuntimes(monkeypatch, modules, gpus)
        open_session(bundle_of(dataclasses.replace(SPEC, precision=precision)))
        assert machine.opened == [taken]

    def test_its_arithmetic_is_never_less_exact_than_the_bundle(self):
        assert not any(RUNTIMES[name].tolerance for name in AUTO_ORDER)

    def test_a_gpu_that_fails_gives_way_with_a_warning(self, monkeypatch, caplog):
        failures = {"tensorrt": BundleError("no memory"), "onnxruntime-cuda": MissingExtraError("no cuDNN")}
        machine = FakeRuntimes(monkeypatch, ALL_MODULES, 1, failures)
        with caplog.at_level(logging.WARNING):
            open_session(bundle_of())
        assert machine.opened == ["tensorrt", "onnxruntime-cuda", "onnxruntime"]
        assert "tensorrt is passed over: no memory" in caplog.text
        assert "onnxruntime-cuda is passed over: no cuDNN" in caplog.text

    def test_a_runtime_that_cannot_be_imported_gives_way_or_is_one_sentence(self, monkeypatch, caplog):
        broken = ImportError("libtbb.so.12: cannot open shared object file")
        machine = FakeRuntimes(monkeypatch, ["openvino", "onnxruntime"], 0, {"onnxruntime": broken})
        open_session(bundle_of())
        assert machine.opened == ["onnxruntime", "openvino"]
        assert "onnxruntime is passed over: wanted to load onnxruntime" in caplog.text
        with pytest.raises(MissingExtraError, match=r"libtbb.so.12.*rsm-toolkit\[serve\]"):
            open_session(bundle_of(), "onnxruntime")

    def test_a_graph_that_the_cpu_cannot_run_is_the_bundles_fault(self, monkeypatch):
        machine = FakeRuntimes(monkeypatch, ALL_MODULES, 0, {"onnxruntime": BundleError("damaged")})
        with pytest.raises(BundleError, match="damaged"):
            open_session(bundle_of())
        assert machine.opened == ["onnxruntime"]

    def test_an_explicit_backend_never_gives_way(self, monkeypatch):
        machine = FakeRuntimes(monkeypatch, ALL_MODULES, 1, {"tensorrt": BundleError("no memory")})
        with pytest.raises(BundleError, match="no memory"):
            open_session(bundle_of(), "tensorrt")
        assert machine.opened == ["tensorrt"]

    def test_where_nothing_is_installed_the_smallest_extra_is_named(self, monkeypatch):
        FakeRuntimes(monkeypatch, [])
        for call in (lambda: open_session(bundle_of()), lambda: require_backend("rsm-serve", "auto")):
            with pytest.raises(MissingExtraError, match=r'needs: pip install "rsm-toolkit\[serve\]"'):
                call()

    def test_a_bf16_bundle_without_a_runtime_for_it_names_the_extra(self, monkeypatch):
        FakeRuntimes(monkeypatch, ["onnxruntime"])
        with pytest.raises(MissingExtraError, match=r"precision bf16 needs.*rsm-toolkit\[serve-openvino\]"):
            open_session(bundle_of(dataclasses.replace(SPEC, precision="bf16")))

    @pytest.mark.parametrize("backend", RUNTIMES)
    def test_a_missing_backend_names_its_extra(self, monkeypatch, backend):
        FakeRuntimes(monkeypatch, [])
        extra = re.escape(f"[{RUNTIMES[backend].extra}]")
        with pytest.raises(
            MissingExtraError, match=f"{backend} needs: .*{extra}.*{RUNTIMES[backend].module} is"
        ):
            open_session(bundle_of(), backend)


def test_every_backend_has_an_entry():
    assert set(BACKENDS) == {"auto", *RUNTIMES}
    assert set(AUTO_ORDER) < set(RUNTIMES)


def test_counting_gpus_needs_no_driver(monkeypatch):
    assert choice.count_gpus() >= 0

    class Driver:
        def cuInit(self, flags):  # noqa: N802
            return 0

        def cuDeviceGetCount(self, pointer):  # noqa: N802
            pointer._obj.value = 2
            return 0

    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    assert choice.count_gpus() == 2
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)  # no device
    assert choice.count_gpus() == 0


def test_a_session_whose_probe_fails_is_closed(monkeypatch):
    closed = []

    class Wrong:
        runtime = "wrong 1.0, CPU"

        def run(self, obs_BO, noise_BTNA):
            return np.zeros((len(obs_BO), 2), np.float32), np.zeros(len(obs_BO), np.float32)

        def close(self):
            closed.append(self)

    monkeypatch.setattr("rsm_serve.local.open_session", lambda *args, **settings: Wrong())
    with pytest.raises(BundleError, match="probe actions .* from wrong 1.0, CPU"):
        run_bundle(bundle_of())
    assert len(closed) == 1
