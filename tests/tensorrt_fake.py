"""A strict stand-in for `tensorrt` and `cuda.bindings.runtime`, whose engine computes with onnxruntime.

It has what our modules use of the real ones and nothing more, under the real names (test_tensorrt.py compares
them with the bindings), and is stricter where the real ones would crash or be silently wrong: every handle and
address is looked up in a ledger, work runs when the stream is waited for and not before, a captured graph
replays addresses, freed memory turns to NaN, and objects that must outlive others are checked to be alive.
"""

from __future__ import annotations

import enum
import gc
import json
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

MAGIC = b"FAKE PLAN\n"
TIMINGS = b"FAKE TIMINGS\n"


class MisuseError(AssertionError):
    """Our code did what the real library does not forgive."""


class FakeGpu:
    """The state of one pretended machine; `install` puts its modules into sys.modules."""

    def __init__(
        self, version: str = "11.4.0.106", name: str = "Fake H100", capability: tuple[int, int] = (9, 0)
    ):
        self.version = version
        self.name = name
        self.capability = capability
        self.devices = 1
        self.memory: dict[int, tuple[str, NDArray[np.uint8]]] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.graph_execs: dict[int, list[Callable[[], None]]] = {}
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.graveyard: list[Any] = []
        self.next_handle = 0x1000
        self.counts = {"build": 0, "refit": 0, "launch": 0, "enqueue": 0, "set_device": 0}
        self.log: list[str] = []
        # What goes wrong, set by tests.
        self.parse_errors: list[tuple[str, str, str]] = []
        self.build_fails = False
        self.unmarkable: set[str] = set()
        self.refit_fails = False
        self.context_fails = False
        self.capture_fails_for: Callable[[int], bool] = lambda rows: False
        self.execute_fails: Callable[[bool], bool] = lambda capturing: False
        self.last_error: str | None = None
        self.cuda_fails: dict[str, str] = {}
        self.timings_seen: list[bytes] = []

    def handle(self) -> int:
        self.next_handle += 0x10000
        return self.next_handle

    def leaks(self) -> dict[str, int]:
        """What was acquired and not given back."""
        gc.collect()
        kinds = [kind for kind, _ in self.memory.values()]
        counts = {
            "device memory": kinds.count("device"),
            "pinned memory": kinds.count("pinned"),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "executable graphs": len(self.graph_execs),
            "contexts": len(self.contexts),
        }
        return {name: count for name, count in counts.items() if count}

    def block(self, address: int, kind: str, size: int) -> NDArray[np.uint8]:
        """The memory at an address, which must be the start of a block of that kind and large enough."""
        if address not in self.memory:
            raise MisuseError(f"{address:#x} is not allocated")
        found, data = self.memory[address]
        if found != kind or size > len(data):
            raise MisuseError(
                f"wanted {size} bytes of {kind} memory at {address:#x}, got {len(data)} of {found}"
            )
        return data[:size]

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        if stream in self.capturing:
            self.capturing[stream].append(work)
        elif stream in self.streams:
            self.streams[stream].append(work)
        else:
            raise MisuseError(f"stream {stream:#x} does not exist")

    def install(self, monkeypatch: Any) -> None:
        """Make `import tensorrt` and `from cuda.bindings import runtime` find this machine."""
        cuda, bindings, runtime = types.ModuleType("cuda"), types.ModuleType("cuda.bindings"), make_cudart(self)
        cuda.__path__, bindings.__path__ = [], []
        bindings.runtime = runtime  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(self))
        monkeypatch.setitem(sys.modules, "cuda", cuda)
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)


# --- cuda.bindings.runtime ---------------------------------------------------------------------------------


