"""Which runtime runs a bundle: the backends by name, what each needs, and what `auto` takes."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from rsm_common.commandline import require_extra
from rsm_common.errors import BundleError, MissingExtraError, UsageError
from rsm_common.spec import PolicySpec
from rsm_serve.bundle.contract import Bundle
from rsm_serve.sessions import Session

if TYPE_CHECKING:
    from rsm_serve.sessions.onnxruntime import Provider

logger = logging.getLogger(__name__)

Backend = Literal[
    "auto",
    "onnxruntime",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "openvino",
    "openvino-bf16",
    "tensorrt",
]
BACKENDS: tuple[str, ...] = get_args(Backend)

AUTO_ORDER = ("tensorrt", "onnxruntime-cuda", "onnxruntime", "openvino")
"""What `auto` prefers, best first: GPU runtimes, then onnxruntime, which is as fast as OpenVINO for one row
(benchmarks/runtimes.py) and loads in a tenth of the time and the memory. None of them computes in less than
float32 what was exported in float32."""

BF16_TOLERANCE = 0.1
"""How far bf16 arithmetic may be off a bundle's recorded actions, as a fraction of the action range. It has 8
bits of mantissa, and the chain feeds each step's rounding to the next."""


@dataclass(frozen=True)
class SessionSettings:
    """How a session is to run."""

    threads: int = 1
    """CPU threads of one inference."""
    max_batch_size: int = 64
    """Most rows of one run."""
    cache_dir: Path | None = None
    """Where TensorRT engines are kept."""


Opener = Callable[[Bundle, SessionSettings], Session]


@dataclass(frozen=True)
class Runtime:
    """What a backend needs, can do, and how it is opened."""

    extra: str
    module: str
    """Without which it cannot work."""
    precisions: tuple[str, ...]
    """Of the bundles that it can run (`PolicySpec.precision`)."""
    open: Opener
    gpu: bool = False
    tolerance: float = 0.0
    """What its arithmetic may add to a bundle's own tolerance."""


def _onnxruntime(provider: Provider) -> Opener:
    def open_(bundle: Bundle, settings: SessionSettings) -> Session:
        from rsm_serve.sessions.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(
            bundle.model,
            bundle.spec,
            provider=provider,
            threads=settings.threads,
            max_batch_size=settings.max_batch_size,
            cache_dir=settings.cache_dir,
        )

    return open_


def _openvino(precision: Literal["f32", "bf16"]) -> Opener:
    def open_(bundle: Bundle, settings: SessionSettings) -> Session:
        from rsm_serve.sessions.openvino import OpenVINOSession

        return OpenVINOSession(bundle.model, bundle.spec, threads=settings.threads, precision=precision)

    return open_


def _tensorrt(bundle: Bundle, settings: SessionSettings) -> Session:
    from rsm_serve.sessions.tensorrt import TensorRTSession

    return TensorRTSession(
        bundle.model, bundle.spec, max_batch_size=settings.max_batch_size, cache_dir=settings.cache_dir
    )


# onnxruntime's CPU kernels lack bf16. OpenVINO computes fp16 and bf16 bundles in float32, from their rounded
# weights. int8 bundles store int8 weights, expand them with DequantizeLinear and multiply in float32. They are
# listed only for the CPU runtimes, where they have been run. onnxruntime's GPU providers are listed with the
# precisions that their documentation states clearly.
RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(
        "serve", "onnxruntime", ("fp32", "fp16", "int8"), _onnxruntime("CPUExecutionProvider")
    ),
    "onnxruntime-cuda": Runtime(
        "serve-gpu", "onnxruntime", ("fp32", "fp16"), _onnxruntime("CUDAExecutionProvider"), gpu=True
    ),
    "onnxruntime-tensorrt": Runtime(
        "serve-gpu", "onnxruntime", ("fp32",), _onnxruntime("TensorrtExecutionProvider"), gpu=True
    ),
    "openvino": Runtime("serve-openvino", "openvino", ("fp32", "fp16", "bf16", "int8"), _openvino("f32")),
    "openvino-bf16": Runtime(
        "serve-openvino", "openvino", ("fp32", "bf16"), _openvino("bf16"), tolerance=BF16_TOLERANCE
    ),
    "tensorrt": Runtime("serve-gpu", "tensorrt", ("fp32", "fp16", "bf16"), _tensorrt, gpu=True),
}


def open_session(
    bundle: Bundle,
    backend: str = "auto",
    *,
    threads: int = 1,
    max_batch_size: int = 64,
    cache_dir: Path | None = None,
) -> Session:
    """Open the bundle's graph.

    Args:
        bundle: a verified bundle.
        backend: one of BACKENDS; "auto" takes the best that is present, see AUTO_ORDER.
        threads: CPU threads of one inference.
        max_batch_size: most rows of one run.
        cache_dir: where TensorRT engines are kept between starts.

    Raises:
        UsageError: no such backend.
        MissingExtraError: the backend is not installed.
        BundleError: the graph does not load or is not what the specification says, or the backend cannot
            compute in the bundle's precision.
    """
    if backend not in BACKENDS:
        raise UsageError(f"wanted a backend of {', '.join(BACKENDS)}, got {backend!r}")
    able = _able(bundle.spec)
    settings = SessionSettings(threads, max_batch_size, cache_dir)
    if backend == "auto":
        return _open_best(bundle, [name for name in AUTO_ORDER if name in able], settings)
    if backend not in able:
        raise BundleError(
            f"wanted a backend for policy {bundle.spec.name!r} of precision {bundle.spec.precision}, "
            f"got {backend}, which takes {', '.join(RUNTIMES[backend].precisions)}; "
            f"choose one of {', '.join(able)}"
        )
    require_backend(f"backend {backend}", backend)
    return _open(backend, bundle, settings)


def require_backend(command: str, backend: str) -> None:
    """Check that a backend is installed; for "auto", that there is any.

    Raises:
        MissingExtraError: it is not.
    """
    if backend != "auto":
        require_extra(command, RUNTIMES[backend].extra, [RUNTIMES[backend].module])
    elif not any(_installed(name) for name in AUTO_ORDER):
        require_extra(command, RUNTIMES["onnxruntime"].extra, [RUNTIMES["onnxruntime"].module])


def extra_of(backend: str) -> str:
    """The extra that installs a backend; of "auto", the smallest that has one."""
    return RUNTIMES["onnxruntime" if backend == "auto" else backend].extra


def probe_tolerance(backend: str, spec: PolicySpec) -> float:
    """How far a backend's actions may be off a bundle's recorded ones, as a fraction of the action range."""
    return spec.tolerance if backend == "auto" else max(spec.tolerance, RUNTIMES[backend].tolerance)


def _able(spec: PolicySpec) -> list[str]:
    able = [name for name, runtime in RUNTIMES.items() if spec.precision in runtime.precisions]
    if not able:
        known = dict.fromkeys(precision for runtime in RUNTIMES.values() for precision in runtime.precisions)
        raise BundleError(
            f"wanted a policy of precision {', '.join(known)}, got {spec.name!r} of {spec.precision}; "
            "install a newer rsm-toolkit or export the policy again"
        )
    return able


def _open_best(bundle: Bundle, candidates: Sequence[str], settings: SessionSettings) -> Session:
    """The first candidate that is present; a GPU runtime that fails gives way to the next, with a warning."""
    present = [name for name in candidates if _present(name)]
    if not present:
        smallest = "onnxruntime" if "onnxruntime" in candidates else candidates[-1]
        needed = RUNTIMES[smallest]
        require_extra(f"running a bundle of precision {bundle.spec.precision}", needed.extra, [needed.module])
    *others, last = present
    for name in others:
        try:
            return _open(name, bundle, settings)
        except (MissingExtraError, BundleError) as error:
            if isinstance(error, BundleError) and not RUNTIMES[name].gpu:
                raise
            logger.warning("backend %s is passed over: %s", name, error)
    return _open(last, bundle, settings)


def _open(name: str, bundle: Bundle, settings: SessionSettings) -> Session:
    try:
        return RUNTIMES[name].open(bundle, settings)
    except ImportError as error:  # installed, but for another machine, or without the libraries it needs
        raise MissingExtraError(
            f"wanted to load {RUNTIMES[name].module} for backend {name}, got: {error}; "
            f'install it again with pip install "rsm-toolkit[{RUNTIMES[name].extra}]" or choose another'
        ) from error


def _present(name: str) -> bool:
    return _installed(name) and (not RUNTIMES[name].gpu or count_gpus() > 0)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(RUNTIMES[name].module) is not None


def count_gpus() -> int:
    """CUDA devices that this process may use; asks the driver, so that no runtime need be imported."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0