class CudaErrors(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureInvalidated = 901


class CopyKinds(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureModes(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


def make_cudart(gpu: FakeGpu) -> types.ModuleType:
    """A module of functions that return (error, value...), as the real ones do."""
    module = types.ModuleType("cuda.bindings.runtime")
    module.cudaError_t = CudaErrors  # type: ignore[attr-defined]
    module.cudaMemcpyKind = CopyKinds  # type: ignore[attr-defined]
    module.cudaStreamCaptureMode = CaptureModes  # type: ignore[attr-defined]
    module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]
    module.cudaHostAllocDefault = 0  # type: ignore[attr-defined]
    for name in dir(_Cudart):
        if name.startswith("cuda"):
            setattr(module, name, _function(gpu, name, getattr(_Cudart(gpu), name)))
    return module


def _function(gpu: FakeGpu, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> tuple[Any, ...]:
        failure = gpu.cuda_fails.get(name)
        if failure is not None:
            if name == "cudaStreamSynchronize":  # the device is lost, and all that it had to do
                for work in gpu.streams.values():
                    work.clear()
            return (CudaErrors[failure], None)
        if name == "cudaStreamSynchronize" and gpu.last_error:
            raise MisuseError(f"{gpu.last_error} was not cleared with cudaGetLastError")
        answer = method(*arguments)
        if isinstance(answer, CudaErrors):
            gpu.last_error = answer.name
            return (answer, None)
        return (CudaErrors.cudaSuccess,) if answer is None else (CudaErrors.cudaSuccess, answer)

    call.__name__ = name
    return call


class _Properties:
    def __init__(self, gpu: FakeGpu) -> None:
        self.name = gpu.name.encode()
        self.major, self.minor = gpu.capability


class _Cudart:
    """Each method gives the value, None for no value, or an error."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return self._gpu.devices or CudaErrors.cudaErrorNoDevice

    def cudaGetDevice(self) -> int:  # noqa: N802
        return 0

    def cudaSetDevice(self, device: int) -> None:  # noqa: N802
        if device >= self._gpu.devices:
            raise MisuseError(f"no device {device}")
        self._gpu.counts["set_device"] += 1

    def cudaGetDeviceProperties(self, device: int) -> _Properties:  # noqa: N802
        assert device == 0
        return _Properties(self._gpu)

    def cudaGetLastError(self) -> None:  # noqa: N802
        self._gpu.last_error = None

    def cudaMalloc(self, size: int) -> int:  # noqa: N802
        # An address that nobody can dereference: device memory is not the host's.
        address = self._gpu.handle()
        self._gpu.memory[address] = ("device", _nans(size))
        return address

    def cudaFree(self, address: int) -> None:  # noqa: N802
        self._free(address, "device")

    def cudaHostAlloc(self, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        data = _nans(size)
        address = int(data.ctypes.data)
        self._gpu.memory[address] = ("pinned", data)
        return address

    def cudaFreeHost(self, address: int) -> None:  # noqa: N802
        self._free(address, "pinned")

    def _free(self, address: int, kind: str) -> None:
        if any(self._gpu.streams.values()):
            raise MisuseError("memory is freed while work is pending")
        data = self._gpu.block(address, kind, 0)
        whole = self._gpu.memory.pop(address)[1]
        whole[:] = 0xFF  # NaN: whoever still looks sees it
        self._gpu.graveyard.append((data, whole))

    def cudaStreamCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        assert flags == 1
        stream = self._gpu.handle()
        self._gpu.streams[stream] = []
        return stream

    def cudaStreamDestroy(self, stream: int) -> None:  # noqa: N802
        if self._gpu.streams.pop(stream):
            raise MisuseError("a stream is destroyed while work is pending")

    def cudaStreamSynchronize(self, stream: int) -> None:  # noqa: N802
        if stream in self._gpu.capturing:
            raise MisuseError("a capturing stream cannot be waited for")
        work, self._gpu.streams[stream] = self._gpu.streams[stream], []
        for step in work:
            step()

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> None:  # noqa: N802
        kinds = ("device", "pinned") if kind == 1 else ("pinned", "device")

        def copy() -> None:
            self._gpu.block(to, kinds[0], size)[:] = self._gpu.block(source, kinds[1], size)

        self._gpu.block(to, kinds[0], size), self._gpu.block(source, kinds[1], size)
        self._gpu.submit(stream, copy)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> None:  # noqa: N802
        if stream in self._gpu.capturing or self._gpu.streams[stream] or mode != 1:
            raise MisuseError("capture begins on a stream that is capturing or has pending work")
        self._gpu.capturing[stream] = []

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        work = self._gpu.capturing.pop(stream)
        if _invalid in work:
            return CudaErrors.cudaErrorStreamCaptureInvalidated
        graph = self._gpu.handle()
        self._gpu.graphs[graph] = work
        return graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        executable = self._gpu.handle()
        self._gpu.graph_execs[executable] = self._gpu.graphs[graph]
        return executable

    def cudaGraphDestroy(self, graph: int) -> None:  # noqa: N802
        del self._gpu.graphs[graph]

    def cudaGraphExecDestroy(self, executable: int) -> None:  # noqa: N802
        del self._gpu.graph_execs[executable]

    def cudaGraphLaunch(self, executable: int, stream: int) -> None:  # noqa: N802
        self._gpu.counts["launch"] += 1
        for step in self._gpu.graph_execs[executable]:
            self._gpu.submit(stream, step)


def _invalid() -> None:
    """Stands in a capture that went wrong."""


def _nans(size: int) -> NDArray[np.uint8]:
    return np.full(size, 0xFF, np.uint8)


# --- tensorrt ----------------------------------------------------------------------------------------------


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.started = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class BuilderFlag(enum.IntEnum):
    TF32 = 7
    REFIT_INDIVIDUAL = 23


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class IHostMemory:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._content)


class ParserError:
    def __init__(self, name: str, operator: str, text: str) -> None:
        self._values = name, operator, text

    def node_name(self) -> str:
        return self._values[0]

    def node_operator(self) -> str:
        return self._values[1]

    def desc(self) -> str:
        return self._values[2]


class _Errors:
    """What OnnxParser and OnnxParserRefitter share."""

    def __init__(self) -> None:
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class INetworkDefinition:
    def __init__(self) -> None:
        self._model: onnx.ModelProto | None = None
        self._parser: weakref.ref[Any] = lambda: None  # type: ignore[assignment]
        self._marked: set[str] = set()
        self._gpu: FakeGpu

    def mark_weights_refittable(self, name: str) -> bool:
        assert self._model is not None
        known = {tensor.name for tensor in self._model.graph.initializer} - self._gpu.unmarkable
        if name in known:
            self._marked.add(name)
        return name in known

    def unmark_weights_refittable(self, name: str) -> bool:
        self._marked.remove(name)
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError("min <= opt <= max")
        self._shapes[input] = [min, opt, max]


class IBuilderConfig:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._timings: weakref.ref[ITimingCache] | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(BuilderFlag(flag))

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.remove(BuilderFlag(flag))

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        # As the real one: all dynamic axes alike, or the shapes cannot be consistent.
        batches = [[shape[0] for shape in shapes] for shapes in profile._shapes.values()]
        if any(batch != batches[0] for batch in batches):
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        content = serialized_timing_cache
        self._gpu.timings_seen.append(content)
        return ITimingCache(content) if content == b"" or content.startswith(TIMINGS) else None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        content = cache._content
        if content and json.loads(content[len(TIMINGS) :]) != self._gpu.name and not ignore_mismatch:
            return False
        self._timings = weakref.ref(cache)
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        if self._timings is None or self._timings() is None:
            raise MisuseError("the timing cache is gone")
        return ITimingCache(TIMINGS + json.dumps(self._gpu.name).encode())


class ICudaEngine:
    def __init__(self, gpu: FakeGpu, plan: bytes, runtime: Any) -> None:
        header, _, model = plan[len(MAGIC) :].partition(b"\n")
        self._gpu = gpu
        self._header: dict[str, Any] = json.loads(header)
        self._model = onnx.load_from_string(model)
        self._runtime = runtime
        self._load()

    def _load(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @property
    def _values(self) -> list[tuple[TensorIOMode, Any]]:
        graph = self._model.graph
        return [(TensorIOMode.INPUT, value) for value in graph.input] + [
            (TensorIOMode.OUTPUT, value) for value in graph.output
        ]

    def _value(self, name: str) -> tuple[TensorIOMode, Any]:
        return next((mode, value) for mode, value in self._values if value.name == name)

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    def get_tensor_name(self, index: int) -> str:
        return str(self._values[index][1].name)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._value(name)[0]

    def get_tensor_dtype(self, name: str) -> DataType:
        kinds = {onnx.TensorProto.FLOAT: DataType.FLOAT, onnx.TensorProto.INT64: DataType.INT64}
        return kinds[self._value(name)[1].type.tensor_type.elem_type]

    def get_tensor_shape(self, name: str) -> list[int]:
        dims = self._value(name)[1].type.tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims]

    def create_execution_context(self) -> IExecutionContext | None:
        return None if self._gpu.context_fails else IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._gpu = engine._gpu
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ran: set[tuple[Any, ...]] = set()
        self._gpu.contexts.add(self)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._engine.get_tensor_mode(name) is not TensorIOMode.INPUT:
            raise MisuseError(f"{name} is no input")
        low, _, high = self._engine._header["profile"][name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._engine.get_tensor_mode(name)
        if self._gpu.memory[memory][0] != "device":
            raise MisuseError(f"{name} must lie on the device")
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        if name in self._shapes:
            return list(self._shapes[name])
        rows = self._shapes["obs"][0]
        return [rows if size == -1 else size for size in self._engine.get_tensor_shape(name)]

    def execute_async_v3(self, stream_handle: int) -> bool:
        names = [value.name for _, value in self._engine._values]
        inputs = [value.name for mode, value in self._engine._values if mode is TensorIOMode.INPUT]
        if not isinstance(stream_handle, int) or stream_handle == 0:
            raise MisuseError("wanted a stream of one's own, as a number")
        if set(self._addresses) != set(names) or set(self._shapes) != set(inputs):
            raise MisuseError(
                f"addresses of {sorted(self._addresses)} and shapes of {sorted(self._shapes)} are set"
            )
        rows = self._shapes["obs"][0]
        if stream_handle in self._gpu.capturing:
            if (rows,) not in self._ran:
                raise MisuseError("the first run of a shape allocates and cannot be captured")
            if self._gpu.capture_fails_for(rows):
                self._gpu.submit(stream_handle, _invalid)
                return False
        if self._gpu.execute_fails(stream_handle in self._gpu.capturing):
            return False
        self._ran.add((rows,))
        self._gpu.counts["enqueue"] += 1
        # The graph holds what the context needs, not the context: destroyed too early is misuse.
        this = weakref.ref(self)
        addresses, shapes = dict(self._addresses), dict(self._shapes)

        def execute() -> None:
            context = this()
            if context is None:
                raise MisuseError("the context is gone")
            context._execute(inputs, addresses, shapes)

        self._gpu.submit(stream_handle, execute)
        return True

    def _execute(
        self, inputs: list[str], addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        feeds = {}
        for name in inputs:
            size = 4 * int(np.prod(shapes[name]))
            data = self._gpu.block(addresses[name], "device", size)
            feeds[name] = data.view(np.float32).reshape(shapes[name]).copy()
        outputs = [name for name in addresses if name not in inputs]
        for name, array in zip(outputs, self._engine._session.run(outputs, feeds), strict=True):
            content = np.ascontiguousarray(array, np.float32).view(np.uint8).reshape(-1)
            self._gpu.block(addresses[name], "device", len(content))[:] = content


def make_tensorrt(gpu: FakeGpu) -> types.ModuleType:
    """A module of the classes above, with those that are created from a logger bound to the machine."""
    module = types.ModuleType("tensorrt")
    module.__version__ = gpu.version  # type: ignore[attr-defined]
    plain: tuple[type, ...] = (ILogger, BuilderFlag, DataType, TensorIOMode)
    for kind in plain:
        setattr(module, kind.__name__, kind)
    if int(gpu.version.split(".")[0]) < 11:
        module.NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag  # type: ignore[attr-defined]
    bound: tuple[type, ...] = (Builder, Runtime, OnnxParser, Refitter, OnnxParserRefitter)
    for kind in bound:
        setattr(module, kind.__name__, type(kind.__name__, (kind,), {"_gpu": gpu}))
    return module


def _check_logger(logger: ILogger) -> None:
    if not getattr(logger, "started", False):
        raise MisuseError("a subclass of ILogger must call ILogger.__init__")


class Builder:
    _gpu: FakeGpu

    def __init__(self, logger: ILogger) -> None:
        _check_logger(logger)
        if "Builder" in self._gpu.cuda_fails:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        wanted = 0 if int(self._gpu.version.split(".")[0]) >= 11 else 1 << 1
        if flags != wanted:
            raise MisuseError(f"wanted network flags {wanted}, got {flags}")
        network = INetworkDefinition()
        network._gpu = self._gpu
        return network

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._gpu)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        if network._model is None or network._parser() is None:
            raise MisuseError("the network was not parsed, or its parser, which owns the weights, is gone")
        if config._timings is None or config._timings() is None:
            raise MisuseError("no timing cache is attached, or it is gone")
        if len(config._profiles) != 1 or BuilderFlag.TF32 in config._flags:
            raise MisuseError("wanted one profile and no TF32")
        if bool(network._marked) != (BuilderFlag.REFIT_INDIVIDUAL in config._flags):
            raise MisuseError("weights are marked without REFIT_INDIVIDUAL or the other way round")
        self._gpu.counts["build"] += 1
        if self._gpu.build_fails:
            self._logger.log(Severity.ERROR, "no tactic fits")
            return None
        header = {
            "version": self._gpu.version,
            "gpu": self._gpu.name,
            "profile": config._profiles[0]._shapes,
            "refittable": sorted(network._marked),
        }
        model = network._model.SerializeToString()
        return IHostMemory(MAGIC + json.dumps(header).encode() + b"\n" + model)


class OnnxParser(_Errors):
    _gpu: FakeGpu

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        super().__init__()
        _check_logger(logger)
        self._network = network

    def parse(self, model: bytes) -> bool:
        self._errors = [ParserError(*error) for error in self._gpu.parse_errors]
        try:
            self._network._model = onnx.load_from_string(model)
        except Exception as error:
            self._errors.append(ParserError("", "", f"not ONNX: {error}"))
        self._network._parser = weakref.ref(self)
        return not self._errors


class Runtime:
    _gpu: FakeGpu

    def __init__(self, logger: ILogger) -> None:
        _check_logger(logger)
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        plan = serialized_engine
        if not plan.startswith(MAGIC):
            self._logger.log(Severity.ERROR, "the plan has no magic number")
            return None
        engine = ICudaEngine(self._gpu, plan, self)
        if (engine._header["version"], engine._header["gpu"]) != (self._gpu.version, self._gpu.name):
            self._logger.log(Severity.ERROR, "the plan is of another version or GPU")
            return None
        return engine


class Refitter:
    _gpu: FakeGpu

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        _check_logger(logger)
        if not engine._header["refittable"]:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine = engine
        self._logger = logger
        self._weights: dict[str, onnx.TensorProto] = {}
        self._owner: weakref.ref[Any] = lambda: None  # type: ignore[assignment]

    def get_all_weights(self) -> list[str]:
        return list(self._engine._header["refittable"])

    def refit_cuda_engine(self) -> bool:
        if self._owner() is None:
            raise MisuseError("the parser that owns the new weights is gone")
        if self._gpu.refit_fails:
            self._logger.log(Severity.ERROR, "the weights do not fit")
            return False
        self._gpu.counts["refit"] += 1
        for tensor in self._engine._model.graph.initializer:
            if tensor.name in self._weights:
                tensor.CopyFrom(self._weights[tensor.name])
        self._engine._load()
        return True


class OnnxParserRefitter(_Errors):
    _gpu: FakeGpu

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        super().__init__()
        _check_logger(logger)
        self._refitter = refitter

    def refit_from_bytes(self, model: bytes) -> bool:
        found = {tensor.name: tensor for tensor in onnx.load_from_string(model).graph.initializer}
        old = {tensor.name: tensor for tensor in self._refitter._engine._model.graph.initializer}
        for name in self._refitter.get_all_weights():
            if name not in found or found[name].dims != old[name].dims:
                self._errors.append(ParserError(name, "Constant", "count or name of weights differs"))
            else:
                self._refitter._weights[name] = found[name]
        self._refitter._owner = weakref.ref(self)
        return not self._errors
